"""The JSON files of starter models."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: Path, value: object) -> None:
    """Write a document as the hub's repositories do: two spaces, letters beyond ASCII unescaped.

    Raises:
        OSError: the file cannot be written.

    """
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
