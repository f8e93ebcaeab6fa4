"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.config import ENV_CONFIG

ConfigFile = Annotated[Path | None, typer.Option(envvar=ENV_CONFIG, help="The configuration file.")]

ApiKey = Annotated[
    str | None,
    typer.Option(envvar="ROUNDHOUSE_API_KEYS", help="An API key. Of a list the first is used."),
]


def first_key(api_key: str | None) -> str | None:
    """The first key of a list separated by commas; None if there is none."""
    return (api_key or "").split(",")[0].strip() or None
