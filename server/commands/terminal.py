"""The terminal that a command talks to: results go to its output, complaints to its error."""

from __future__ import annotations

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_line(message: str) -> None:
    """Print a line of the result, as it is."""
    out.print(message, highlight=False, markup=False, soft_wrap=True)


def print_error(message: str) -> None:
    """Print what is wrong, as it is."""
    err.print(f"roundhouse: {message}", highlight=False, markup=False, soft_wrap=True)


def exit_with(message: str, code: int) -> typer.Exit:
    """Complain, and return what ends the command with that exit status when it is raised."""
    print_error(message)
    return typer.Exit(code)
