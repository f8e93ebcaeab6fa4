"""`/health`, `/ready`, `/ping` and `/metrics`: for load balancers, orchestrators, Prometheus.

`/health/providers` is for people. It needs a key, as it says with whom this server works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from engine.status import EngineState
from server.metrics import render
from server.router import Router

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.start import Start


def probes_router(engine: Engine, start: Start, registries: Sequence[CollectorRegistry]) -> Router:
    """`/health` (alive), `/ready` (takes work now), `/ping` (for RunPod), `/metrics`.

    `registries` are those of the server.
    """
    router = Router("probes")

    def takes_work() -> bool:
        return engine.state is EngineState.READY and start.done.is_set()

    def state(*, ok: bool) -> JSONResponse:
        return JSONResponse({"status": engine.state.value}, 200 if ok else 503)

    @router.route("/health", "GET", "HEAD")
    async def health() -> Response:
        return state(ok=start.error is None and await engine.check_alive())

    @router.route("/ready", "GET", "HEAD")
    async def ready() -> Response:
        return state(ok=takes_work())

    @router.route("/ping", "GET", "HEAD")
    async def ping() -> Response:
        # For RunPod 204 keeps a worker in "initializing", 200 lets it take requests, and any other
        # status removes it.
        starting = engine.state in (EngineState.STARTING, EngineState.READY)
        if starting and not start.done.is_set() and start.error is None:
            return Response(status_code=204)
        return state(ok=takes_work())

    @router.get("/health/providers")
    async def providers() -> dict[str, Any]:
        return {"object": "list", "data": [asdict(each) for each in engine.providers()]}

    @router.get("/metrics")
    async def scrape(request: Request) -> Response:
        body, content_type = render(
            (*registries, *engine.registries()), request.headers.get("accept", "")
        )
        return Response(body, media_type=content_type)

    return router
