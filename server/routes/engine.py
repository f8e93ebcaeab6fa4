"""The engine itself: what it holds, would do and did, and the orders an admin may give."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from engine.errors import InvalidRequest
from engine.requests import Priority
from server.auth import PLAN_PATH
from server.body import read_object
from server.documents import engine_document, events_document, model_document
from server.event_stream import EventsResponse
from server.forms import Fields
from server.schemas.engine import EventsQuery, PlanBody
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine

LAST_EVENT_ID = "last-event-id"


def engine_router(engine: Engine, settings: ServerSettings) -> APIRouter:
    """`/v1/engine`: status, `plan`, `events`, and orders to a model.

    An order, `POST /v1/engine/models/{id}/load|unload|park|pin|unpin`, answers with the model as it
    is once the order is carried out.
    """
    router = APIRouter(tags=["engine"])

    def model(name: str) -> dict[str, Any]:
        return model_document(engine.model_status(name), name)

    @router.get("/v1/engine")
    async def status() -> dict[str, Any]:
        return engine_document(engine.status())

    @router.post(PLAN_PATH)
    async def plan(request: Request) -> dict[str, Any]:
        fields = Fields(await read_object(request, settings.max_body_bytes), typed=True)
        body = PlanBody.of(fields)
        forecast = await engine.plan(
            body.model,
            working_bytes=body.working_bytes,
            priority=body.priority or Priority.NORMAL,
        )
        return asdict(forecast)

    @router.get("/v1/engine/events", response_model=None)
    async def events(request: Request) -> Response | dict[str, Any]:
        query = EventsQuery.of(Fields(dict(request.query_params), typed=False))
        accepted = request.headers.get("accept", "")
        if query.stream or "text/event-stream" in accepted:
            return EventsResponse(engine.events, _begin(request, query))
        page = engine.events.after(query.after or 0)
        return events_document(page, query.limit, newest=query.after is None)

    @router.post("/v1/engine/models/{name:path}/load")
    async def load(name: str) -> dict[str, Any]:
        await engine.load(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/unload")
    async def unload(name: str) -> dict[str, Any]:
        await engine.unload(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/park")
    async def park(name: str) -> dict[str, Any]:
        await engine.park(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/pin")
    async def pin(name: str) -> dict[str, Any]:
        engine.pin(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        engine.unpin(name)
        return model(name)

    return router


def _begin(request: Request, query: EventsQuery) -> int | None:
    """The id to go on after: what a reconnecting client names goes before the query."""
    named = request.headers.get(LAST_EVENT_ID)
    if named is None:
        return query.after
    if not (named.isascii() and named.isdecimal() and len(named) <= 18):
        raise InvalidRequest("It is not the id of an event.", param=LAST_EVENT_ID)
    return int(named)
