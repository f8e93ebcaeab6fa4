"""Counts calls of Python functions: what a request costs, however busy the machine is."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from engine.runtimes.vllm.core_client import CoreClient

OF_THE_LOOP = frozenset({"base_events.py", "events.py", "selector_events.py", "selectors.py"})
"""Modules of asyncio whose work uvloop does natively in a server."""

ROUNDS = 10
"""Of the loop, in which it sends a token: one to take the step, one more for each task it wakes."""
SENT_S = 20.0


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count the calls of this thread by function. A resumed coroutine or generator counts too."""
    count: Counter[str] = Counter()
    names: dict[CodeType, str | None] = {}

    def observe(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in names:
            path = Path(code.co_filename)
            counts = path.name not in OF_THE_LOOP and code.co_filename != __file__
            names[code] = f"{path.parent.name}/{path.name} {code.co_qualname}" if counts else None
        if (name := names[code]) is not None:
            count[name] += 1

    sys.setprofile(observe)
    try:
        yield count
    finally:
        sys.setprofile(None)


def wait_for_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the thread of the cores take no step before the loop has sent the one before.

    Otherwise a loop that is behind finds the next token there, and takes fewer calls to get it.
    """
    deliver = CoreClient._deliver

    def deliver_and_wait(self: CoreClient, item: Any) -> None:
        deliver(self, item)
        loop, sent = self._loop, threading.Event()
        assert loop is not None

        def go_round(times: int) -> None:
            if times:
                loop.call_soon(go_round, times - 1)
            else:
                sent.set()

        loop.call_soon_threadsafe(go_round, ROUNDS)
        sent.wait(SENT_S)

    monkeypatch.setattr(CoreClient, "_deliver", deliver_and_wait)


async def post(app: ASGIApp, path: str, body: dict[str, Any]) -> list[Message]:
    """The messages that an application sends in answer to a request."""
    given: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode()}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not given:
            await asyncio.Event().wait()
        return given.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "server": ("localhost", 8000),
        "scheme": "http",
        "root_path": "",
    }
    await app(scope, receive, send)
    return sent
