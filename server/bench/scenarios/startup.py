"""From the start of the process to the first token."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure
from server.bench.scenarios.llm import Llm
from server.bench.scenarios.scenario import Case, Peer
from server.bench.work import Streams, Turn


class Startup(Llm):
    """One request, sent from the start on until it is taken."""

    name = "startup"
    starts = True
    peers = frozenset({Peer.VLLM_SERVE, Peer.TRANSFORMERS_SERVE})
    figures = (Figure("start to first token", "s"),)

    def cases(self) -> tuple[Case, ...]:
        """One."""
        return (Case("start"),)

    def streams(self, case: Case, seed: int) -> Streams:  # noqa: ARG002
        """A short one."""
        return [[self._work(f"{seed} start")]]

    def measure(self, turn: Turn) -> Mapping[str, float]:
        """As the runner saw it."""
        assert turn.first_token_s is not None  # the scenario starts its sides
        return {"start to first token": turn.first_token_s}
