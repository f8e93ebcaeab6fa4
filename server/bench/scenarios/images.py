"""Images, one after the other."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from server.bench.figures import Figure, quantile
from server.bench.scenarios.scenario import Case, Peer, Scenario
from server.bench.work import IMAGES, Streams, Turn, Work

ROUNDS = 8
SIZES = ("128x128", "256x256", "512x512")
SAMPLE_SEED = 1 << 20
"""Beyond any turn's."""
LEVELS = 1
"""How far a byte of a picture may differ: with several threads torch itself is no more exact."""


class Images(Scenario):
    """Pictures of the model's default steps."""

    name = "images"
    models = ("tiny-sdxl-turbo",)
    peers = frozenset({Peer.BARE})
    figures = (Figure("image", "ms"), Figure("image p95", "ms"))

    def cases(self) -> tuple[Case, ...]:
        """One for each size."""
        return tuple(Case(size) for size in SIZES)

    def streams(self, case: Case, seed: int) -> Streams:
        """One series."""
        rounds = self._settings.rounds or ROUNDS
        return [[self._work(case.name, seed * rounds + turn) for turn in range(rounds)]]

    def _work(self, size: str, seed: int) -> Work:
        body = {
            "model": self._models[0],
            "prompt": "a red train",
            "size": size,
            "seed": seed,
            "response_format": "b64_json",
        }
        return Work(IMAGES, body)

    def measure(self, turn: Turn) -> Mapping[str, float]:
        """From the request to the whole answer."""
        taken_ms = [each.end_s * 1e3 for each in turn.good]
        return {"image": quantile(taken_ms, 0.5), "image p95": quantile(taken_ms, 0.95)}

    def samples(self) -> Sequence[Work]:
        """One of each size."""
        return [self._work(size, SAMPLE_SEED) for size in SIZES]

    def alike(self, ours: str, peer: str) -> bool:
        """Whether all bytes of the pixels are within a level."""
        one, other = (base64.b64decode(each) for each in (ours, peer))
        return len(one) == len(other) and all(
            abs(a - b) <= LEVELS for a, b in zip(one, other, strict=True)
        )
