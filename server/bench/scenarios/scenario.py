"""What a scenario is: requests, and what is made of their answers. All of it is pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from server.bench.figures import Figure
from server.bench.work import Streams, Turn, Work


class Peer(StrEnum):
    """What the server can be measured against."""

    VLLM_SERVE = "vllm-serve"
    TRANSFORMERS_SERVE = "transformers-serve"
    BARE = "bare"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a scenario's table."""

    name: str
    streams: int = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line may change of a scenario."""

    streams: tuple[int, ...] = ()
    """Numbers of concurrent streams; empty takes the scenario's own."""
    output_tokens: int = 64
    prompt_words: int = 16
    rounds: int = 0
    """Requests of each stream in a turn; 0 takes the scenario's own."""


class Scenario(ABC):
    """A kind of load, and the figures that are taken of it."""

    name: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]
    models: ClassVar[tuple[str, ...]]
    """The models of the starter configuration that it asks."""
    peers: ClassVar[frozenset[Peer]] = frozenset()
    starts: ClassVar[bool] = False
    """Each turn starts its side anew, alone on the machine, and stops it."""
    memory: ClassVar[str | None] = None
    """What our server may use, where the scenario needs it to be short of memory."""

    def __init__(self, models: Sequence[str], settings: Settings) -> None:
        """`models` are the names to ask for, as many as the class's."""
        self._models = tuple(models)
        self._settings = settings

    def cases(self) -> tuple[Case, ...]:
        """The rows of the table."""
        return (Case(self.name),)

    @abstractmethod
    def streams(self, case: Case, seed: int) -> Streams:
        """The requests of one turn. Both sides of a pair get those of the same seed."""

    @abstractmethod
    def measure(self, turn: Turn) -> Mapping[str, float]:
        """The figures of one turn that had good answers."""

    def samples(self) -> Sequence[Work]:
        """Requests that both sides must answer alike, sent one by one; none: nothing to compare."""
        return ()

    def alike(self, ours: str, peer: str) -> bool:
        """Whether two outputs of the same sample are the same answer."""
        return ours == peer
