"""The command line with a fake runtime that writes down each request, as a process of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path

from engine.events import Document, Event
from engine.requests import TextRequest
from engine.runtimes.registry import REGISTRY
from server.commands.cli import main
from tests.server.fake import FakeRuntime


def note(line: str) -> None:
    """Add a line to the file that the environment names."""
    with Path(os.environ["COUNTED"]).open("a") as file:
        file.write(line)


async def count(request: TextRequest) -> AsyncGenerator[Event, None]:
    """An answer after a moment, noted in the file that the environment names."""
    await asyncio.to_thread(note, f"{request.model} {request.body['prompt']}\n")
    await asyncio.sleep(0.002)
    yield Document(b'{"ok": true}')


class CountingRuntime(FakeRuntime):
    """A fake that counts."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.answer = count


if __name__ == "__main__":
    REGISTRY["fake"] = "tests.server.batches.serve_counting:CountingRuntime"
    main()
