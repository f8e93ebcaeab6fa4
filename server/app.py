"""The HTTP application: routes, layers and error handlers around one engine."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from engine.errors import EngineError, Overloaded
from server.auth import Guard
from server.errors import Failure
from server.metrics import HttpMetrics
from server.request_context import RequestContext
from server.routes.docs import docs_router
from server.routes.engine import engine_router
from server.routes.images import images_router
from server.routes.models import models_router
from server.routes.probes import probes_router
from server.routes.text import text_router
from server.routes.videos import videos_router
from server.routes.web import web_router
from server.settings import ServerSettings
from server.start import Start
from server.unserved import unserved

if TYPE_CHECKING:
    from engine.engine import Engine

logger = logging.getLogger(__name__)


def create_app(engine: Engine, settings: ServerSettings, start: Start | None = None) -> FastAPI:
    """The application. Its lifespan starts engine and jobs in the background and stops them.

    `start` reports a failed start to the caller.
    """
    # Imported here, as they bring numpy and PyAV: `roundhouse ps` need not wait for that (0.17 s).
    from engine.jobs.queue import Jobs
    from engine.media.outputs import Outputs
    from engine.media.voices import VoiceStore
    from server.routes.files import files_router
    from server.routes.speech import speech_router
    from server.routes.transcriptions import transcriptions_router
    from server.routes.voices import voices_router

    start = start or Start(engine)
    outputs = Outputs(engine.config)
    jobs = Jobs(engine, outputs)
    voices = VoiceStore(engine.config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        start.begin(jobs)
        try:
            yield
        finally:
            await start.end()

    metrics = HttpMetrics()
    app = FastAPI(
        title="Roundhouse",
        lifespan=lifespan,
        # Most routes read their bodies themselves, so FastAPI's document would say little, and its
        # pages load scripts from another host. `docs_router` has both.
        openapi_url=None,
        redirect_slashes=False,
    )
    for router in (
        probes_router(engine, start, metrics),
        text_router(engine, settings),
        images_router(engine, outputs, settings),
        videos_router(engine, jobs, settings),
        speech_router(engine, voices, settings),
        transcriptions_router(engine, settings),
        voices_router(engine, voices, settings),
        models_router(engine),
        engine_router(engine, settings),
        files_router(engine),
        web_router(),
        docs_router(engine, settings),
    ):
        app.router.routes += router.routes
    app.add_exception_handler(EngineError, _on_engine_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(RequestContext, metrics=metrics)  # added last: outermost
    return app


async def _on_engine_error(request: Request, error: Exception) -> Response:
    failure = Failure.of(error)
    if failure.status >= 500 and not isinstance(error, Overloaded):
        logger.error("request %s failed: %s", request.state.request_id, error)
    return failure.response(request.url.path, request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405) and error.detail == HTTPStatus(error.status_code).phrase:
        failure = unserved(request.scope, request.app.routes)
    else:
        failure = Failure.of_status(error.status_code, str(error.detail), error.headers or {})
    return failure.response(request.url.path, request.state.request_id)
