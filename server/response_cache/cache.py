"""The response cache: answers to requests that have one answer, kept for equal requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastapi import Request as HttpRequest
from prometheus_client import CollectorRegistry
from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError, InvalidRequest
from engine.requests import Request, SpeechRequest
from engine.words import echoed
from server.forms import Fields
from server.headers import CACHE_HEADER
from server.packages import installed_version
from server.response_cache.deterministic import MAX_UPLOAD_BYTES, is_deterministic, upload_bytes
from server.response_cache.entry import Entry
from server.response_cache.key import owner_of, request_key
from server.response_cache.outcome import CacheMetrics, Outcome
from server.response_cache.recorder import Recorder
from server.response_cache.sqlite_store import FILE_NAME, SqliteStore
from server.response_cache.store import Store
from server.response_cache.target import Loads, Target
from server.settings import CACHE_OFF, CACHE_SQLITE, ServerSettings, is_redis

if TYPE_CHECKING:
    from engine.engine import Engine

logger = logging.getLogger(__name__)

Answer: TypeAlias = Callable[[Send], Awaitable[Response | None]]
"""Sends an answer, or returns one to send. Raises what goes wrong before the answer begins."""


_ASKED = (Outcome.OFF, Outcome.REFRESH)
"""What a client may ask for in the header."""


@dataclass(frozen=True, slots=True)
class _Lookup:
    """A request whose answer may be kept."""

    key: bytes
    target: Target
    identity: tuple[str, ...]
    """The digest of each model, when the request came."""
    keeps: bool
    """Whether the answer may be kept: the models are what their files are."""


class ResponseCache:
    """Answers requests from a store, and keeps the answers of models in it.

    Two equal requests at once both run: none waits for the other.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, store: Store) -> None:
        self._engine = engine
        self._settings = settings
        self._store = store
        self._loads = Loads(engine.events)
        self._version = installed_version("roundhouse") or ""
        self._cleared = 0
        """How often it was emptied. An answer that began before is not kept."""
        self._metrics = CacheMetrics(store.kept)

    @property
    def registry(self) -> CollectorRegistry:
        """Its series."""
        return self._metrics.registry

    def answer(
        self, request: HttpRequest, fields: Fields, parsed: Request, answer: Answer, *, keeps: bool
    ) -> Answer:
        """`answer`, or one that first looks whether an equal request was answered before.

        `fields` are those of the request without its scheduling options. Without `keeps` an answer
        may be given only once.

        Raises:
            InvalidRequest: the header asks for something else than there is.

        """
        asked = _asked(request)
        if self._store.off_reason is not None:
            return answer
        if asked is Outcome.OFF:
            self._metrics.count(Outcome.OFF)
            return answer
        if not keeps:
            self._metrics.count(Outcome.UNCACHEABLE)
            return answer
        settings = self._settings
        owner = (
            ()
            if settings.response_cache_shared
            else owner_of(parsed.scheduling.caller, request.headers, has_keys=settings.has_keys)
        )
        return partial(self._send, fields, parsed, owner, asked is Outcome.REFRESH, answer)

    async def start(self) -> None:
        """Open the store."""
        await self._store.start()

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    async def clear(self) -> int:
        """Remove all answers; returns how many there were.

        Raises:
            EngineError: they could not be removed.

        """
        self._cleared += 1
        return await self._store.clear()

    def document(self) -> dict[str, Any]:
        """What it holds and did, as JSON."""
        kept = self._store.kept()
        redis = kept is None
        return {
            "store": self._store.kind,
            "off_reason": self._store.off_reason,
            "shared": self._settings.response_cache_shared,
            "entries": None if kept is None else kept.entries,
            "bytes": None if kept is None else kept.nbytes,
            "max_bytes": None if redis else self._settings.response_cache_size,
            "max_age_s": self._settings.response_cache_age,
            "requests": {outcome.value: count for outcome, count in self._metrics.counts.items()},
        }

    async def _send(
        self,
        fields: Fields,
        parsed: Request,
        owner: tuple[str, ...],
        refresh: bool,
        answer: Answer,
        send: Send,
    ) -> Response | None:
        lookup = await self._lookup(fields, parsed, owner)
        if lookup is None:
            self._metrics.count(Outcome.UNCACHEABLE)
            return await answer(send)
        entry = None if refresh else await self._store.get(lookup.key)
        if entry is not None:
            self._metrics.count(Outcome.HIT)
            return await entry.send({CACHE_HEADER: Outcome.HIT.value}, send)
        outcome = Outcome.REFRESH if refresh else Outcome.MISS
        self._metrics.count(outcome)
        if not lookup.keeps:
            return await answer(send)
        recorder = Recorder(
            send,
            outcome.value,
            self._store.max_entry_bytes,
            partial(self._keep, lookup, self._cleared),
        )
        response = await answer(recorder)
        return None if response is None else recorder.whole(response)

    async def _lookup(
        self, fields: Fields, parsed: Request, owner: tuple[str, ...]
    ) -> _Lookup | None:
        """What to look for; None if the request has more than one answer."""
        target = Target.of(self._engine.config, parsed.model)
        if target is None:
            return None
        if not fields.typed and upload_bytes(fields.values) > MAX_UPLOAD_BYTES:
            return None
        try:
            found = await asyncio.to_thread(self._key, target, fields, parsed, owner)
        except (EngineError, OSError) as error:
            # The model cannot be told apart from what it was. Its answer, or its error, is its own.
            logger.debug("%s: %s", parsed.model, error)
            return None
        if found is None:
            return None
        key, identities = found
        keeps = all(
            self._loads.is_current(self._engine.model_status(model.id), identity, parsed)
            for model, identity in zip(target.models, identities, strict=True)
        )
        return _Lookup(key, target, tuple(each.digest for each in identities), keeps)

    def _key(self, target: Target, fields: Fields, parsed: Request, owner: tuple[str, ...]) -> Any:
        """The key and the identities; None if the request has more than one answer.

        On a thread: it reads the disk, and a body may have megabytes.
        """
        if not is_deterministic(parsed, target.models):
            return None
        identities = target.identities(self._engine.config.cache_dir)
        route = None
        if target.route is not None:
            # What a route takes may depend on the tier of the caller.
            route = [target.route.model_dump(mode="json"), parsed.scheduling.caller.tier]
        voice = parsed.voice_sample if isinstance(parsed, SpeechRequest) else None
        key = request_key(
            fields,
            self._version,
            parsed.operation.value,
            owner,
            [each.digest for each in identities],
            route,
            None if voice is None else str(voice),
        )
        return key, identities

    def _keep(self, lookup: _Lookup, cleared: int, entry: Entry) -> None:
        target = lookup.target
        if cleared != self._cleared or not target.answered(entry):
            return
        whole = Entry(
            entry.status, {**entry.headers, **target.headers()}, entry.pieces, entry.streamed
        )
        cache_dir = self._engine.config.cache_dir

        def encode() -> bytes | None:
            try:
                now = tuple(each.digest for each in target.identities(cache_dir))
            except (EngineError, OSError):
                return None
            # Newer files came while it ran: nobody knows which of them the model has.
            return whole.encode(lookup.key) if now == lookup.identity else None

        self._store.put(lookup.key, whole.nbytes, encode)


