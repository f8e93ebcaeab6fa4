"""The HTTP application: routes and layers around one engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Lifespan

from engine.errors import ConfigError, EngineError
from engine.requests import TextRequest
from server.answer import stream_answer
from server.auth import Guard
from server.batches.batches import Batches
from server.batches.line_call import LineCalls, access_of_owner
from server.file_search.file_search import FileSearch
from server.keys.access import EVERYTHING
from server.keys.client_secrets import ClientSecrets
from server.keys.keyring import Keyring
from server.keys.watch import KeyWatch
from server.metrics import HttpMetrics
from server.request_context import RequestContext
from server.response_cache.cache import ResponseCache, open_cache
from server.responses.background import Background
from server.responses.exchange import Answer
from server.responses.keeper import Keeper
from server.responses.turn import Turn, Turns
from server.router import Router, no_route
from server.routes.batches import batches_router
from server.routes.conversations import conversations_router
from server.routes.docs import docs_router
from server.routes.engine import engine_router
from server.routes.images import images_router
from server.routes.models import models_router
from server.routes.probes import probes_router
from server.routes.responses import plain_responses_router, responses_router
from server.routes.route import route_router
from server.routes.stored_files import stored_files_router
from server.routes.text import events_of, text_router
from server.routes.uploads import uploads_router
from server.routes.usage import usage_router
from server.routes.vector_stores import vector_stores_router
from server.routes.videos import videos_router
from server.routes.web import web_router
from server.settings import ServerSettings
from server.start import Start
from server.stored_files.record import FileLimits
from server.stored_files.store import FileStore
from server.stored_files.uploads import Uploads
from server.tracing.open import open_tracing
from server.vector_stores.embedder import Embedder, Models
from server.vector_stores.stores import VectorStores

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.pictures import Pictures

logger = logging.getLogger(__name__)


class Application(FastAPI):
    """FastAPI's application with two layers: the context of a request, and the guard.

    Its own layers handle errors, which the context does here, and close what its routes leave open.
    The routes here are Starlette's.
    """

    def __init__(
        self,
        settings: ServerSettings,
        keyring: Keyring,
        secrets: ClientSecrets,
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
        self.router.default = no_route
        self.keyring = keyring
        self.requests = RequestContext(Guard(self.router, settings, keyring, secrets), metrics)
        self.outermost: ASGIApp = self.requests
        """What a request meets first: with tracing, the layer of its span."""

    def build_middleware_stack(self) -> ASGIApp:
        """The layers round the routes."""
        return self.outermost


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
    from server.routes.mcp import McpEndpoint
    from server.routes.ollama import ollama_router
    from server.routes.realtime import realtime_router
    from server.routes.speech import speech_router
    from server.routes.transcriptions import transcriptions_router
    from server.routes.voices import voices_router

    start = start or Start(engine)
    outputs = Outputs(engine.config)
    jobs = Jobs(engine, outputs)
    voices = VoiceStore(engine.config)
    cache = open_cache(engine, settings)
    pictures = Pictures(engine, settings)
    mcp = McpEndpoint(engine, outputs, settings, start)
    files = FileStore(engine.config.data_dir, FileLimits.of(settings))

    async def begin() -> None:
        """Open the stored files, without which nothing starts, and start the rest."""
        try:
            await asyncio.to_thread(files.open)
            await stores.start()
        except ConfigError as error:
            start.fail(error)
        else:
            start.begin(jobs, batches)
        watch.begin()
        if cache is not None:
            await cache.start()
        await kept.start()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as ends:
            # The last is called first, and each whatever became of the others.
            if tracing is not None:
                ends.push_async_callback(tracing.close)
            if cache is not None:
                ends.push_async_callback(cache.close)
            ends.push_async_callback(pictures.close)
            ends.callback(files.close)
            ends.push_async_callback(kept.close)
            ends.push_async_callback(watch.end)
            ends.push_async_callback(start.end)
            # These have requests of their own.
            ends.push_async_callback(stores.stop)
            ends.push_async_callback(kept.stop)
            ends.push_async_callback(mcp.close)
            await begin()
            yield

    metrics = HttpMetrics()
    cache_series = () if cache is None else (cache.registry,)
    keyring = Keyring(settings.configured_keys, engine.config)
    secrets = ClientSecrets()
    watch = KeyWatch(engine.config.data_dir, keyring)
    watch.load()
    keyring.hand_budgets(engine.accounts.set_key_budgets)
    memory = settings.vector_stores
    stores = VectorStores(
        engine.config.data_dir,
        memory,
        files,
        Embedder(engine, Models(memory.embedding_model, memory.rerank_model)),
        keyring.caller,
    )
    kept = _Kept(engine, settings, start, FileSearch(stores), keyring)
    app = Application(settings, keyring, secrets, metrics, lifespan)
    batches = Batches(
        engine,
        files,
        LineCalls(app, app.router, keyring, metrics),
        settings,
        partial(access_of_owner, keyring),
    )
    tracing = None
    if settings.otlp_endpoint is not None:
        tracing = open_tracing(settings.otlp_endpoint, engine)
        app.outermost = tracing.layer(app.requests)
    for router in (
        probes_router(engine, start, (metrics.registry, batches.metrics.registry, *cache_series)),
        text_router(engine, settings, pictures, cache),
        *kept.routers(pictures, cache),
        images_router(engine, outputs, settings, cache),
        videos_router(engine, jobs, settings),
        speech_router(engine, voices, settings, cache),
        transcriptions_router(engine, settings, cache),
        realtime_router(engine, voices, secrets, settings),
        voices_router(engine, voices, settings),
        models_router(engine),
        engine_router(engine, settings, cache),
        route_router(engine, settings, pictures),
        usage_router(engine),
        files_router(engine),
        stored_files_router(files),
        uploads_router(Uploads(files), settings),
        batches_router(batches, settings),
        vector_stores_router(stores, settings),
        ollama_router(engine, settings, pictures),
        mcp.router(),
        web_router(),
        docs_router(engine, settings),
    ):
        app.router.routes += router.routes
    return app


class _Kept:
    """Responses and conversations that are kept, unless the configuration says otherwise."""

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        start: Start,
        file_search: FileSearch,
        keyring: Keyring,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._ready = start.done
        self._keeper = Keeper(
            engine.config.data_dir, settings.responses_size, settings.responses_age
        )
        self._turns = Turns(self._keeper)
        self._file_search = file_search
        self._keyring = keyring
        self._background = Background(engine, self._turns, self._answer)
        self._resuming: asyncio.Task[None] | None = None

    def routers(self, pictures: Pictures, cache: ResponseCache | None) -> tuple[Router, ...]:
        """What answers for them."""
        if not self._settings.keep_responses:
            return (plain_responses_router(self._engine, self._settings, pictures, cache),)
        return (
            responses_router(
                self._engine,
                self._settings,
                pictures,
                cache,
                self._turns,
                self._background,
                self._file_search,
            ),
            conversations_router(self._settings, self._keeper),
        )

    async def start(self) -> None:
        """Open the store. Jobs of a former process go on once the engine has started."""
        if self._settings.keep_responses:
            await self._keeper.start()
            self._resuming = asyncio.create_task(self._resume())

    async def stop(self) -> None:
        """Stop the jobs. The engine may be stopped then."""
        if self._resuming is not None:
            self._resuming.cancel()
            await asyncio.wait((self._resuming,))
        await self._background.stop()

    async def close(self) -> None:
        """Close the store."""
        await self._keeper.close()

    def _answer(self, turn: Turn, request: TextRequest) -> Answer:
        """The answer to a request in the background, with what its key may do now."""
        name = request.scheduling.caller.name
        access = None
        if self._keyring.caller(name) is not None:
            access = self._keyring.named(name) or EVERYTHING

        def ask(asked: TextRequest) -> Answer:
            return partial(stream_answer, self._engine, asked, events_of, shows_wait=False)

        return self._file_search.answer(turn, request, ask, access)

    async def _resume(self) -> None:
        await self._ready.wait()
        try:
            await self._background.resume()
        except EngineError as error:
            logger.error("responses in the background cannot go on: %s", error)
