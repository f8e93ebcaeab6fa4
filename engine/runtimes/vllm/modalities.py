"""What a model of vLLM takes beside text, and the refusal of what it does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from engine.media.attachments import Attachment, Kind, attachments
from engine.runtimes.vllm.checkpoint import read_config
from engine.runtimes.vllm.options import VllmOptions

TEXT = "text"

_EYES = ("vision", "visual", "image", "img")
_EARS = ("audio", "speech")
"""Parts of the names of keys that only the configuration of a model with eyes or ears has."""


def senses(config: Mapping[str, Any]) -> frozenset[Kind]:
    """What the `config.json` of a checkpoint says that the model takes beside text."""
    found = set()
    if any(part in key for key in config for part in _EYES):
        # Which of them see videos, only their processor knows. The options say so.
        found |= {Kind.IMAGE, Kind.VIDEO}
    if any(part in key for key in config for part in _EARS):
        found.add(Kind.AUDIO)
    return frozenset(found)


def folder_senses(folder: Path) -> frozenset[Kind]:
    """The same of a folder.

    Raises:
        LoadFailed: its configuration cannot be read.

    """
    return senses(read_config(folder))


def limits(options: VllmOptions, found: Collection[Kind]) -> dict[Kind, int]:
    """How many of each kind one request may have. Of others it may have none."""
    wanted = {Kind(name): count for name, count in options.media_counts.items()}
    return {kind: count for kind, count in wanted.items() if count and kind in found}


def check_attachments(body: Mapping[str, Any], allowed: Mapping[Kind, int], model: str) -> None:
    """Refuse what the model does not take, and more than it may get.

    Raises:
        InvalidRequest: naming the part.

    """
    counts = dict.fromkeys(Kind, 0)
    for each in attachments(body):
        counts[each.kind] += 1
        _check_form(each)
        most = allowed.get(each.kind, 0)
        if not most:
            raise InvalidRequest(
                f"{each.param}: the model {model!r} takes no {each.kind.value}"
                f"{', only text' if not allowed else ''}.",
                param=each.param,
            )
        if counts[each.kind] > most:
            raise InvalidRequest(
                f"{each.param}: a request to the model {model!r} may have {most} of kind"
                f" {each.kind.value!r} (options.limit_mm_per_prompt).",
                param=each.param,
            )


def _check_form(attachment: Attachment) -> None:
    """Refuse what vLLM would look up, or fetch by itself."""
    part = attachment.part
    if part.get("uuid") is not None:
        # vLLM would take what another client has sent under that name.
        param = f"{attachment.place}.uuid"
        raise InvalidRequest(f"{param}: content is not kept under a name here.", param=param)
    value = part.get(attachment.field)
    if attachment.field == "source" and isinstance(value, Mapping) and "url" not in value:
        return
    url = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(url, str) and attachment.field != "input_audio" and url[:5].lower() != "data:":
        raise InvalidRequest(
            f"{attachment.param}: it must be a data: URL here.", param=attachment.param
        )
