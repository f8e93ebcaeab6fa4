"""`roundhouse schema`: the JSON Schema of the configuration file."""

from __future__ import annotations

import sys

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(schema)


def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors and checks."""
    from server.config_schema import schema_text

    sys.stdout.write(schema_text())
