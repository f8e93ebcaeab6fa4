"""`roundhouse usage`: what was used, what it cost, and how the budgets stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from server.commands.terminal import new_table

_NAMELESS = {"key": "(no key)", "provider": "(this machine)"}


_COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "requests": ("requests", "{:,}".format),
    "failures": ("failed", "{:,}".format),
    "input_tokens": ("tokens in", "{:,}".format),
    "cached_tokens": ("cached", "{:,}".format),
    "output_tokens": ("tokens out", "{:,}".format),
    "device_s": ("GPU s", "{:,.1f}".format),
    "cost": ("cost", lambda amount: dollars(amount)),
    "saved": ("saved", lambda amount: dollars(amount)),
}
"""The title of each count, and how it is written."""

_ALWAYS = ("requests", "cost")


def usage_tables(document: Mapping[str, Any]) -> Group:
    """A document of `GET /v1/engine/usage` for people. Counts of which there are none stay away."""
    by, total = document["by"], document["total"]
    shown = {key: way for key, way in _COLUMNS.items() if key in _ALWAYS or total[key]}
    table = new_table(*by, *(title for title, _ in shown.values()))
    for column in table.columns[len(by) :]:
        column.justify = "right"

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [write(row[key]) for key, (_, write) in shown.items()]

    for row in document["data"]:
        table.add_row(*(escape(row[name]) or _NAMELESS.get(name, "") for name in by), *cells(row))
    table.add_section()
    table.add_row("all", *[""] * (len(by) - 1), *cells(total))
    parts = [table]
    if document["budgets"]:
        parts.append(_budgets(document["budgets"]))
    return Group(*parts)


def _budgets(budgets: list[dict[str, Any]]) -> Table:
    table = new_table("budget", "period", "spent", "reserved", "limit", "used", "then", "until")
    for each in budgets:
        whose = [f"key {each['key']}" if each["key"] is not None else ""]
        whose.append(f"provider {each['provider']}" if each["provider"] is not None else "")
        limit = each["limit"]
        table.add_row(
            escape(", ".join(filter(None, whose))) or "all",
            each["period"],
            dollars(each["spent"]),
            dollars(each["reserved"]),
            dollars(limit),
            f"{each['spent'] / limit:.0%}" if limit else "",
            each["when_spent"],
            f"{datetime.fromtimestamp(each['ends_at'], UTC):%Y-%m-%d %H:%M} UTC",
        )
    return table


def dollars(amount: float) -> str:
    """Dollars with cents, or with as many digits as a small amount needs."""
    digits = 2 if amount == 0 or abs(amount) >= 0.1 else 4 if abs(amount) >= 0.001 else 6
    sign = "-" if amount < 0 else ""
    return f"{sign}${abs(amount):,.{digits}f}"
