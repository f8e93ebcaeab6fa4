"""Two models in memory for one: what a change of model adds to the TTFT."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure, quantile
from server.bench.scenarios.llm import completion, prompt
from server.bench.scenarios.scenario import Case, Scenario
from server.bench.work import Round, Streams

REQUESTS = 10


class Swap(Scenario):
    """One client requests two models alternately, each twice: A A B B A A and so on.

    The second request of each two finds its model resident.
    """

    name = "swap"
    models = ("tiny-llama", "tiny-qwen")
    memory = "140MiB"
    figures = (
        Figure("TTFT with a swap", "ms"),
        Figure("TTFT without", "ms"),
        Figure("swap", "ms"),
    )

    def streams(self, case: Case, seed: int) -> Streams:  # noqa: ARG002
        """One series, which begins with a change of model."""
        requests = self._settings.requests or REQUESTS
        settings = self._settings
        series = []
        for number in range(2 * requests):
            text = prompt(f"{number} {seed}", settings.prompt_words)
            # The warm-up ends with the second model, as every round does.
            series.append(completion(self._models[number // 2 % 2], text, settings.output_tokens))
        return [series]

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The position in the series decides, so errors count too."""
        first_ms = [each.first_s * 1e3 for each in round_.answers]
        swapped, there = quantile(first_ms[0::2], 0.5), quantile(first_ms[1::2], 0.5)
        return {
            "TTFT with a swap": swapped,
            "TTFT without": there,
            "swap": swapped - there,
        }
