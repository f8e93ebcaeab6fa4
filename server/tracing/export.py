"""Where spans go: an OTLP collector over HTTP. Importing this imports OpenTelemetry.

The provider is our own and never the process's global one, which libraries here also use.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Tracer

from server.packages import installed_version

logger = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
FLUSH_S = 3.0
"""How long a stop waits for the collector to take the last spans."""


class Export:
    """Sends spans from a thread of its own, and drops them while there is no collector."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's address, with `/v1/traces` or without."""
        # The package logs each failed attempt; `_Reporting` logs the first.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        url = traces_url(endpoint)
        named = OTEL_SERVICE_NAME in os.environ or "service.name=" in os.environ.get(
            OTEL_RESOURCE_ATTRIBUTES, ""
        )
        attributes = {SERVICE_VERSION: installed_version("roundhouse") or ""}
        if not named:
            attributes[SERVICE_NAME] = "roundhouse"
        self._provider = TracerProvider(
            resource=Resource.create(attributes), shutdown_on_exit=False
        )
        exporter = _Reporting(OTLPSpanExporter(endpoint=url), urlsplit(url).netloc)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    @property
    def tracer(self) -> Tracer:
        """Makes the spans."""
        return self._provider.get_tracer("roundhouse", installed_version("roundhouse"))

    async def close(self) -> None:
        """Send what is left, for `FLUSH_S` at most."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def flush() -> None:
            try:
                self._provider.shutdown()
            finally:
                try:
                    loop.call_soon_threadsafe(done.set)
                except RuntimeError:  # nobody waited for so long
                    logger.debug("the last spans are given up")

        # Not one of asyncio's threads: the process would wait for it to end.
        threading.Thread(target=flush, name="flush-spans", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S):
                await done.wait()
        except TimeoutError:
            logger.warning("the collector of spans did not take the last ones in time")


class _Reporting(SpanExporter):
    """Logs one line when the collector stops to take spans, and one when it takes them again."""

    def __init__(self, exporter: SpanExporter, host: str) -> None:
        self._exporter = exporter
        self._host = host
        self._lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans, on the thread of the processor."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # a library's; the thread must go on
            logger.debug("spans are lost: %s", error)
            result = SpanExportResult.FAILURE
        lost = result is not SpanExportResult.SUCCESS
        if lost and not self._lost:
            logger.warning("the collector of spans at %s takes none; they are lost", self._host)
        elif self._lost and not lost:
            logger.info("the collector of spans at %s takes them again", self._host)
        self._lost = lost
        return result

    def shutdown(self) -> None:
        """End an export under way."""
        self._exporter.shutdown()


def traces_url(endpoint: str) -> str:
    """The whole URL for spans."""
    base = endpoint.rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH
