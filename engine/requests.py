"""What a caller asks of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, TypeAlias

from PIL.Image import Image


class Priority(IntEnum):
    """Order among waiting requests; lower is served first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingOptions:
    """How a request is scheduled: its place in the queue, and what it may move."""

    priority: Priority = Priority.NORMAL
    timeout_s: float | None = None
    """Seconds to wait for a grant; None takes the configured default."""
    keep_alive_s: float | None = None
    """Seconds the model stays once idle, from this request on; infinity is for ever, 0 lets it
    leave at once, and None leaves it as it is."""
    if_loaded_only: bool = False
    """Refuse at once, with `NotLoaded`, what would have to load the model."""
    no_evict: bool = False
    """Make no other model leave for this one: wait until there is room by itself, until the
    timeout at most."""


class TextOperation(StrEnum):
    """What can be asked of a language or embedding model."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSES = "responses"
    MESSAGES = "messages"
    COUNT_TOKENS = "count_tokens"
    EMBEDDINGS = "embeddings"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One request to a language or embedding model.

    `body` is the decoded JSON document as it came; the runtime checks it
    against its own wire schema (`Runtime.prepare`), because for text the wire
    format *is* the library's: vLLM parses and renders the OpenAI and Anthropic
    documents itself.
    """

    model: str
    operation: TextOperation
    body: Mapping[str, Any]
    request_id: str
    scheduling: SchedulingOptions = SchedulingOptions()


class ImageOperation(StrEnum):
    """What can be asked of an image model."""

    GENERATION = "image_generation"
    EDIT = "image_edit"
    VARIATION = "image_variation"


class VideoOperation(StrEnum):
    """What can be asked of a video model."""

    GENERATION = "video_generation"


class Quality(StrEnum):
    """Which of the model's profiles of steps and guidance to use; AUTO is the model's choice."""

    AUTO = "auto"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """One adapter of the model's LoRA folder and how strongly it acts (1.0: as trained)."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request to an image model. What is None takes the model's default."""

    model: str
    operation: ImageOperation
    request_id: str
    prompt: str = ""
    negative_prompt: str | None = None
    n: int = 1
    """Images to make."""
    width: int | None = None
    height: int | None = None
    """Pixels."""
    quality: Quality = Quality.AUTO
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    """Of the first image; the one after it takes the next number, and so on."""
    images: tuple[Image, ...] = ()
    """RGB; what an edit or variation starts from."""
    mask: Image | None = None
    """Greyscale of the size of the first image; white is painted anew."""
    strength: float | None = None
    """How far an edit may leave its image: above 0, at most 1 (all noise)."""
    control_image: Image | None = None
    """RGB; what the model's ControlNet follows."""
    reference_image: Image | None = None
    """RGB; what the model's IP-Adapter follows."""
    loras: tuple[LoraChoice, ...] = ()
    partial_images: int = 0
    """Previews to give on the way, evenly spread over the steps."""
    scheduling: SchedulingOptions = SchedulingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """One request to a video model. What is None takes the model's default."""

    model: str
    request_id: str
    operation: VideoOperation = VideoOperation.GENERATION
    prompt: str = ""
    negative_prompt: str | None = None
    image: Image | None = None
    """RGB; the first frame, for models that start from one."""
    width: int | None = None
    height: int | None = None
    """Pixels."""
    num_frames: int | None = None
    seconds: float | None = None
    """Another way to give `num_frames`: times `fps`, rounded."""
    fps: int | None = None
    """Frames a second of the file; a model that knows about time is told too."""
    quality: Quality = Quality.AUTO
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    motion: int | None = None
    """SVD's motion bucket, 0 to 255: how much moves."""
    loras: tuple[LoraChoice, ...] = ()
    scheduling: SchedulingOptions = SchedulingOptions(priority=Priority.BATCH)


class SpeechOperation(StrEnum):
    """What can be asked of a speech model."""

    SPEECH = "speech"


class TranscriptionOperation(StrEnum):
    """What can be asked of a transcription model."""

    TRANSCRIPTION = "transcription"
    TRANSLATION = "translation"
    """Into English."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechRequest:
    """One request to a speech model. What is None takes the model's default."""

    model: str
    text: str
    request_id: str
    operation: SpeechOperation = SpeechOperation.SPEECH
    voice: str | None = None
    """A voice of the model, an alias that its configuration maps to one, or a blend `a+b`."""
    voice_sample: Path | None = None
    """A recording to clone the voice of, for models that can; goes before `voice`."""
    language: str | None = None
    """ISO 639-1, with or without a region, as in `en` or `en-gb`."""
    speed: float = 1.0
    """0.25 to 4; 1 is the model's own."""
    word_times: bool = False
    """Whether to tell when each word is spoken, where the model knows."""
    seed: int | None = None
    scheduling: SchedulingOptions = SchedulingOptions(priority=Priority.INTERACTIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionRequest:
    """One request to a transcription model."""

    model: str
    audio: bytes
    """A file in any container and codec that PyAV opens."""
    request_id: str
    operation: TranscriptionOperation = TranscriptionOperation.TRANSCRIPTION
    language: str | None = None
    """ISO 639-1; None lets the model find out."""
    prompt: str | None = None
    """Text that went before, which the model goes on from."""
    temperature: float = 0.0
    """0 to 1; at 0 the model rises it by itself where it is unsure."""
    word_times: bool = False
    vad: bool = False
    """Leave out what is not speech before the model hears it."""
    hotwords: str | None = None
    """Words to expect."""
    scheduling: SchedulingOptions = SchedulingOptions(priority=Priority.INTERACTIVE)


Request: TypeAlias = (
    TextRequest | ImageRequest | VideoRequest | SpeechRequest | TranscriptionRequest
)


Operation: TypeAlias = (
    TextOperation | ImageOperation | VideoOperation | SpeechOperation | TranscriptionOperation
)
