"""Names that follow a formula, written in one line: `layers.{0..27}.{q,k}_proj.weight`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

_GROUP = re.compile(r"\{([^{}]*)\}")


def expand(pattern: str) -> Iterator[str]:
    """Every name of a pattern. `{0..27}` counts, `{a,b}` lists; groups are combined."""
    pieces = _GROUP.split(pattern)
    for chosen in product(*(_choices(group) for group in pieces[1::2])):
        filled = [*chosen, ""]
        yield "".join(text + value for text, value in zip(pieces[::2], filled, strict=True))


def _choices(group: str) -> list[str]:
    first, counts, last = group.partition("..")
    if counts:
        return [str(number) for number in range(int(first), int(last) + 1)]
    return group.split(",")
