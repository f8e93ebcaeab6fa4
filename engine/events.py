"""The events of a run: what a caller gets back from a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from PIL.Image import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Frames: TypeAlias = "NDArray[np.uint8]"
"""Pixels of a video: (frames, height, width, 3), RGB."""

Samples: TypeAlias = "NDArray[np.float32]"
"""Mono audio: (samples,), -1 to 1."""


@dataclass(frozen=True, slots=True)
class Document:
    """The whole response as one JSON document (UTF-8)."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a streamed response: the text of a server-sent event, ready for the wire."""

    data: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run, 0 to 1."""

    done: float


@dataclass(frozen=True, slots=True)
class PartialImage:
    """A preview of the first image, decoded from the latents of its step."""

    index: int
    """0, 1, … in the order given."""
    image: Image


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The finished images, in order; the last event of an image run."""

    images: tuple[Image, ...]
    seed: int | None
    """Of the first; None: the provider of a remote model did not say."""


@dataclass(frozen=True, slots=True)
class VideoResult:
    """The finished video; the last event of a video run."""

    frames: Frames
    fps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Word:
    """A word and its times, in seconds from the beginning."""

    text: str
    start_s: float
    end_s: float
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Speech:
    """The next piece of spoken audio, usually a sentence. A speech run is one or more of them."""

    samples: Samples
    sample_rate: int
    """Hertz."""
    words: tuple[Word, ...] = ()
    """With times from the beginning of the whole speech, if requested and known."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Language and duration of a recording; the first event of a transcription run."""

    language: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class Segment:
    """The next piece of a transcript, as soon as it is known. The fields are OpenAI's."""

    id: int
    start_s: float
    end_s: float
    text: str
    seek: int
    """Where the model's window began, in hundredths of a second."""
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True)
class SpeakerTurn:
    """A span of a recording, in seconds, in which one speaker speaks. Turns may overlap."""

    start_s: float
    end_s: float
    speaker: str


@dataclass(frozen=True, slots=True)
class Speakers:
    """All turns of a recording, by their start; the last event of a diarization run."""

    duration_s: float
    turns: tuple[SpeakerTurn, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A text of the request that was longer than the model takes. It comes before any result.

    The engine keeps it with the session, and does not pass it on.
    """

    param: str
    """The field of the request."""
    kept: int
    """Tokens that the model got."""
    given: int
    """Tokens of the text."""


@dataclass(frozen=True, slots=True)
class WorkingMemory:
    """The peak device bytes of a run, above the model's blocks.

    The engine keeps it for the next run of that shape, and does not pass it on.
    """

    nbytes: int


Event: TypeAlias = (
    Document
    | Frame
    | Progress
    | PartialImage
    | ImageResult
    | VideoResult
    | Speech
    | Heard
    | Segment
    | Speakers
    | Cut
    | WorkingMemory
)
"""Text models give one `Document`, or one or more `Frame`s. Image and video models give any number
of `Progress` and `PartialImage`, then the result. Speech models give `Speech`. Transcription models
give `Heard` and any number of `Segment`. Diarization models give any number of `Progress`, then
`Speakers`."""
