"""The key of a request: equal for two requests if the answer to one is an answer to the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

from engine.caller import Caller
from server.forms import Fields

FORMAT = 1
"""Of keys and entries. Another number makes every kept answer a miss."""

LARGE = 4096
"""Characters from which a text counts by its digest. Hashing holds up no other thread, as writing
a text as JSON would."""

_SCALARS = frozenset({int, float, bool, type(None)})


def request_key(fields: Fields, *parts: object) -> bytes:
    """The SHA-256 of the fields, in canonical form, and of all `parts`, which are JSON."""
    large: list[object] = []
    tree = _without_large(fields.values, (), large)
    document = [FORMAT, *parts, fields.typed, tree, large]
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(_utf8(text)).digest()


def owner_of(caller: Caller, headers: Headers, *, has_keys: bool) -> tuple[str, ...]:
    """Whose answers a request may get: those of its caller, otherwise those of its key."""
    if caller.name:
        return ("name", caller.name)
    if not has_keys:
        return ()
    keys = [*headers.getlist("authorization"), *headers.getlist("x-api-key")]
    return ("key", *(hashlib.sha256(_utf8(key)).hexdigest() for key in keys))


def _without_large(value: Any, place: Sequence[str | int], large: list[object]) -> Any:
    """The value with null for each file and each long text. `large` gets both, with their place."""
    if isinstance(value, dict):
        return {name: _without_large(value[name], (*place, name), large) for name in sorted(value)}
    if isinstance(value, list):
        if _SCALARS.issuperset(map(type, value)):  # such as tokens, of which there may be a million
            return value
        return [_without_large(item, (*place, index), large) for index, item in enumerate(value)]
    if isinstance(value, bytes):
        large.append([place, "file", len(value), hashlib.sha256(value).hexdigest()])
        return None
    if isinstance(value, str) and len(value) > LARGE:
        large.append([place, "text", len(value), hashlib.sha256(_utf8(value)).hexdigest()])
        return None
    return value


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
