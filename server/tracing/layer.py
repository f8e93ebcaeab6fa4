"""The outermost layer with tracing on: one server span a request, with the client's as parent."""

from __future__ import annotations

from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import PROBES
from server.tracing.spans import PROPAGATOR, SpanTracer

_STARTS = ("http.response.start", "websocket.http.response.start", "websocket.accept")


class TraceLayer:
    """ASGI middleware. Paths are those of routes: what a client put in their place is left out."""

    def __init__(self, app: ASGIApp, tracer: SpanTracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on inside its span."""
        if scope["type"] == "lifespan" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        method = scope.get("method", "GET")  # of a WebSocket
        span = self._tracer.tracer.start_span(
            method,
            _parent(scope),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.scheme": scope["scheme"]},
        )
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] in _STARTS:
                status = message.get("status", 101)
            await send(message)

        token = attach(set_span_in_context(span))
        try:
            await self._app(scope, receive, noted)
        finally:
            detach(token)
            _describe(span, scope, status)
            span.end()


def _parent(scope: Scope) -> Context | None:
    """The span of the client, or ours for a request that the server makes of itself."""
    if get_current_span().is_recording():
        return None  # the current one
    carrier = {
        name: value
        for name, value in Headers(scope=scope).items()
        if name in ("traceparent", "tracestate")
    }
    return PROPAGATOR.extract(carrier, Context())


def _describe(span: Span, scope: Scope, status: int) -> None:
    route = getattr(scope.get("route"), "path", None)
    state = scope.get("state", {})
    if route is not None:
        span.update_name(f"{scope.get('method', 'GET')} {route}")
        span.set_attribute("http.route", route)
    if "request_id" in state:
        span.set_attribute("roundhouse.request_id", state["request_id"])
    caller = state.get("caller")
    if caller is not None and caller.name:
        span.set_attribute("roundhouse.caller", caller.name)
    if status:
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
    else:
        span.set_attribute("error.type", "client_left")
