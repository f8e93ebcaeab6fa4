"""The engine's status, its plan for a request, its events, and the actions of an admin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from engine.errors import InvalidRequest, ModelForbidden, ModelNotFound
from engine.requests import Priority
from server.auth import PLAN_PATH
from server.connection import ConnectedResponse
from server.documents import engine_document, events_document, model_document
from server.event_stream import send_events
from server.forms import query_fields, read_json
from server.keys.access import access_of
from server.response_cache.cache import ResponseCache
from server.router import Router
from server.schemas.engine import EventsQuery, PlanBody
from server.settings import CACHE_OFF, ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine

CACHE_PATH = "/v1/engine/cache"
LAST_EVENT_ID = "last-event-id"


def engine_router(
    engine: Engine, settings: ServerSettings, cache: ResponseCache | None = None
) -> Router:
    """`/v1/engine`: status, `plan`, `events`, the response cache, and actions on a model.

    An action, `POST /v1/engine/models/{id}/load|unload|park|pin|unpin`, answers with the model
    after the action.
    """
    router = Router("engine")

    @router.get("/v1/engine")
    async def status() -> dict[str, Any]:
        return engine_document(engine.status())

    @router.post(PLAN_PATH)
    async def plan(request: Request) -> dict[str, Any]:
        body = PlanBody.of(await read_json(request, settings.max_body_bytes))
        access = access_of(request)
        access.check_model(body.model)
        engine.config.find(body.model)
        for index, name in enumerate(body.further_models):
            try:
                access.check_model(name)
                engine.config.find(name)
            except (ModelForbidden, ModelNotFound) as error:
                error.param = f"further_models[{index}]"
                raise
        forecast = await engine.plan(
            body.model,
            further_models=body.further_models,
            working_bytes=body.working_bytes,
            priority=body.priority or Priority.NORMAL,
        )
        return asdict(forecast)

    @router.get("/v1/engine/events")
    async def events(request: Request) -> Response | dict[str, Any]:
        query = EventsQuery.of(query_fields(request))
        accepted = request.headers.get("accept", "")
        if query.stream or "text/event-stream" in accepted:
            return ConnectedResponse(partial(send_events, engine.events, _begin(request, query)))
        page = engine.events.after(query.after or 0)
        return events_document(page, query.limit, newest=query.after is None)

    @router.get(CACHE_PATH)
    async def cache_status() -> dict[str, Any]:
        return {"store": CACHE_OFF} if cache is None else cache.document()

    @router.delete(CACHE_PATH)
    async def clear_cache() -> dict[str, Any]:
        return {"removed_entries": 0 if cache is None else await cache.clear()}

    def add(action: str, act: Callable[[str], Awaitable[None]]) -> None:
        async def endpoint(name: str) -> dict[str, Any]:
            await act(name)
            return model_document(engine.model_status(name), name)

        router.add(f"/v1/engine/models/{{name:path}}/{action}", endpoint, ["POST"], name=action)

    async def pin(name: str) -> None:
        engine.pin(name)

    async def unpin(name: str) -> None:
        engine.unpin(name)

    add("load", engine.load)
    add("unload", engine.unload)
    add("park", engine.park)
    add("pin", pin)
    add("unpin", unpin)
    return router


def _begin(request: Request, query: EventsQuery) -> int | None:
    """The id to continue after. The header of a client that reconnects goes before the query."""
    named = request.headers.get(LAST_EVENT_ID)
    if named is None:
        return query.after
    if not (named.isascii() and named.isdecimal() and len(named) <= 18):
        raise InvalidRequest("It is not the id of an event.", param=LAST_EVENT_ID)
    return int(named)
