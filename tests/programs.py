"""Programs that stand in for others."""

from __future__ import annotations

from pathlib import Path


def write_program(path: Path, script: str) -> None:
    """A script for the shell, to be run by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
