"""vLLM's collector of a request's outputs, for outputs that a parser reads.

vLLM merges the outputs of several steps if the consumer is slower than the steps.

Importing this module imports vLLM.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from engine.runtimes.vllm.stream_pace import READ_BY_PARSER
from vllm.v1.engine import async_llm
from vllm.v1.engine.output_processor import RequestOutputCollector


class UnmergedOutputCollector(RequestOutputCollector):  # type: ignore[misc]
    """Hands over the outputs one by one, in the order of the steps."""

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
        """The next output. Raises the error that ended the request."""
        try:
            return await super().get()
        finally:
            self._advance()

    def get_nowait(self) -> Any:
        """The next output if there is one. Raises the error that ended the request."""
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
    """Have vLLM use the class above for what parsers read. Call once, before any request."""
    async_llm.RequestOutputCollector = _collector
