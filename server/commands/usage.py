"""`roundhouse usage`: what was used, what it cost, and how the budgets stand."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from server.commands.terminal import new_table

_NAMELESS = {"key": "(no key)", "provider": "(this machine)"}


def usage_tables(document: Mapping[str, Any]) -> Group:
    """A document of `GET /v1/engine/usage` for people."""
    by = document["by"]
    columns = ("requests", "failed", "tokens in", "cached", "tokens out", "GPU s", "cost", "saved")
    table = new_table(*by, *columns)
    for column in table.columns[len(by) :]:
        column.justify = "right"
    for row in document["data"]:
        table.add_row(*(escape(row[name]) or _NAMELESS.get(name, "") for name in by), *_cells(row))
    table.add_section()
    table.add_row("all", *[""] * (len(by) - 1), *_cells(document["total"]))
    parts = [table]
    if document["budgets"]:
        parts.append(_budgets(document["budgets"]))
    return Group(*parts)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['requests']:,}",
        f"{row['failures']:,}",
        f"{row['input_tokens']:,}",
        f"{row['cached_tokens']:,}",
        f"{row['output_tokens']:,}",
        f"{row['device_s']:,.1f}",
        dollars(row["cost"]),
        dollars(row["saved"]),
    ]


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
