"""The HTTP application: routes and layers around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Lifespan

from server.auth import Guard
from server.keys.keyring import Keyring
from server.keys.watch import KeyWatch
from server.metrics import HttpMetrics
from server.request_context import RequestContext
from server.response_cache.cache import open_cache
from server.routes.docs import docs_router
from server.routes.engine import engine_router
from server.routes.images import images_router
from server.routes.models import models_router
from server.routes.probes import probes_router
from server.routes.route import route_router
from server.routes.text import text_router
from server.routes.usage import usage_router
from server.routes.videos import videos_router
from server.routes.web import web_router
from server.settings import ServerSettings
from server.start import Start

if TYPE_CHECKING:
    from engine.engine import Engine


class Application(FastAPI):
    """FastAPI's application with two layers: the context of a request, and the guard.

    Its own layers handle errors, which the context does here, and close what its routes leave open.
    The routes here are Starlette's.
    """

    def __init__(
        self,
        settings: ServerSettings,
        keyring: Keyring,
        metrics: HttpMetrics,
        lifespan: Lifespan[FastAPI],
    ) -> None:
        super().__init__(
            title="Roundhouse",
            lifespan=lifespan,
            # Most routes read their bodies themselves, so FastAPI's document would say little, and
            # its pages load scripts from another host. `docs_router` has both.
            openapi_url=None,
            redirect_slashes=False,
        )
        self.keyring = keyring
        self.requests = RequestContext(Guard(self.router, settings, keyring), metrics)

    def build_middleware_stack(self) -> ASGIApp:
        """The layers round the routes."""
        return self.requests


def create_app(engine: Engine, settings: ServerSettings, start: Start | None = None) -> Application:
    """The application. Its lifespan starts engine and jobs in the background and stops them.

    `start` reports a failed start to the caller.

    Raises:
        ConfigError: the store of keys cannot be used.

    """
    # Imported here, as they bring numpy and PyAV: `roundhouse ps` need not wait for that (0.17 s).
    from engine.jobs.queue import Jobs
    from engine.media.outputs import Outputs
    from engine.media.voices import VoiceStore
    from server.pictures import Pictures
    from server.routes.files import files_router
    from server.routes.ollama import ollama_router
    from server.routes.speech import speech_router
    from server.routes.transcriptions import transcriptions_router
    from server.routes.voices import voices_router

    start = start or Start(engine)
    outputs = Outputs(engine.config)
    jobs = Jobs(engine, outputs)
    voices = VoiceStore(engine.config)
    cache = open_cache(engine, settings)
    pictures = Pictures(engine, settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        start.begin(jobs)
        watch.begin()
        try:
            if cache is not None:
                await cache.start()
            yield
        finally:
            try:
                await start.end()
            finally:
                await watch.end()
            await pictures.close()
            if cache is not None:
                await cache.close()

    metrics = HttpMetrics()
    cache_series = () if cache is None else (cache.registry,)
    keyring = Keyring(settings.configured_keys, engine.config)
    watch = KeyWatch(engine.config.data_dir, keyring)
    watch.load()
    keyring.hand_budgets(engine.accounts.set_key_budgets)
    app = Application(settings, keyring, metrics, lifespan)
    for router in (
        probes_router(engine, start, (metrics.registry, *cache_series)),
        text_router(engine, settings, pictures, cache),
        images_router(engine, outputs, settings, cache),
        videos_router(engine, jobs, settings),
        speech_router(engine, voices, settings, cache),
        transcriptions_router(engine, settings, cache),
        voices_router(engine, voices, settings),
        models_router(engine),
        engine_router(engine, settings, cache),
        route_router(engine, settings, pictures),
        usage_router(engine),
        files_router(engine),
        ollama_router(engine, settings, pictures),
        web_router(),
        docs_router(engine, settings),
    ):
        app.router.routes += router.routes
    return app
