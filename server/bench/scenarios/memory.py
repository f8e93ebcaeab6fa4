"""What the processes of a server hold after the same use."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure
from server.bench.scenarios.llm import Llm
from server.bench.scenarios.scenario import Case, Peer
from server.bench.work import Turn

STREAMS = (16,)
MB = 1e6


class MemoryUse(Llm):
    """Streams of text, then a look at all processes of the side."""

    name = "memory"
    starts = True
    peers = frozenset({Peer.VLLM_SERVE, Peer.TRANSFORMERS_SERVE})
    figures = (
        Figure("memory", "MB"),
        Figure("PSS", "MB"),
        Figure("RSS", "MB"),
        Figure("processes", "", higher_is_better=None),
    )

    def cases(self) -> tuple[Case, ...]:
        """One for each number of streams."""
        return tuple(Case(f"after {n} streams", n) for n in self._settings.streams or STREAMS)

    def measure(self, turn: Turn) -> Mapping[str, float]:
        """As the runner saw it."""
        assert turn.memory is not None  # the scenario starts its sides
        return {
            "memory": turn.memory.total_bytes / MB,
            "PSS": turn.memory.pss_bytes / MB,
            "RSS": turn.memory.rss_bytes / MB,
            "processes": turn.memory.processes,
        }
