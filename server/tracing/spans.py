"""Spans of requests on their way through the engine.

Their attributes are those of OpenTelemetry's GenAI conventions, and some of our own.

```
POST /v1/chat/completions           the request (`server.tracing.layer`)
└─ chat small                       from its arrival in the engine to its last event
   ├─ queue                         until its model was granted
   │  ├─ unload other               what made room for it
   │  └─ load small
   ├─ POST openai                   an attempt at a provider
   └─ run                           with tokens, finish reason and device seconds
```

No attribute holds a prompt, an answer or a key.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.errors import EngineError
from engine.events import Document, Event, Frame
from engine.requests import READING, Operation, Request, TextOperation, TextRequest
from engine.status import ModelStatus
from engine.tracing import AttemptTrace, Granted, RequestTrace
from engine.usage import Usage

MOST_TRANSITIONS = 256
MOST_REMEMBERED = 1024
"""Jobs whose request is known."""

_BEGINS = {"load": "load", "wake": "wake", "park": "park", "unload": "unload"}
_ENDS = {
    "loaded": "load",
    "load_failed": "load",
    "woken": "wake",
    "wake_failed": "wake",
    "parked": "park",
    "unloaded": "unload",
}
_FROM = {"load": "disk", "wake": "host"}
_MAKES_ROOM = ("park", "unload")
_FINISH = re.compile(r'"(?:finish_reason|stop_reason)":\s*"(\w+)"')
_OPERATIONS: Mapping[Operation, str] = {
    TextOperation.COMPLETION: "text_completion",
    TextOperation.RESPONSES: "chat",
    TextOperation.MESSAGES: "chat",
}
"""The conventions' names; every other operation has its own."""

PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(slots=True)
class Transition:
    """A model on its way onto the device or off it."""

    kind: str
    model: str
    began_ns: int
    tier: str
    """Where the model was before."""
    nbytes: int
    ended_ns: int | None = None
    failed: bool = False


class SpanTracer:
    """The engine's tracer. It belongs to the event loop."""

    def __init__(self, tracer: Tracer, status_of: Callable[[str], ModelStatus]) -> None:
        """`status_of` gives the status of a model by its id."""
        self.tracer = tracer
        self._status_of = status_of
        self._moving: dict[str, Transition] = {}
        self._moved: deque[Transition] = deque(maxlen=MOST_TRANSITIONS)
        self._submitted: OrderedDict[str, SpanContext] = OrderedDict()

    def submitted(self, job_id: str) -> None:
        """The current request has a job made."""
        self._submitted[job_id] = get_current_span().get_span_context()
        if len(self._submitted) > MOST_REMEMBERED:
            self._submitted.popitem(last=False)

    def request(self, request: Request) -> RequestTrace:
        """A request comes to the engine: its span begins."""
        operation = _OPERATIONS.get(request.operation, request.operation.value)
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "roundhouse",
            "gen_ai.request.model": request.model,
            "roundhouse.request_id": request.request_id,
            "roundhouse.priority": request.scheduling.priority.name.lower(),
        }
        if isinstance(request, TextRequest):
            attributes |= _asked(request)
        span = self.tracer.start_span(
            f"{operation} {request.model}", self._parent(request), attributes=attributes
        )
        return _RequestSpan(self, span, reads=request.operation in READING)

    def _parent(self, request: Request) -> Context | None:
        """The span of the HTTP request that had a job made, otherwise the current span.

        A job runs in the context of whatever had it started.
        """
        submitted = self._submitted.get(request.request_id)
        if submitted is not None:
            return set_span_in_context(NonRecordingSpan(submitted), Context())
        return None if get_current_span().is_recording() else Context()

    def moved(self, kind: str, model: str) -> None:
        """Note the beginning or the end of a transition."""
        if (began := _BEGINS.get(kind)) is not None:
            status = self._status_of(model)
            nbytes = status.device_bytes or status.estimated_bytes or 0
            # The status has the transition already.
            tier = _FROM.get(began) or ("device" if status.device_bytes else "host")
            self._moving[model] = Transition(began, model, time.time_ns(), tier, nbytes)
        elif kind in _ENDS and (moving := self._moving.pop(model, None)) is not None:
            moving.ended_ns = time.time_ns()
            moving.failed = kind.endswith("_failed")
            if moving.kind == "load" and not moving.failed:
                moving.nbytes = self._status_of(model).device_bytes  # measured
            self._moved.append(moving)

    def attempt(self, provider: str, model: str, number: int) -> AttemptTrace:
        """A request is sent to a provider."""
        attributes: dict[str, Any] = {
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
            "http.request.method": "POST",
        }
        if number:
            attributes["http.request.resend_count"] = number
        span = self.tracer.start_span(
            f"POST {provider}", kind=SpanKind.CLIENT, attributes=attributes
        )
        return _AttemptSpan(span)

    def transitions(self, model: str, began_ns: int, ended_ns: int) -> list[Transition]:
        """What a request waited for: moves of its model, and what made room."""
        return [
            each
            for each in (*self._moved, *self._moving.values())
            if (each.model == model or each.kind in _MAKES_ROOM)
            and each.began_ns < ended_ns
            and (each.ended_ns is None or each.ended_ns > began_ns)
        ]


