"""The base of scenarios: their requests, and figures from the answers. All of it is pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from server.bench.figures import Figure
from server.bench.work import Round, Streams, Work


class Peer(StrEnum):
    """What the server can be compared with."""

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
    """The options of the command line for a scenario."""

    streams: tuple[int, ...] = ()
    """Numbers of concurrent streams. Empty takes the scenario's default."""
    output_tokens: int = 64
    prompt_words: int = 16
    requests: int = 0
    """Requests of each stream in a round. 0 takes the scenario's default."""
    single_tokens: bool = False
    """Ask for an event with each token, however busy the server is."""


class Scenario(ABC):
    """A kind of load, and its figures."""

    name: ClassVar[str]
    figures: ClassVar[tuple[Figure, ...]]
    models: ClassVar[tuple[str, ...]]
    """The models of the starter configuration that it requests."""
    peers: ClassVar[frozenset[Peer]] = frozenset()
    starts: ClassVar[bool] = False
    """Whether each round starts its target, alone on the machine, and stops it."""
    memory: ClassVar[str | None] = None
    """The memory budget of our server, for a scenario that needs too little memory."""

    def __init__(self, models: Sequence[str], settings: Settings) -> None:
        """`models` are the names to request, as many as the class has."""
        self._models = tuple(models)
        self._settings = settings

    def cases(self) -> tuple[Case, ...]:
        """The rows of the table."""
        return (Case(self.name),)

    @abstractmethod
    def streams(self, case: Case, seed: int) -> Streams:
        """The requests of one round. Both rounds of a pair have the same seed."""

    @abstractmethod
    def measure(self, round_: Round) -> Mapping[str, float]:
        """The figures of one round that had good answers."""

    def samples(self) -> Sequence[Work]:
        """Requests that both targets must answer equally, sent one by one. None: no check."""
        return ()

    def alike(self, ours: str, peer: str) -> bool:
        """Whether two outputs of the same sample are the same answer."""
        return ours == peer
