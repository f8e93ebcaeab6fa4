"""A request that the server makes of itself: it passes every layer, as one of a client does.

So the checks, the key's scopes, its limits, its budget, the usage, the metrics and the log are
those of the endpoint.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message

JSON = "application/json"
MAX_ANSWER_BYTES = 2**28
"""A longer answer is given up: it is held in memory."""

_OWN_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "last-event-id",
        "range",
        "traceparent",
        "transfer-encoding",
        "x-request-id",
    }
)
"""Headers that concern the outer request alone, as do those that begin with `mcp-`."""

_RUNNING: set[asyncio.Task[Answer]] = set()
"""The loop itself holds its tasks but weakly."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole answer of an endpoint."""

    status: int
    headers: Headers
    body: bytes
    complete: bool
    """False: the endpoint failed after its answer had begun, or the answer was too long."""

    def document(self) -> Any:
        """The body as JSON; an empty object if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return {}

    @property
    def error(self) -> Mapping[str, Any]:
        """The fields of an error."""
        document = self.document()
        found = document.get("error") if isinstance(document, dict) else None
        return found if isinstance(found, dict) else {"message": f"HTTP status {self.status}."}


@dataclass(slots=True)
class InnerRequest:
    """One request to an endpoint of this server, on behalf of the sender of `outer`.

    It has the headers of `outer`: its key, its origin, and its scheduling options.
    """

    outer: Request
    method: str
    path: str
    query: str = ""
    body: bytes = b""
    content_type: str = JSON
    request_id: str = field(default_factory=lambda: f"mcp-{uuid.uuid4().hex}")
    _left: asyncio.Event = field(default_factory=asyncio.Event)
    _read: bool = False
    _status: int = 0
    _headers: Headers = field(default_factory=Headers)
    _pieces: list[bytes] = field(default_factory=list)
    _nbytes: int = 0
    _complete: bool = False

    def start(self) -> asyncio.Task[Answer]:
        """Send it, as a task that ends with the answer.

        Never cancel the task: use `leave`, so that the endpoint cleans up as for any client.
        """
        task = asyncio.create_task(self._run())
        _RUNNING.add(task)
        task.add_done_callback(_RUNNING.discard)
        return task

    def leave(self) -> None:
        """Hang up. What runs for it is cancelled, and gives back what it holds."""
        self._left.set()

    async def _run(self) -> Answer:
        outer = self.outer.scope
        scope = {
            **{key: outer[key] for key in ("type", "asgi", "http_version", "scheme")},
            "client": outer.get("client"),
            "server": outer.get("server"),
            "root_path": "",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query.encode(),
            "headers": self._inner_headers(),
            "state": {},
        }
        await outer["app"](scope, self._receive, self._send)
        return Answer(self._status, self._headers, b"".join(self._pieces), self._complete)

    def _inner_headers(self) -> list[tuple[bytes, bytes]]:
        kept = [
            (name, value)
            for name, value in self.outer.scope["headers"]
            if name.decode("latin-1") not in _OWN_HEADERS and not name.startswith(b"mcp-")
        ]
        own = {
            "content-type": self.content_type,
            "content-length": str(len(self.body)),
            "x-request-id": self.request_id,
        }
        return [*kept, *((name.encode(), value.encode()) for name, value in own.items())]

    async def _receive(self) -> Message:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = Headers(raw=message["headers"])
        elif message["type"] == "http.response.body":
            piece = message.get("body", b"")
            self._nbytes += len(piece)
            if self._nbytes > MAX_ANSWER_BYTES:
                self._pieces.clear()
                self.leave()
            elif piece:
                self._pieces.append(piece)
            if not message.get("more_body"):
                self._complete = self._nbytes <= MAX_ANSWER_BYTES
        elif message["type"] == "http.response.pathsend":
            raise AssertionError("the server offers no such extension")
