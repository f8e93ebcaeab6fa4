"""The scenario of transcription: one recording after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.bench.figures import Figure, quantile
from server.bench.scenarios.recording import tone
from server.bench.scenarios.scenario import Case, Peer, Scenario
from server.bench.work import TRANSCRIPTIONS, Round, Streams, Work

REQUESTS = 8
SECONDS = 20


class Transcription(Scenario):
    """The same recording, repeatedly."""

    name = "transcription"
    models = ("tiny-whisper",)
    peers = frozenset({Peer.BARE})
    figures = (Figure("transcription", "ms"), Figure("real-time factor", ""))

    def cases(self) -> tuple[Case, ...]:
        """One."""
        return (Case(f"{SECONDS} s"),)

    def streams(self, case: Case, seed: int) -> Streams:  # noqa: ARG002
        """One series."""
        return [[self._work()] * (self._settings.requests or REQUESTS)]

    def _work(self) -> Work:
        body = {
            "model": self._models[0],
            "language": "en",
            "response_format": "verbose_json",
        }
        return Work(TRANSCRIPTIONS, body, tone(SECONDS))

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The real-time factor is transcription time ÷ recording length: below 1 is faster."""
        return {
            "transcription": quantile([each.end_s * 1e3 for each in round_.good], 0.5),
            "real-time factor": quantile([each.end_s / each.audio_s for each in round_.good], 0.5),
        }

    def samples(self) -> Sequence[Work]:
        """The recording."""
        return [self._work()]

    def alike(self, ours: str, peer: str) -> bool:
        """Whether the words are the same. OpenAI's interface has no space before the first."""
        return ours.strip() == peer.strip()