class _RequestSpan:
    """The spans of one request."""

    def __init__(self, owner: SpanTracer, span: Span, *, reads: bool) -> None:
        self._owner = owner
        self._span = span
        self._reads = reads
        self._context: Context = set_span_in_context(span)
        self._began_ns = time.time_ns()
        self._run: Span | None = None
        self._finish: str | None = None

    def failed(self, error: BaseException) -> None:
        self._queue(None, time.time_ns())
        _fail(self._span, error)
        self._span.end()

    def opened(self, granted: Granted, first: Event) -> None:
        granted_ns = max(self._began_ns, time.time_ns() - _ns(granted.first_event_s))
        span = self._span
        span.set_attributes(
            {
                "roundhouse.tier": granted.tier,
                "roundhouse.queue_ms": granted.queue_s * 1e3,
                "roundhouse.load_ms": granted.load_s * 1e3,
                "gen_ai.response.time_to_first_chunk": (
                    granted.fetch_s + granted.queue_s + granted.load_s + granted.first_event_s
                ),
            }
        )
        for model, code in granted.tried:
            span.add_event("passed on", {"gen_ai.request.model": model, "error.type": code})
        self._queue(granted.model, granted_ns)
        self._run = self._owner.tracer.start_span("run", self._context, start_time=granted_ns)
        self.gave(first)

    def gave(self, event: Event) -> None:
        if self._reads:
            return
        text = ""
        if isinstance(event, Frame):
            text = event.data
        elif isinstance(event, Document):
            text = event.body.decode(errors="replace")
        for found in _FINISH.finditer(text):
            self._finish = found[1]

    def ended(self, model: str, usage: Usage, error: BaseException | None) -> None:
        attributes = _of_usage(usage)
        attributes["gen_ai.response.model"] = model
        if self._finish is not None:
            attributes["gen_ai.response.finish_reasons"] = (self._finish,)
        run = self._run
        assert run is not None
        for span in (run, self._span):
            span.set_attributes(attributes)
            if error is not None:
                _fail(span, error)
            span.end()

    def _queue(self, model: str | None, ended_ns: int) -> None:
        """The span of the wait. A request without a grant has no model."""
        tracer = self._owner.tracer
        queue = tracer.start_span("queue", self._context, start_time=self._began_ns)
        within = set_span_in_context(queue)
        if model is not None:
            for each in self._owner.transitions(model, self._began_ns, ended_ns):
                span = tracer.start_span(
                    f"{each.kind} {each.model}",
                    within,
                    start_time=each.began_ns,
                    attributes={
                        "roundhouse.model": each.model,
                        "roundhouse.tier": each.tier,
                        "roundhouse.bytes": each.nbytes,
                    },
                )
                if each.failed:
                    span.set_status(StatusCode.ERROR)
                span.end(each.ended_ns)
        queue.end(max(ended_ns, self._began_ns))


class _AttemptSpan:
    """The span of one request to a provider."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def headers(self) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        return carrier

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)
        self._span.add_event("head")

    def ended(self, error: BaseException | None) -> None:
        if error is not None:
            _fail(self._span, error)
        self._span.end()


def _fail(span: Span, error: BaseException) -> None:
    """Mark a span. Messages of errors may quote a prompt, so only the code is told."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        span.set_attribute("error.type", "cancelled")
        return
    code = error.code if isinstance(error, EngineError) else None
    kind = code or type(error).__qualname__
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, kind))


def _asked(request: TextRequest) -> dict[str, Any]:
    """The settings of a request for text that are numbers."""
    body = request.body
    found: dict[str, Any] = {}
    for name, keys in (
        ("max_tokens", ("max_tokens", "max_completion_tokens", "max_output_tokens")),
        ("temperature", ("temperature",)),
        ("top_p", ("top_p",)),
        ("seed", ("seed",)),
    ):
        value = next((body[key] for key in keys if body.get(key) is not None), None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"gen_ai.request.{name}"] = value
    if body.get("stream") is True:
        found["gen_ai.request.stream"] = True
    return found


def _of_usage(usage: Usage) -> dict[str, Any]:
    """What a run took and gave; without what is nothing."""
    counts = {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "roundhouse.images": usage.images,
        "roundhouse.characters": usage.characters,
        "roundhouse.spoken_s": usage.spoken_s,
        "roundhouse.heard_s": usage.heard_s,
        "roundhouse.video_s": usage.video_s,
        "roundhouse.device_s": usage.device_s,
    }
    return {name: count for name, count in counts.items() if count}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
