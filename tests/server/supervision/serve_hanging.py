"""The command line with a fake runtime that does as a request says: `"do"` is one of

- `"hang the loop"`: its check never returns, on the event loop;
- `"hang the device"`: its run never returns, on the model's thread;
- `"poison the device"`: the device fails from then on, as after an illegal access.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from engine.config import ModelConfig
from engine.errors import RuntimeFailed
from engine.events import Document, Event
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.requests import Request, TextRequest
from engine.runtimes.base import Prepared
from engine.runtimes.common.thread_run import Emit, run_on_thread
from engine.runtimes.registry import REGISTRY
from server.commands.cli import main
from tests.server.fake import FakeRuntime

THREAD = ThreadPoolExecutor(1, thread_name_prefix="small")
POISON = "CUDA error: an illegal memory access was encountered"


def hang() -> None:
    """As a call does whose kernel never ends."""
    threading.Event().wait()


class Run:
    """One request."""

    progress = 0

    def __init__(self, do: str, emit: Emit) -> None:
        self._do = do
        self._emit = emit

    def execute(self) -> None:
        with GATE.step():
            if self._do == "hang the device":
                hang()
            if self._do == "poison the device":
                CpuDevice.check = fail  # type: ignore[method-assign, assignment]
                raise RuntimeError(POISON)
        self._emit(Document(b'{"done": true}'))

    def cancel(self) -> None:
        pass


def fail(self: CpuDevice) -> None:
    raise RuntimeError(POISON)


async def obey(request: TextRequest) -> AsyncGenerator[Event, None]:
    do = str(request.body.get("do", ""))
    async for event in run_on_thread(
        THREAD, lambda emit: Run(do, emit), lambda error: RuntimeFailed(str(error))
    ):
        yield event


class HangingRuntime(FakeRuntime):
    def __init__(self, *args: object) -> None:
        super().__init__()
        self.answer = obey

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if isinstance(request, TextRequest) and request.body.get("do") == "hang the loop":
            hang()
        return super().prepare(model, request)


if __name__ == "__main__":
    REGISTRY["fake"] = "tests.server.supervision.serve_hanging:HangingRuntime"
    main()