def open_cache(engine: Engine, settings: ServerSettings) -> ResponseCache | None:
    """The configured cache; None if it is off.

    Raises:
        ConfigError: it is in Redis, and the package or the address is wrong.

    """
    where, max_age_s = settings.response_cache, settings.response_cache_age
    if where == CACHE_OFF:
        return None
    if is_redis(where):
        # Imported here: it needs a package that others need not have.
        from server.response_cache.redis_store import RedisStore

        return ResponseCache(engine, settings, RedisStore(where, max_age_s))
    path = engine.config.cache_dir / FILE_NAME if where == CACHE_SQLITE else Path(where)
    store = SqliteStore(path.expanduser(), settings.response_cache_size, max_age_s)
    return ResponseCache(engine, settings, store)


def cached(
    cache: ResponseCache | None,
    request: HttpRequest,
    fields: Fields,
    parsed: Request,
    answer: Answer,
    *,
    keeps: bool = True,
) -> Answer:
    """`answer` through the cache, if there is one.

    Raises:
        InvalidRequest: see `ResponseCache.answer`.

    """
    if cache is None:
        return answer
    return cache.answer(request, fields, parsed, answer, keeps=keeps)


def _asked(request: HttpRequest) -> Outcome | None:
    text = request.headers.get(CACHE_HEADER)
    if text is None:
        return None
    for outcome in _ASKED:
        if text.strip().lower() == outcome.value:
            return outcome
    raise InvalidRequest(
        f"{CACHE_HEADER}: it is off or refresh, not {echoed(text)}.", param=CACHE_HEADER
    )
