"""All kinds of requests at once, in less memory than all models take."""

from __future__ import annotations

import random
from collections.abc import Mapping

from server.bench.figures import Figure, quantile
from server.bench.scenarios.llm import completion, prompt
from server.bench.scenarios.recording import tone
from server.bench.scenarios.scenario import Case, Scenario
from server.bench.work import (
    EMBEDDINGS,
    IMAGES,
    SPEECH,
    TRANSCRIPTIONS,
    Round,
    Streams,
    Work,
)

CLIENTS = 8
REQUESTS = 5
RECORDING_S = 5
SHARES = (6, 4, 3, 2, 2, 2)
"""How often each model is requested: most often for text, as in practice."""


class Mixed(Scenario):
    """Clients that each send a request of a random kind when the one before is answered."""

    name = "mixed"
    models = (
        "tiny-llama",
        "tiny-qwen",
        "tiny-embed",
        "tiny-sdxl-turbo",
        "tiny-vits",
        "tiny-whisper",
    )
    memory = "150MiB"
    figures = (
        Figure("requests", "/s", higher_is_better=True),
        Figure("request p50", "s"),
        Figure("request p95", "s"),
        Figure("longest", "s"),
    )

    def cases(self) -> tuple[Case, ...]:
        """One for each number of clients."""
        return tuple(Case(f"{n} clients", n) for n in self._settings.streams or (CLIENTS,))

    def streams(self, case: Case, seed: int) -> Streams:
        """A random trace from the seed."""
        requests = self._settings.requests or REQUESTS
        chance = random.Random(seed)
        return [
            [
                self._work(chance.choices(range(len(SHARES)), SHARES)[0], chance.randrange(1 << 30))
                for _ in range(requests)
            ]
            for _ in range(case.streams)
        ]

    def _work(self, kind: int, seed: int) -> Work:
        model = self._models[kind]
        text = prompt(str(seed), self._settings.prompt_words)
        match kind:
            case 0 | 1:
                return completion(model, text, self._settings.output_tokens)
            case 2:
                return Work(EMBEDDINGS, {"model": model, "input": text})
            case 3:
                size = {"size": "128x128", "response_format": "b64_json"}
                return Work(IMAGES, {"model": model, "prompt": text, "seed": seed, **size})
            case 4:
                sound = {"voice": "alloy", "response_format": "wav"}
                return Work(SPEECH, {"model": model, "input": "All aboard!", **sound})
            case _:
                options = {"language": "en", "response_format": "verbose_json"}
                return Work(TRANSCRIPTIONS, {"model": model, **options}, tone(RECORDING_S))

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The figures of all kinds together."""
        taken_s = [each.end_s for each in round_.good]
        return {
            "requests": len(round_.good) / round_.wall_s,
            "request p50": quantile(taken_s, 0.5),
            "request p95": quantile(taken_s, 0.95),
            "longest": max(taken_s),
        }
