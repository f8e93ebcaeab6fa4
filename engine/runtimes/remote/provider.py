"""A provider: its connections, and what is learned from each call for the next.

Retries are ours and not those of stamina. That draws its jitter from the global `random`, which
libraries of models draw from as well: a retry here would change what a seeded model gives. Beyond
that a wait here ends at a bound of the request, counts the limits of the provider, and is repeated
with another key after a 401.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx

from engine.errors import EngineError, InvalidRequest, ProviderBusy, ProviderFailed
from engine.runtimes.remote.breaker import Breaker, Passage
from engine.runtimes.remote.failures import Failure, of_error, of_status, of_timeout
from engine.runtimes.remote.latency import Latency
from engine.runtimes.remote.rate_limits import Taken
from engine.runtimes.remote.reply import Reply
from engine.runtimes.remote.target import Target
from engine.runtimes.remote.transport import new_client
from engine.status import ProviderModelStatus, ProviderStatus
from engine.tracing import AttemptTrace, Tracer

log = logging.getLogger(__name__)

FirstT = TypeVar("FirstT")

FIRST_BACKOFF_S = 0.5
"""Before the first retry; twice as long before each further one. Half of it is chance."""

WHOLE_FACTOR = 5.0
"""A whole answer comes when all work is done, so it has so many times longer than a stream."""

MOST_ERROR_BYTES = 2**16

SHORTEST_WAIT_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to a provider."""

    target: Target
    path: str
    """Below the base URL, or a whole URL without our key."""
    kind: str
    """Calls of one kind take about as long."""
    request_id: str
    streams: bool = False
    json: bytes | None = None
    form: Mapping[str, Any] | None = None
    files: Any = None
    """As httpx takes them."""
    anthropic: bool = False
    tokens: int = 0
    """What it will probably take of the limits."""
    on_left: Callable[[], None] | None = None
    """Told if the caller leaves while the provider works on its answer, and will bill it."""

    @property
    def is_foreign(self) -> bool:
        """Whether it goes to a whole URL, which is not told our key unless it is the provider's."""
        return self.path.startswith(("http://", "https://"))


class Answer(Generic[FirstT]):
    """An answer whose beginning is here. A context manager: its end is the end of the call."""

    def __init__(
        self,
        provider: Provider,
        call: Call,
        reply: Reply,
        first: FirstT,
        passage: Passage,
        taken: Taken,
        trace: AttemptTrace | None,
    ) -> None:
        self.first = first
        self._trace = trace
        self.reply = reply
        self._provider = provider
        self._call = call
        self._passage = passage
        self._taken = taken

    async def next(self) -> bytes | None:
        """The next piece of the body; None at its end.

        Raises:
            ProviderFailed: it breaks off, or pauses for too long.

        """
        try:
            return await self.reply.next()
        except Failure as failure:
            raise failure.error from failure.__cause__

    def count_tokens(self, tokens: int) -> None:
        """Correct what the call took of the limits."""
        self._taken.tokens = tokens

    async def __aenter__(self) -> Answer[FirstT]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._trace is not None:
            self._trace.ended(error)
        try:
            if isinstance(error, ProviderFailed):
                self._passage.failed()
                self._provider.note(self._call.target, error, "broken")
            else:  # whole, or its reader has left
                self._passage.succeeded()
                self._provider.outcomes["ok"] += 1
                if isinstance(error, EngineError):
                    hide_keys(self._call.target, error)
        finally:
            await self.reply.close()


@dataclass(slots=True)
class _Turn:
    """Where a request stands in its attempts."""

    attempt: int = 0
    waited_s: float = 0.0
    new_key: bool = False
    """The keys were read again after a 401."""
    sent: dict[str, str] = field(default_factory=dict)


