"""How like hard examples, and how unlike simple ones, a prompt is, by their embeddings."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from engine.route_config import ExamplesConfig

Vector: TypeAlias = Sequence[float]

Embed: TypeAlias = Callable[[str, Sequence[str]], Awaitable[list[Vector]]]
"""The embeddings of some texts by a model."""

SHARPNESS = 0.05
"""The difference of two cosines at which the nearer side counts 0.73."""

MOST_READ = 2000
"""Characters of a prompt that are embedded: small models read a few hundred tokens."""


class Examples:
    """The examples of one route. Their embeddings are computed once, at the first request."""

    def __init__(self, config: ExamplesConfig, embed: Embed) -> None:
        self._config = config
        self._embed = embed
        self._known: tuple[list[Vector], list[Vector]] | None = None

    async def likeness(self, text: str) -> float:
        """0: like a simple example; 1: like a hard one.

        Raises:
            EngineError: the model cannot embed now.

        """
        if self._known is None:
            texts = [*self._config.simple, *self._config.hard]
            vectors = await self._embed(self._config.model, texts)
            count = len(self._config.simple)
            self._known = vectors[:count], vectors[count:]
        (vector,) = await self._embed(self._config.model, [text[:MOST_READ]])
        simple, hard = (max(_cosine(vector, each) for each in side) for side in self._known)
        return 1 / (1 + math.exp((simple - hard) / SHARPNESS))


def _cosine(one: Vector, other: Vector) -> float:
    norm = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / norm if norm else 0.0
