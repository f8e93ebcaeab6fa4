"""Words of libraries and of clients, made fit for a message to a client."""

from __future__ import annotations

import re

_FOLDERS = re.compile(r"(?<![\w/:.#])/(?!v1/)(?:[\w.@+~-]+/)+(?=[\w.@+~-])")

MOST_ECHOED = 200
"""Characters of a client's own words that a message repeats."""


MOST_MESSAGE = 4000
"""Characters of a message to a client: some name every field of a schema."""


def without_folders(message: str) -> str:
    """The message with the last part of each absolute path only.

    Messages of libraries and of the system name files of this machine, which clients need not know.
    """
    return _FOLDERS.sub("", message)


def shortened(text: str, most: int = MOST_MESSAGE) -> str:
    """The text, or its beginning where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def echoed(value: object) -> str:
    """What a client sent, quoted for a message. It is cut, as it may be the whole body."""
    if isinstance(value, str) and len(value) > MOST_ECHOED:
        return f"{value[:MOST_ECHOED]!r}…"
    return shortened(repr(value), 2 * MOST_ECHOED)