class Provider:
    """All configured models of one provider share this."""

    def __init__(
        self,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        tracer: Tracer | None = None,
    ) -> None:
        """`clock` gives monotonic seconds. `sleep` waits for a retry or a limit."""
        self.name = name
        self._tracer = tracer
        self.breaker = Breaker(clock)
        self.outcomes: Counter[str] = Counter()
        self.retries = 0
        self.first_byte = Latency()
        self.last_error: str | None = None
        self.last_error_at: float | None = None
        """Unix seconds."""
        self.clock = clock
        self._sleep = sleep
        self._targets: dict[str, Target] = {}
        self._client: httpx.AsyncClient | None = None
        self._opening = asyncio.Lock()
        self._random = random.Random()

    def target(self, model_id: str) -> Target | None:
        """A model that was here before."""
        return self._targets.get(model_id)

    def add(self, target: Target) -> Target:
        """Take a model."""
        self._targets[target.model_id] = target
        return target

    async def open(self) -> None:
        """Make the pool of connections, unless it is there. Nothing is connected yet."""
        async with self._opening:
            if self._client is None:
                self._client = await asyncio.to_thread(new_client, self._may_be_private)

    async def close(self) -> None:
        """Close every connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def answer(
        self, call: Call, start: Callable[[Reply], Awaitable[FirstT]]
    ) -> Answer[FirstT]:
        """Send a request until `start` has read the beginning of its answer.

        What fails before that is tried again if it may pass. Nothing was handed on by then.

        Raises:
            InvalidRequest: the provider says that the request is wrong.
            ProviderBusy: the breaker is open, or a limit is reached for longer than one waits.
            ProviderFailed: there was no answer, none in time, or none that can be read.

        """
        turn = _Turn()
        while True:
            if not call.is_foreign:
                await self._wait_for_limits(call, turn)
            passage = self.breaker.let_through()
            if passage is None:
                self.outcomes["refused"] += 1
                raise ProviderBusy(
                    f"The provider {self.name!r} has lately failed, and is not asked for now.",
                    retry_after_s=max(1.0, self.breaker.refused_s),
                )
            taken = Taken(0.0, 0) if call.is_foreign else call.target.limits.take(call.tokens)
            try:
                return await self._attempt(call, start, passage, taken, turn)
            except Failure as failure:
                if failure.alive:
                    passage.succeeded()
                else:
                    passage.failed()
                if not await self._may_try_again(call, failure, turn):
                    raise self._told(call, failure) from failure.__cause__
            except BaseException as error:
                passage.abandoned()
                if call.on_left is not None and isinstance(error, asyncio.CancelledError):
                    call.on_left()
                raise

    async def _attempt(
        self,
        call: Call,
        start: Callable[[Reply], Awaitable[FirstT]],
        passage: Passage,
        taken: Taken,
        turn: _Turn,
    ) -> Answer[FirstT]:
        request = self._request(call, turn)
        trace = None
        if self._tracer is not None and not call.is_foreign:
            trace = self._tracer.attempt(self.name, call.target.model_id, turn.attempt)
            request.headers.update(trace.headers)
        options, latency = call.target.options, call.target.latencies[call.kind]
        least_s = options.least_timeout_s * (1.0 if call.streams else WHOLE_FACTOR)
        limit_s = latency.timeout_s(least_s, options.timeout_s)
        began_s = self.clock()
        reply: Reply | None = None
        try:
            async with asyncio.timeout(limit_s):
                assert self._client is not None
                response = await self._client.send(request, stream=True)
                reply = Reply(response, self.name, options.max_answer)
                if trace is not None:
                    trace.answered(response.status_code)
                call.target.limits.read(response.headers)
                if not response.is_success:
                    raise await self._refusal(response, reply)
                first = await start(reply)
        except BaseException as error:
            if trace is not None:
                trace.ended(error)
            if reply is not None:
                await reply.close()
            if isinstance(error, TimeoutError):
                latency.add(limit_s)
            failure = self._failure(error, limit_s, begun=reply is not None)
            if failure is None or failure is error:
                raise
            raise failure from error
        seconds = self.clock() - began_s
        latency.add(seconds)
        self.first_byte.add(seconds)
        passage.answered()
        reply.idle_s = options.idle_timeout_s
        return Answer(self, call, reply, first, passage, taken, trace)

    def _request(self, call: Call, turn: _Turn) -> httpx.Request:
        assert self._client is not None
        target = call.target
        timeout = {"timeout": {"connect": target.options.connect_timeout_s}}
        if call.is_foreign:  # a file that an answer names; it is read without our key
            return self._client.build_request("GET", call.path, extensions=timeout)
        turn.sent = target.headers(anthropic=call.anthropic)
        headers = {**turn.sent, "x-request-id": call.request_id}
        if call.streams:
            headers |= {"accept-encoding": "identity"}  # compressed, events would wait for others
        if call.json is not None:
            headers |= {"content-type": "application/json"}
        return self._client.build_request(
            "POST",
            target.address.join(call.path),
            headers=headers,
            content=call.json,
            data=call.form,
            files=call.files,
            extensions=timeout,
        )

    async def _refusal(self, response: httpx.Response, reply: Reply) -> Failure:
        host = None
        if response.is_redirect:
            host = urlsplit(response.headers.get("location", "")).hostname
        body = await reply.beginning(MOST_ERROR_BYTES)
        return of_status(self.name, response.status_code, response.headers, body, host)

    def _failure(self, error: BaseException, limit_s: float, *, begun: bool) -> Failure | None:
        """The failure that an error is; None: it is none of the provider's."""
        match error:
            case Failure():
                return error
            case TimeoutError():
                return of_timeout(self.name, "did not answer", limit_s)
            case httpx.HTTPError() | httpx.InvalidURL():
                return of_error(self.name, error, begun=begun)
            case ProviderFailed():  # the beginning of the answer cannot be read
                return Failure(error, retry=True)
            case InvalidRequest() | ProviderBusy():
                return Failure(error, alive=True)
        return None

    async def _wait_for_limits(self, call: Call, turn: _Turn) -> None:
        limits, most_s = call.target.limits, call.target.options.max_wait_s
        while (wait_s := limits.wait_s(call.tokens)) > 0:
            wait_s = max(wait_s, SHORTEST_WAIT_S)
            if turn.waited_s + wait_s > most_s:
                self.outcomes["refused"] += 1
                raise ProviderBusy(
                    f"The limits of the provider {self.name!r} are reached.", retry_after_s=wait_s
                )
            turn.waited_s += wait_s
            await self._sleep(wait_s)

    async def _may_try_again(self, call: Call, failure: Failure, turn: _Turn) -> bool:
        """Wait until the call may be repeated; False: it may not be."""
        target, error = call.target, failure.error
        if failure.status == 401 and not turn.new_key:
            turn.new_key = True
            # The file of the key may have been replaced within a tick of its time.
            return target.headers(anthropic=call.anthropic, again=True) != turn.sent
        if isinstance(error, ProviderBusy) and (failure.after_s or not failure.retry):
            target.limits.block(error.retry_after_s)
        if not failure.retry or turn.attempt >= target.options.retries:
            return False
        backoff_s = FIRST_BACKOFF_S * 2**turn.attempt * (0.5 + self._random.random() / 2)
        wait_s = backoff_s if failure.after_s is None else failure.after_s + backoff_s / 4
        if turn.waited_s + wait_s > target.options.max_wait_s:
            return False
        turn.attempt += 1
        turn.waited_s += wait_s
        self.retries += 1
        log.info("%s: trying again in %.1f s: %s", self.name, wait_s, target.hide(str(failure)))
        await self._sleep(wait_s)
        return True

    def _told(self, call: Call, failure: Failure) -> EngineError:
        """The error of a request that has failed for good."""
        error = failure.error
        if isinstance(error, ProviderFailed):
            self.note(call.target, error, "failed")
        else:
            self.outcomes["busy" if isinstance(error, ProviderBusy) else "invalid"] += 1
            hide_keys(call.target, error)
        return error

    def note(self, target: Target, error: ProviderFailed, outcome: str) -> None:
        """Remember a failure. Our keys are taken out of its message."""
        hide_keys(target, error)
        self.outcomes[outcome] += 1
        self.last_error, self.last_error_at = error.message, time.time()
        log.warning("%s: %s", target.model_id, error.message)

    def cannot_load(self, reason: str) -> None:
        """Remember that a model has no key."""
        self.last_error, self.last_error_at = reason, time.time()

    def _may_be_private(self, host: str) -> bool:
        return any(each.options.private and each.is_own(host) for each in self._targets.values())

    @property
    def status(self) -> ProviderStatus:
        """How it is, at this moment."""
        models = []
        for target in self._targets.values():
            left = target.limits.left
            models.append(
                ProviderModelStatus(target.model_id, left.requests, left.tokens, left.blocked_s)
            )
        return ProviderStatus(
            provider=self.name,
            breaker=self.breaker.state.value,
            retry_after_s=self.breaker.refused_s,
            error_rate=self.breaker.error_rate,
            first_byte_p50_s=self.first_byte.percentile(0.5),
            first_byte_p95_s=self.first_byte.percentile(0.95),
            last_error=self.last_error,
            last_error_at=self.last_error_at,
            models=tuple(models),
        )


def hide_keys(target: Target, error: EngineError) -> None:
    """Take our keys out of the message of an error."""
    error.message = target.hide(error.message)
    error.args = (error.message,)
