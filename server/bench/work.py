"""The requests that a target of a measurement gets, and their answers."""

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
    """One request in OpenAI's format."""

    path: str
    body: dict[str, Any]
    """The fields, with the model's name."""
    file: bytes = b""
    """A recording to send with it."""

    def document(self) -> dict[str, Any]:
        """The JSON document for the process that calls the bare library."""
        return {"path": self.path, "body": self.body, "file": base64.b64encode(self.file).decode()}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request. All times are in seconds."""

    sent_s: float
    """On the clock of the process that sent the request."""
    end_s: float
    """Since the request was sent."""
    times_s: tuple[float, ...] = ()
    """When each piece of output came, since the request was sent."""
    tokens: int = 0
    """Of the answer."""
    audio_s: float = 0.0
    """Seconds of audio, synthesized or transcribed."""
    output: str = ""
    """The text, the pixels as base64, or the seconds of audio. Empty where only time counts."""
    error: str | None = None
    """What was wrong with it. The other fields then mean nothing."""

    @property
    def first_s(self) -> float:
        """When the first output came, since the request was sent."""
        return self.times_s[0] if self.times_s else self.end_s

    @classmethod
    def read(cls, document: dict[str, Any]) -> Answer:
        """The answer from the document of `written`."""
        return cls(**{**document, "times_s": tuple(document["times_s"])})

    def written(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)


Streams = Sequence[Sequence[Work]]
"""The requests of each inner series are sent one after the other. The series run concurrently."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a call, series by series."""

    each: list[Answer]
    client_cpu_s: float
    """CPU time that this process took to send and to read, while answers came."""


class Caller(Protocol):
    """Sends requests to one target."""

    async def call(self, streams: Streams) -> Answers:
        """Send all. Each answer reports its own error."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a tree of processes, in bytes."""

    total_bytes: int
    """Anonymous memory, and each page of a file once, however many processes map it."""
    pss_bytes: int
    """The kernel's proportional set size: smaller if other programs map the same libraries."""
    rss_bytes: int
    """The sum over all processes: shared pages count once for each process."""
    processes: int


@dataclass(frozen=True, slots=True)
class Round:
    """One repeat of a case on one target: its answers and what was measured around them."""

    answers: tuple[Answer, ...]
    client_cpu_s: float
    """As in `Answers`."""
    first_token_s: float | None = None
    """From the start of its process to its first output, if the round began with a start."""
    memory: Memory | None = None
    """Of its processes after the requests, if the round began with a start."""

    @property
    def good(self) -> tuple[Answer, ...]:
        """The answers that are not errors."""
        return tuple(each for each in self.answers if each.error is None)

    @property
    def wall_s(self) -> float:
        """From the first request to the end of the last answer; 0 if no answer was good."""
        if not self.good:
            return 0.0
        began_s = min(each.sent_s for each in self.good)
        return max(each.sent_s + each.end_s for each in self.good) - began_s
