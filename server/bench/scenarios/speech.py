"""Speech: the time to its first byte, and its real-time factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.bench.figures import Figure, quantile
from server.bench.scenarios.scenario import Case, Peer, Scenario
from server.bench.work import SPEECH, Round, Streams, Work

REQUESTS = 4
SENTENCES = (3, 10)
SEED = 7
SAME_S = 0.001
"""The largest difference in length of the same speech."""


class Speech(Scenario):
    """Texts of several sentences, one after the other."""

    name = "speech"
    models = ("tiny-vits",)
    peers = frozenset({Peer.BARE})
    figures = (
        Figure("time to first byte", "ms"),
        Figure("speech", "ms"),
        Figure("real-time factor", ""),
    )

    def cases(self) -> tuple[Case, ...]:
        """One for each length."""
        return tuple(Case(f"{number} sentences", number) for number in SENTENCES)

    def streams(self, case: Case, seed: int) -> Streams:  # noqa: ARG002
        """One series of requests, all for the same text and the same seed."""
        requests = self._settings.requests or REQUESTS
        return [[self._work(case.streams) for _ in range(requests)]]

    def _work(self, sentences: int) -> Work:
        text = " ".join(
            f"The locomotive number {n} waits on the turntable for its turn."
            for n in range(1, sentences + 1)
        )
        body = {
            "model": self._models[0],
            "input": text,
            "voice": "alloy",
            "seed": SEED,
            "response_format": "wav",
        }
        return Work(SPEECH, body)

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The real-time factor is synthesis time ÷ length of the audio: below 1 is faster."""
        return {
            "time to first byte": quantile([each.first_s * 1e3 for each in round_.good], 0.5),
            "speech": quantile([each.end_s * 1e3 for each in round_.good], 0.5),
            "real-time factor": quantile([each.end_s / each.audio_s for each in round_.good], 0.5),
        }

    def samples(self) -> Sequence[Work]:
        """One of each length."""
        return [self._work(number) for number in SENTENCES]

    def alike(self, ours: str, peer: str) -> bool:
        """Whether both have the same length: `Answer.output` of audio is its seconds."""
        return abs(float(ours) - float(peer)) <= SAME_S
