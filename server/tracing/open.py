"""Turns tracing on. Nothing of OpenTelemetry is imported before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.tracing.export import Export
    from server.tracing.spans import SpanTracer


class Tracing:
    """The spans of one engine and of the requests to it."""

    def __init__(self, export: Export, tracer: SpanTracer) -> None:
        self._export = export
        self._tracer = tracer

    def layer(self, app: ASGIApp) -> ASGIApp:
        """The application with a span around each request."""
        from server.tracing.layer import TraceLayer

        return TraceLayer(app, self._tracer)

    async def close(self) -> None:
        """Send the last spans."""
        await self._export.close()


def open_tracing(endpoint: str, engine: Engine) -> Tracing:
    """Have the engine make spans, and send them to a collector. Call it before the engine starts.

    Raises:
        ConfigError: the packages are not installed.

    """
    try:
        from server.tracing.export import Export
        from server.tracing.spans import SpanTracer
    except ImportError as error:
        raise ConfigError(
            f"server.otlp_endpoint: traces need OpenTelemetry's packages ({error});"
            " pip install roundhouse[tracing]"
        ) from error
    export = Export(endpoint)
    tracer = SpanTracer(export.tracer, engine.model_status)
    engine.tracer = tracer
    return Tracing(export, tracer)
