"""The terminal of a command: results go to standard output, errors to standard error."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.table import Column, Table

FILE_WIDTH = 250
"""Columns of what goes into a file or a pipe: whoever reads that wants whole words."""

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH)
err = Console(stderr=True)


def new_table(*columns: str) -> Table:
    """An empty table. In a narrow terminal its words are folded, and none is cut."""
    return Table(*(Column(name, overflow="fold") for name in columns))


def print_line(message: str) -> None:
    """Print a line of the result, without markup."""
    out.print(message, highlight=False, markup=False, soft_wrap=True)


def print_note(message: str) -> None:
    """Print a line that is not part of the result, without markup."""
    err.print(message, highlight=False, markup=False, soft_wrap=True)


def print_error(message: str) -> None:
    """Print an error, without markup."""
    print_note(f"roundhouse: {message}")


def exit_with(message: str, code: int) -> typer.Exit:
    """Print an error, and return the exception that ends the command with an exit status."""
    print_error(message)
    return typer.Exit(code)
