"""A folder of a Coqui model, read without its library: its kind, speakers, languages and files.

`config.json` of a released model has absolute paths of the machine that trained it. Here they are
read as names in the folder. torch reads pickled files with `weights_only`, which builds tensors and
plain containers and runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from engine.errors import LoadFailed, reason
from engine.files.pickled import load_pickled

CONFIG_FILE = "config.json"

CHECKPOINTS = ("model_file.pth", "model.pth", "best_model.pth")
"""Names of the weights: in Coqui's releases, in XTTS, and as the trainer writes them."""

XTTS_SPEAKERS = "speakers_xtts.pth"

_FILE_KEYS = ("speakers_file", "speaker_file", "d_vector_file", "language_ids_file")
"""Settings that name a file, in the configuration and again in its `model_args`."""

_ENCODER_KEYS = ("speaker_encoder_config_path", "speaker_encoder_model_path")
"""Settings of the network that helps to train VITS, and that speaking does not need."""


@dataclass(frozen=True, slots=True)
class CoquiFiles:
    """The contents of the folder."""

    folder: Path
    kind: Literal["vits", "xtts"]
    config: Mapping[str, Any]
    """`config.json`, with its paths in the folder."""
    checkpoint: Path
    speakers: tuple[str, ...]
    """In the model's order; none if it has one voice without a name."""
    languages: tuple[str, ...]
    """As the model names them; none if it does not declare any."""
    sample_rate: int
    """Hertz."""


def read_folder(folder: Path) -> CoquiFiles:
    """The contents of the folder. It reads the file of the speakers, but no weights.

    Raises:
        LoadFailed: a file is missing or unreadable, or the model is of another kind.

    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = str(config.get("model", "")).lower()
        arguments = dict(config.get("model_args") or {})
        config["model_args"] = arguments
        if kind not in ("vits", "xtts"):
            raise LoadFailed(f"{folder.name}: config.json is of a model {kind!r}, not VITS or XTTS")
        for section in (config, arguments):
            _own_paths(folder, section)
        audio = config.get("audio") or {}
        return CoquiFiles(
            folder=folder,
            kind="xtts" if kind == "xtts" else "vits",
            config=config,
            checkpoint=_checkpoint(folder),
            speakers=_xtts_speakers(folder) if kind == "xtts" else _vits_speakers(config),
            languages=_languages(config),
            sample_rate=int(audio.get("output_sample_rate") or audio["sample_rate"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed(f"{folder.name}: cannot read the model: {reason(error)}") from error


def _own_paths(folder: Path, section: dict[str, Any]) -> None:
    for key in _FILE_KEYS:
        named = section.get(key)
        if named:
            files = [
                _beside(folder, each) for each in ([named] if isinstance(named, str) else named)
            ]
            section[key] = files[0] if isinstance(named, str) else files
    for key in _ENCODER_KEYS:
        if key in section:
            section[key] = ""


def _beside(folder: Path, named: str) -> str:
    name = PureWindowsPath(PurePosixPath(named).name).name
    path = folder / name
    if not path.is_file():
        raise LoadFailed(f"{folder.name}: config.json names {name}, which is not in the folder")
    return str(path)


def _checkpoint(folder: Path) -> Path:
    for name in CHECKPOINTS:
        if (folder / name).is_file():
            return folder / name
    raise LoadFailed(f"{folder.name}: no {', '.join(CHECKPOINTS[:-1])} or {CHECKPOINTS[-1]}")


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """The setting in `model_args`, otherwise in the configuration. Coqui uses the same order."""
    return config["model_args"].get(key) or config.get(key)


def _vits_speakers(config: Mapping[str, Any]) -> tuple[str, ...]:
    if _setting(config, "use_speaker_embedding"):
        if config.get("speakers"):
            return tuple(map(str, config["speakers"]))
        path = _setting(config, "speaker_file") or _setting(config, "speakers_file")
        ids: dict[str, int] = _table(path) if path else {}
        return tuple(sorted(ids, key=lambda speaker: ids[speaker]))
    if _setting(config, "use_d_vector_file"):
        paths = _setting(config, "d_vector_file") or []
        tables = [_table(path) for path in ([paths] if isinstance(paths, str) else paths)]
        return tuple(sorted({str(row["name"]) for table in tables for row in table.values()}))
    return ()


def _table(path: str) -> Any:
    if path.endswith(".pth"):
        return load_pickled(Path(path))
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _xtts_speakers(folder: Path) -> tuple[str, ...]:
    path = folder / XTTS_SPEAKERS
    return tuple(map(str, load_pickled(path, device="meta"))) if path.is_file() else ()


def _languages(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The languages, looked up in the order of Coqui's `LanguageManager.init_from_config`."""
    if _setting(config, "use_language_embedding") and (
        path := _setting(config, "language_ids_file")
    ):
        return tuple(_table(path))
    if config.get("languages"):
        return tuple(map(str, config["languages"]))
    found = {str(each["language"]) for each in config.get("datasets") or () if each.get("language")}
    if not found and config.get("phoneme_language"):
        found = {str(config["phoneme_language"])}
    return tuple(sorted(found))
