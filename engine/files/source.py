"""What a model's `source` names: a hub repository, a local folder, or a model built here."""

from __future__ import annotations

import re
from pathlib import Path


def is_repo(source: str) -> bool:
    """Whether a model's source is a repository of a hub, and no folder or starter model."""
    if source.startswith(("/", ".", "~", "starter:")) or Path(source).is_dir():
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None
