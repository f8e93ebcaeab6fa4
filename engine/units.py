"""Byte sizes and durations as people write them in a configuration."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*$", re.IGNORECASE)
_SIZE_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "ki": 2**10, "kib": 2**10,
    "m": 10**6, "mb": 10**6, "mi": 2**20, "mib": 2**20,
    "g": 10**9, "gb": 10**9, "gi": 2**30, "gib": 2**30,
    "t": 10**12, "tb": 10**12, "ti": 2**40, "tib": 2**40,
}  # fmt: skip
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*$", re.IGNORECASE)
_DURATION_PARTS = re.compile(r"^\s*(?:\d+(?:\.\d+)?(?:ms|s|m|h|d)\s*){2,}$", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.IGNORECASE)
_DURATION_FACTORS = {None: 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: object) -> int:
    """Bytes from `1048576`, `"64MiB"` (binary) or `"8GB"` (decimal).

    Raises:
        ValueError: not a size, or negative.

    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a size cannot be negative")
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r:.100} is not a size; write bytes or e.g. 512MiB, 8GiB")
    return int(float(match[1]) * _SIZE_FACTORS[match[2].lower()])


def parse_duration(value: object) -> float:
    """Seconds from `300`, `"90s"`, `"5m"`, `"1h30m"`; `"forever"` is infinity.

    Raises:
        ValueError: not a duration, or negative.

    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not value >= 0:
            raise ValueError("a duration cannot be negative")
        return float(value)
    if isinstance(value, str) and value.strip().lower() == "forever":
        return math.inf
    if isinstance(value, str) and _DURATION_PARTS.match(value):
        parts = _DURATION_PART.findall(value)
        return sum(float(number) * _DURATION_FACTORS[unit.lower()] for number, unit in parts)
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r:.100} is not a duration; write seconds, 5m, 1h or forever")
    return float(match[1]) * _DURATION_FACTORS[match[2].lower() if match[2] else None]


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """How much of a device may be used: an absolute size, or a share of all it has."""

    nbytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, value: object) -> MemoryBudget:
        """Read `"80%"`, or anything `parse_size` takes.

        Raises:
            ValueError: neither, or a share outside 1–100 %.

        """
        if isinstance(value, MemoryBudget):
            return value
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                share = float(value.strip()[:-1]) / 100
            except ValueError:
                raise ValueError(f"{value!r:.100} is not a percentage") from None
            if not 0.01 <= share <= 1:
                raise ValueError(f"{value!r:.100} is not between 1% and 100%")
            return cls(share=share)
        nbytes = parse_size(value)
        if nbytes == 0:
            raise ValueError("a budget of zero bytes can hold no model")
        return cls(nbytes=nbytes)

    def budget_bytes(self, total_bytes: int) -> int:
        """The bytes this budget means on a device of `total_bytes`."""
        if self.nbytes is not None:
            return min(self.nbytes, total_bytes)
        assert self.share is not None
        return int(self.share * total_bytes)


def format_size(nbytes: float) -> str:
    """`1536` → `1.5 KiB`, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def format_duration(seconds: float) -> str:
    """`90.4` → `90 s`, `1.24` → `1.2 s`, `2` → `2 s`, `0.0014` → `1.4 ms`, for people."""
    if seconds < 1:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds; `math.inf` for forever."""
Budget = Annotated[MemoryBudget, BeforeValidator(MemoryBudget.parse)]
