"""A collector of spans on loopback: it decodes what OTLP over HTTP brings."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span."""

    name: str
    kind: int
    """2: server, 3: client."""
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    status: int
    """2: an error."""
    attributes: Mapping[str, Any]
    events: tuple[str, ...]


@dataclass
class Collector:
    """What has come. `status` is its answer; while `may_answer` is not set, there is none."""

    url: str = ""
    status: int = 200
    spans: list[Seen] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)

    def named(self, name: str) -> Seen:
        """The only span of that name."""
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, [span.name for span in self.spans]
        return found[0]

    def children(self, span: Seen) -> list[Seen]:
        """The spans directly below one, by their beginning."""
        found = [each for each in self.spans if each.parent_id == span.span_id]
        return sorted(found, key=lambda each: each.began_ns)

    def take(self, path: str, body: bytes) -> None:
        """Decode a message."""
        self.paths.append(path)
        self.bodies.append(body)
        message = ExportTraceServiceRequest.FromString(body)
        for group in message.resource_spans:
            self.resource = _attributes(group.resource.attributes)
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Seen(
                            span.name,
                            span.kind,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.code,
                            _attributes(span.attributes),
                            tuple(event.name for event in span.events),
                        )
                    )


def _attributes(pairs: Any) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        if kind == "array_value":
            value = [each.string_value for each in value.values]
        found[pair.key] = value
    return found


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens."""
    collector = Collector()
    collector.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.may_answer.wait(60)
            if collector.status == 200:
                collector.take(self.path, body)
            self.send_response(collector.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield collector
    finally:
        collector.may_answer.set()
        server.shutdown()
        server.server_close()
