"""The engine's status and events as JSON."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from engine.route_config import RouteConfig
from engine.scheduling.event_log import LoggedEvent, Lost, Page
from engine.status import EngineStatus, ModelStatus
from engine.words import without_folders

OWNER = "roundhouse"


def engine_document(status: EngineStatus) -> dict[str, Any]:
    """The whole status, field by field. On the wire an endless duration is null.

    `ledger.foreign_bytes` is the former name of `ledger.external_bytes`, to be dropped in 0.2.
    """
    document = asdict(status)
    document["ledger"]["foreign_bytes"] = status.ledger.external_bytes
    return document


def model_document(
    status: ModelStatus,
    name: str,
    *,
    adapter: str | None = None,
    inputs: Collection[str] | None = None,
) -> dict[str, Any]:
    """OpenAI's model object with the id `name`, and the state of the model behind it.

    With an adapter, `parent` is the id of that model. `inputs` are what a request may hold.
    """
    own = asdict(status)
    created = own.pop("created")
    if status.last_error is not None:
        own["last_error"] = without_folders(status.last_error)
    return {
        **own,
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "alias_of": None if adapter is not None or name == status.id else status.id,
        "parent": None if adapter is None else status.id,
        "input_modalities": None if inputs is None else sorted(inputs),
    }


def route_document(route: RouteConfig) -> dict[str, Any]:
    """OpenAI's model object for a route."""
    return {
        "id": route.id,
        "object": "model",
        "created": 0,
        "owned_by": OWNER,
        "choose": list(route.choose),
    }


def event_document(logged: LoggedEvent) -> dict[str, Any]:
    """One event of the engine. `type` is its kind, `at` is Unix seconds."""
    event = logged.event
    return {
        "id": logged.id,
        "at": logged.at,
        "type": event.kind.value,
        "model": event.model,
        "reason": event.reason,
        "request_id": event.request_id,
        "granted_bytes": event.granted_bytes,
        "capacity_bytes": event.capacity_bytes,
    }


def lost_document(lost: Lost) -> dict[str, Any]:
    """The missing events. `count` is null if their number is unknown."""
    return {"type": "lost", "count": lost.count}


def events_document(page: Page, limit: int, *, newest: bool) -> dict[str, Any]:
    """The first `limit` events of a page, or the newest ones. The oldest comes first.

    The next call continues after `last_id`.
    """
    events = page.events[-limit:] if newest else page.events[:limit]
    return {
        "object": "list",
        "data": [event_document(event) for event in events],
        "has_more": not newest and len(events) < len(page.events),
        "last_id": events[-1].id if events else page.last_id,
        "lost": None if page.lost is None or newest else lost_document(page.lost),
    }
