"""The scenario of memory: that of a server's processes after the same load."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure
from server.bench.scenarios.llm import Llm
from server.bench.scenarios.scenario import Case, Peer
from server.bench.work import Round

STREAMS = (16,)
MB = 1e6


class MemoryUse(Llm):
    """Streams of text, then the memory of all processes of the target."""

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

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The memory that the runner measured."""
        assert round_.memory is not None  # the scenario starts its targets
        return {
            "memory": round_.memory.total_bytes / MB,
            "PSS": round_.memory.pss_bytes / MB,
            "RSS": round_.memory.rss_bytes / MB,
            "processes": round_.memory.processes,
        }
