"""What is asked of a side of a measurement, and what came of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

COMPLETIONS = "/v1/completions"
IMAGES = "/v1/images/generations"
VIDEOS = "/v1/videos"
SPEECH = "/v1/audio/speech"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class Work:
    """One request as OpenAI's interface has it."""

    path: str
    body: dict[str, Any]
    """The fields, the model's name among them."""
    file: bytes = b""
    """A recording to send along."""

    def document(self) -> dict[str, Any]:
        """For the process that calls the bare library."""
        return {"path": self.path, "body": self.body, "file": base64.b64encode(self.file).decode()}


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request was answered. All times are in seconds."""

    sent_s: float
    """On the clock of the process that sent it."""
    end_s: float
    """After it was sent."""
    times_s: tuple[float, ...] = ()
    """When each piece of output came, after it was sent."""
    tokens: int = 0
    """Of the answer."""
    audio_s: float = 0.0
    """Seconds of sound, made or heard."""
    output: str = ""
    """The text, the pixels as base64, the seconds of sound; empty where only time counts."""
    error: str | None = None
    """What was wrong with it; its other fields then mean nothing."""

    @property
    def first_s(self) -> float:
        """When the first output came, after it was sent."""
        return self.times_s[0] if self.times_s else self.end_s

    @classmethod
    def read(cls, document: dict[str, Any]) -> Answer:
        """From what `written` made."""
        return cls(**{**document, "times_s": tuple(document["times_s"])})

    def written(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)


Streams = Sequence[Sequence[Work]]
"""Each inner series is sent one after the other; the series run beside each other."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of a call, series by series."""

    each: list[Answer]
    client_cpu_s: float
    """Processor time that sending and reading took of this process, while answers came."""


class Caller(Protocol):
    """Sends requests to one side."""

    async def call(self, streams: Streams) -> Answers:
        """Send all. What goes wrong is told by each answer."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a tree of processes holds, in bytes."""

    total_bytes: int
    """Anonymous memory, and each page of a file once however many of its processes map it."""
    pss_bytes: int
    """The kernel's proportional set size: less where other programs map the same libraries."""
    rss_bytes: int
    """Of all processes added up: shared pages count once for each."""
    processes: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's turn: its answers and what was measured around them."""

    answers: tuple[Answer, ...]
    client_cpu_s: float
    """As in `Answers`."""
    first_token_s: float | None = None
    """From the start of its process to its first output, where the turn began with a start."""
    memory: Memory | None = None
    """Of its processes after the requests, where the turn began with a start."""

    @property
    def good(self) -> tuple[Answer, ...]:
        """The answers that are no errors."""
        return tuple(each for each in self.answers if each.error is None)

    @property
    def wall_s(self) -> float:
        """From the first request sent to the last answer's end; 0 if none was good."""
        if not self.good:
            return 0.0
        began_s = min(each.sent_s for each in self.good)
        return max(each.sent_s + each.end_s for each in self.good) - began_s
