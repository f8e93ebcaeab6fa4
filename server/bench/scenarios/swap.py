"""Two models that have room for one: what a change of model adds to the first token."""

from __future__ import annotations

from collections.abc import Mapping

from server.bench.figures import Figure, quantile
from server.bench.scenarios.llm import completion, prompt
from server.bench.scenarios.scenario import Case, Scenario
from server.bench.work import Streams, Turn

ROUNDS = 10


class Swap(Scenario):
    """One client asks two models in turn, each twice: A A B B A A and so on.

    The second of each two finds its model there.
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
        """One series that begins with a change of model."""
        rounds = self._settings.rounds or ROUNDS
        settings = self._settings
        series = []
        for turn in range(2 * rounds):
            text = prompt(f"{turn} {seed}", settings.prompt_words)
            # The warm-up ends with the second model, as every turn does.
            series.append(completion(self._models[turn // 2 % 2], text, settings.output_tokens))
        return [series]

    def measure(self, turn: Turn) -> Mapping[str, float]:
        """By position in the series, so answers that are errors are in it too."""
        first_ms = [each.first_s * 1e3 for each in turn.answers]
        swapped, there = quantile(first_ms[0::2], 0.5), quantile(first_ms[1::2], 0.5)
        return {
            "TTFT with a swap": swapped,
            "TTFT without": there,
            "swap": swapped - there,
        }
