"""Text: concurrent streams of tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from server.bench.figures import Figure, quantile
from server.bench.scenarios.scenario import Case, Peer, Scenario
from server.bench.work import COMPLETIONS, Round, Streams, Work

TEXT = (
    "the engine waits in a roundhouse while another locomotive stands on its turntable and "
    "the driver asks for track one two three four please write short story about small robot "
    "that learns to paint once upon time there was king who had daughters explain how memory "
    "is shared between models every byte counted before used given back when work done"
)
WORDS = TEXT.split()
STREAMS = (1, 16, 64, 256)
SAMPLES = 4
SAMPLE_TOKENS = 16
"""Later tokens may differ by the last bit of a sum."""
SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def prompt(key: str, words: int) -> str:
    """`key` and random words, the same for the same key.

    A unique key for each request keeps prefix caches from answering.
    """
    chosen = random.Random(key)
    return " ".join([key, *(chosen.choice(WORDS) for _ in range(words))])


def completion(model: str, text: str, output_tokens: int) -> Work:
    """A greedy, streamed completion of exactly `output_tokens` tokens."""
    body = {
        "model": model,
        "prompt": text,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Work(COMPLETIONS, body)


class Llm(Scenario):
    """Streams that each send a request when the one before is answered."""

    name = "llm"
    models = ("tiny-llama",)
    peers = frozenset(Peer)
    figures = (
        Figure("tokens", "tokens/s", higher_is_better=True),
        *(Figure(f"TTFT {name}", "ms") for name in SHARES),
        *(Figure(f"ITL {name}", "ms") for name in SHARES),
        Figure("tokens a piece", "", higher_is_better=None),
        Figure("client CPU", "% of a core", higher_is_better=None),
    )

    def cases(self) -> tuple[Case, ...]:
        """One for each number of streams."""
        numbers = self._settings.streams or STREAMS
        return tuple(Case(f"{n} stream{'s' if n > 1 else ''}", n) for n in numbers)

    def streams(self, case: Case, seed: int) -> Streams:
        """Eight requests of a single stream, two of each of several, one of each of many."""
        requests = self._settings.requests or (
            1 if case.streams > 256 else max(2, 8 // case.streams)
        )
        return [
            [self._work(f"{stream} {number} {seed} {case.name}") for number in range(requests)]
            for stream in range(case.streams)
        ]

    def _work(self, key: str) -> Work:
        settings = self._settings
        text = prompt(key, settings.prompt_words)
        work = completion(self._models[0], text, settings.output_tokens)
        if settings.single_tokens:
            work = replace(work, body={**work.body, "stream_interval": 1})
        return work

    def measure(self, round_: Round) -> Mapping[str, float]:
        """The throughput counts from the first request of all streams to their last answer."""
        first_ms = [each.first_s * 1e3 for each in round_.good]
        gaps_ms = [
            (after - before) * 1e3
            for each in round_.good
            for before, after in pairwise(each.times_s)
        ]
        tokens = sum(each.tokens for each in round_.good)
        pieces = sum(len(each.times_s) for each in round_.good)
        return {
            "tokens": tokens / round_.wall_s,
            **{f"TTFT {name}": quantile(first_ms, share) for name, share in SHARES.items()},
            **{f"ITL {name}": quantile(gaps_ms, share) for name, share in SHARES.items()},
            "tokens a piece": tokens / max(1, pieces),
            "client CPU": 100 * round_.client_cpu_s / round_.wall_s,
        }

    def samples(self) -> Sequence[Work]:
        """A few prompts, each alone: greedy decoding must begin with the same text."""
        settings = self._settings
        tokens = min(settings.output_tokens, SAMPLE_TOKENS)
        prompts = (prompt(f"{number} sample", settings.prompt_words) for number in range(SAMPLES))
        return [completion(self._models[0], text, tokens) for text in prompts]
