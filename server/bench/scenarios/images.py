"""The scenario of images, one after the other."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from server.bench.figures import Figure, quantile
from server.bench.scenarios.scenario import Case, Peer, Scenario
from server.bench.work import IMAGES, Round, Streams, Work

REQUESTS = 8
SIZES = ("128x128", "256x256", "512x512")
SAMPLE_SEED = 1 << 20
"""Larger than the seed of any round."""
LEVELS = 1
"""The largest difference of a byte of two equal images: torch is no more exact on many threads."""


class Images(Scenario):
    """Images with the model's default number of steps."""

    name = "images"
    models = ("tiny-sdxl-turbo",)
    peers = frozenset({Peer.BARE})
    figures = (Figure("image", "ms"), Figure("image p95", "ms"))

    def cases(self) -> tuple[Case, ...]:
        """One for each size."""
        return tuple(Case(size) for size in SIZES)

    def streams(self, case: Case, seed: int) -> Streams:
        """One series."""
        requests = self._settings.requests or REQUESTS
        return [[self._work(case.name, seed * requests + number) for number in range(requests)]]

    def _work(self, size: str, seed: int) -> Work:
        body = {
            "model": self._models[0],
            "prompt": "a red train",
            "size": size,
            "seed": seed,
            "response_format": "b64_json",
        }
        return Work(IMAGES, body)

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The time from the request to the end of the answer."""
        taken_ms = [each.end_s * 1e3 for each in round_.good]
        return {"image": quantile(taken_ms, 0.5), "image p95": quantile(taken_ms, 0.95)}

    def samples(self) -> Sequence[Work]:
        """One of each size."""
        return [self._work(size, SAMPLE_SEED) for size in SIZES]

    def alike(self, ours: str, peer: str) -> bool:
        """Whether all bytes of the pixels differ by a level at most."""
        one, other = (base64.b64decode(each) for each in (ours, peer))
        return len(one) == len(other) and all(
            abs(a - b) <= LEVELS for a, b in zip(one, other, strict=True)
        )
