"""What each measurement is given: a configuration, and whether its models are small."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.config import EngineConfig, engine_config, engine_fields, read_sections
from engine.runtimes.registry import RUNTIMES


def arguments(description: str | None) -> argparse.Namespace:
    """The command line: `config`, and `small`."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--small", action="store_true")
    size.add_argument("--real", action="store_true")
    return parser.parse_args()


def read(path: Path) -> EngineConfig:
    """The configuration of a step."""
    return engine_config(
        read_sections(path, {}, {"engine": engine_fields(), "server": ["port"]}), RUNTIMES
    )
