"""The terminal of a command: results go to standard output, errors to standard error."""

from __future__ import annotations

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_line(message: str) -> None:
    """Print a line of the result, without markup."""
    out.print(message, highlight=False, markup=False, soft_wrap=True)


def print_error(message: str) -> None:
    """Print an error, without markup."""
    err.print(f"roundhouse: {message}", highlight=False, markup=False, soft_wrap=True)


def exit_with(message: str, code: int) -> typer.Exit:
    """Print an error, and return the exception that ends the command with an exit status."""
    print_error(message)
    return typer.Exit(code)
