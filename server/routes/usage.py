"""What was used, what it cost and saved, and how the budgets stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import Request

from engine.costs.usage_store import COUNTS, Counts
from engine.errors import InvalidRequest
from server.forms import query_fields
from server.keys.access import access_of
from server.router import Router
from server.schemas.usage import UsageQuery

if TYPE_CHECKING:
    from engine.engine import Engine

USAGE_PATH = "/v1/engine/usage"


def usage_router(engine: Engine) -> Router:
    """`GET /v1/engine/usage`: an admin sees all, a key its own."""
    router = Router("engine")

    @router.get(USAGE_PATH)
    async def usage(request: Request) -> dict[str, Any]:
        query = UsageQuery.of(query_fields(request))
        key, own = query.key, _own_key(request)
        if own is not None:
            if key not in (None, own):
                raise InvalidRequest("A key sees its own usage only.", param="key", status=403)
            key = own
        groups = await engine.accounts.report(query.by, query.since, query.until, key)
        return {
            "object": "list",
            "by": query.by,
            "since": query.since,
            "until": query.until,
            "data": [_document(query.by, group, counts) for group, counts in groups],
            "total": _document((), (), _total([counts for _, counts in groups])),
            "budgets": [asdict(status) for status in engine.accounts.budgets(key)],
        }

    return router


def _own_key(request: Request) -> str | None:
    """The key to whose usage the caller is limited; None: all."""
    access = access_of(request)
    return None if access.admin else access.caller.name


def _document(by: Sequence[str], group: Sequence[str], counts: Counts) -> dict[str, Any]:
    return {**dict(zip(by, group, strict=True)), **dict(zip(COUNTS, counts, strict=True))}


def _total(every: Sequence[Counts]) -> Counts:
    return tuple(map(sum, zip(*every, strict=True))) if every else (0,) * len(COUNTS)
