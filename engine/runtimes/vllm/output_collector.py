"""vLLM's hand-over of a request's outputs, for what a parser reads.

vLLM merges the outputs of several steps where the consumer is slower than they come.

Importing this module imports vLLM.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from engine.runtimes.vllm.stream_pace import READ_BY_PARSER
from vllm.v1.engine import async_llm
from vllm.v1.engine.output_processor import RequestOutputCollector


class UnmergedOutputCollector(RequestOutputCollector):  # type: ignore[misc]
    """Hands over each step's output by itself, in their order."""

    def __init__(self, output_kind: Any, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self._later: deque[Any] = deque()

    def put(self, output: Any) -> None:
        """Add an output, or the error that ends the request."""
        if self.output is None:
            super().put(output)
        else:
            self._later.append(output)

    async def get(self) -> Any:
        """The next output; raises the error that ended the request."""
        try:
            return await super().get()
        finally:
            self._advance()

    def get_nowait(self) -> Any:
        """The next output if there is one; raises the error that ended the request."""
        try:
            return super().get_nowait()
        finally:
            self._advance()

    def _advance(self) -> None:
        if self.output is None and self._later:
            super().put(self._later.popleft())


def _collector(output_kind: Any, request_id: str) -> RequestOutputCollector:
    kind = UnmergedOutputCollector if READ_BY_PARSER.get() else RequestOutputCollector
    return kind(output_kind, request_id)


def keep_outputs_apart() -> None:
    """Have vLLM collect what parsers read in the class above. Call once, before any request."""
    async_llm.RequestOutputCollector = _collector
