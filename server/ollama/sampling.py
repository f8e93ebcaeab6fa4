"""Ollama's options, as OpenAI's fields for sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from server.schemas.ollama import OllamaOptions

SERVED: Mapping[str, str] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
"""Options and their names in a text request."""

OFF: Mapping[str, object] = {
    "typical_p": 1,
    "tfs_z": 1,
    "mirostat": 0,
    "penalize_newline": True,
    "logits_all": False,
    "vocab_only": False,
    "embedding_only": False,
}
"""Options that would change the answer and are not served, with the value that asks for nothing.

All others say how to run the model, which the configuration does. They have no effect.
"""


def sampling_fields(options: OllamaOptions, limit: str, context: int | None) -> dict[str, Any]:
    """The fields of a text request. `limit` is its name for the most tokens of the answer.

    Where the context has fewer tokens, it is the limit, as with Ollama.

    Raises:
        InvalidRequest: naming an option that cannot be served.

    """
    given = options.model_dump(exclude_none=True)
    for name, off in OFF.items():
        if given.get(name, off) != off:
            raise _refusal(name, f"it is not served; the value {str(off).lower()} is off")
    penalty = given.get("repeat_penalty", 1)
    window = given.get("repeat_last_n", -1)
    if window == 0:
        given.pop("repeat_penalty", None)
    elif window > 0 and penalty != 1:
        raise _refusal(
            "repeat_last_n", "repeat_penalty looks at the whole text (-1) or at none (0)"
        )
    fields = {new: given[name] for name, new in SERVED.items() if name in given}
    if fields.get("seed", 0) < 0:  # any seed
        del fields["seed"]
    most = given.get("num_predict", -1)
    if most == 0:
        raise _refusal("num_predict", "it must be at least 1, or -1 for no limit")
    if most > 0 and (context is None or most < context):
        fields[limit] = most
    return fields


def client_names(limit: str) -> dict[str, str]:
    """The client's names of the fields that `sampling_fields` gives."""
    names = {new: f"options.{name}" for name, new in SERVED.items()}
    return {**names, limit: "options.num_predict"}


def _refusal(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{reason[0].upper()}{reason[1:]}.", param=f"options.{name}")
