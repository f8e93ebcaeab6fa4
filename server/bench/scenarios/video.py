"""Videos: one job each, from the request to the file."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure, quantile
from server.bench.scenarios.scenario import Case, Scenario
from server.bench.work import VIDEOS, Round, Streams, Work

REQUESTS = 3


class Video(Scenario):
    """Videos of the model's default size and length, one after the other."""

    name = "video"
    models = ("tiny-wan",)
    figures = (Figure("video", "s"),)

    def streams(self, case: Case, seed: int) -> Streams:  # noqa: ARG002
        """One series."""
        requests = self._settings.requests or REQUESTS
        bodies = (
            {"model": self._models[0], "prompt": "a red train", "seed": seed * requests + number}
            for number in range(requests)
        )
        return [[Work(VIDEOS, body) for body in bodies]]

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The time from the request for the job to the last byte of its file."""
        return {"video": quantile([each.end_s for each in round_.good], 0.5)}
