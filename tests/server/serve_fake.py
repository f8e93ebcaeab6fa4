"""The command line with the fake runtime, as a process of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

from engine.events import Event, Frame
from engine.requests import TextRequest
from engine.runtimes.registry import REGISTRY
from server.commands.cli import main
from tests.server.fake import FakeRuntime

NEVER_STARTS = "TESTS_RUNTIME_NEVER_STARTS"
"""The variable with which the import of the runtime goes on for ever."""


async def wait_for_pipe(request: TextRequest) -> AsyncGenerator[Event, None]:
    """One frame, then another once someone writes to the pipe `until`; without it, never."""
    yield Frame("data: first\n\n")
    if "until" in request.body:
        await asyncio.to_thread(Path(request.body["until"]).read_bytes)
    else:
        await asyncio.Event().wait()
    yield Frame("data: last\n\n")


class PipedRuntime(FakeRuntime):
    """A fake whose answers the test lets go on."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.answer = wait_for_pipe

    def start(self) -> None:
        if NEVER_STARTS in os.environ:
            threading.Event().wait()
        super().start()


if __name__ == "__main__":
    REGISTRY["fake"] = "tests.server.serve_fake:PipedRuntime"
    main()
