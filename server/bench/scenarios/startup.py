"""The scenario of a start: seconds from the start of the process to the first token."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure
from server.bench.scenarios.llm import Llm
from server.bench.scenarios.scenario import Case, Peer
from server.bench.work import Round, Streams


class Startup(Llm):
    """One request, sent again from the start of the process until it is answered."""

    name = "startup"
    starts = True
    peers = frozenset({Peer.VLLM_SERVE, Peer.TRANSFORMERS_SERVE})
    figures = (Figure("start to first token", "s"),)

    def cases(self) -> tuple[Case, ...]:
        """One."""
        return (Case("start"),)

    def streams(self, case: Case, seed: int) -> Streams:  # noqa: ARG002
        """One short request."""
        return [[self._work(f"{seed} start")]]

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The time that the runner measured."""
        assert round_.first_token_s is not None  # the scenario starts its targets
        return {"start to first token": round_.first_token_s}
