"""The requests that the engine serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL.Image import Image

from engine.caller import NOBODY, Caller

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Priority(IntEnum):
    """Order among waiting requests; lower is served first."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingOptions:
    """How a request is scheduled: its priority, its timeout, and which models may move for it."""

    priority: Priority = Priority.NORMAL
    timeout_s: float | None = None
    """Seconds to wait for a grant; None takes the configured default."""
    keep_alive_s: float | None = None
    """From this request on, how many seconds the model stays once it is idle. Infinity is for ever;
    with 0 it leaves at once; None changes nothing."""
    if_loaded_only: bool = False
    """Refuse the request at once, with `NotLoaded`, if the model would have to be loaded."""
    no_evict: bool = False
    """No other model may leave for this one. The request waits for room until its timeout."""
    max_wait_s: float | None = None
    """Seconds to wait for the model before its fallbacks are tried; None takes the model's own."""
    caller: Caller = NOBODY
    """Whose request it is."""


class TextOperation(StrEnum):
    """The operations of a language or embedding model."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSES = "responses"
    MESSAGES = "messages"
    COUNT_TOKENS = "count_tokens"
    INPUT_TOKENS = "input_tokens"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    SCORE = "score"
    CLASSIFY = "classify"
    MODERATION = "moderation"
    FILL_MASK = "fill_mask"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"


READING = frozenset(
    {
        TextOperation.EMBEDDINGS,
        TextOperation.RERANK,
        TextOperation.SCORE,
        TextOperation.CLASSIFY,
        TextOperation.MODERATION,
        TextOperation.FILL_MASK,
    }
)
"""Operations that read texts and write none. Equal requests have equal answers."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One request to a language or embedding model.

    `body` is the decoded JSON document of the client. The runtime checks it against its own wire
    schema (`Runtime.prepare`). For text the wire format *is* that of the library: vLLM parses and
    renders the OpenAI and Anthropic documents.
    """

    model: str
    operation: TextOperation
    body: Mapping[str, Any]
    request_id: str
    scheduling: SchedulingOptions = SchedulingOptions()
    adapter: str | None = None
    """The LoRA of the model that answers. The engine takes it from a name `MODEL:ADAPTER`."""
    history: int = 0
    """Of a response: how many items of its input the server kept from earlier turns. Another model
    may have written them."""


class ImageOperation(StrEnum):
    """The operations of an image model."""

    GENERATION = "image_generation"
    EDIT = "image_edit"
    VARIATION = "image_variation"


class VideoOperation(StrEnum):
    """The operations of a video model."""

    GENERATION = "video_generation"


class Quality(StrEnum):
    """The profile of steps and guidance; AUTO takes the model's default."""

    AUTO = "auto"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """One adapter of the model's LoRA folder, and its weight (1.0: as trained)."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request to an image model. Fields that are None take the model's defaults."""

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
    """The seed of the first image; each further image takes the next number."""
    images: tuple[Image, ...] = ()
    """RGB; an edit or variation starts from these."""
    mask: Image | None = None
    """Greyscale of the size of the first image; white is painted anew."""
    strength: float | None = None
    """How far an edit may leave its image: above 0, at most 1 (all noise)."""
    control_image: Image | None = None
    """RGB; the input of the model's ControlNet."""
    reference_image: Image | None = None
    """RGB; the input of the model's IP-Adapter."""
    loras: tuple[LoraChoice, ...] = ()
    partial_images: int = 0
    """The number of previews, evenly spread over the steps."""
    scheduling: SchedulingOptions = SchedulingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """One request to a video model. Fields that are None take the model's defaults."""

    model: str
    request_id: str
    operation: VideoOperation = VideoOperation.GENERATION
    prompt: str = ""
    negative_prompt: str | None = None
    image: Image | None = None
    """RGB; the first frame, for image-to-video models."""
    width: int | None = None
    height: int | None = None
    """Pixels."""
    num_frames: int | None = None
    seconds: float | None = None
    """Another way to give `num_frames`: times `fps`, rounded."""
    fps: int | None = None
    """Frames per second of the file; models that take a frame rate get it as well."""
    quality: Quality = Quality.AUTO
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    motion: int | None = None
    """SVD's motion bucket, 0 to 255: the amount of motion."""
    loras: tuple[LoraChoice, ...] = ()
    scheduling: SchedulingOptions = SchedulingOptions(priority=Priority.BATCH)


class SpeechOperation(StrEnum):
    """The operations of a speech model."""

    SPEECH = "speech"


class TranscriptionOperation(StrEnum):
    """The operations of a transcription model."""

    TRANSCRIPTION = "transcription"
    TRANSLATION = "translation"
    """Into English."""


class DiarizationOperation(StrEnum):
    """The operations of a model that tells speakers apart."""

    DIARIZATION = "diarization"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechRequest:
    """One request to a speech model. Fields that are None take the model's defaults."""

    model: str
    text: str
    request_id: str
    operation: SpeechOperation = SpeechOperation.SPEECH
    voice: str | None = None
    """A voice of the model, an alias that its configuration maps to one, or a blend `a+b`."""
    voice_sample: Path | None = None
    """A recording of the voice to clone, for models that can; it overrides `voice`."""
    language: str | None = None
    """ISO 639-1, with or without a region, as in `en` or `en-gb`."""
    speed: float = 1.0
    """0.25 to 4; 1 is the model's own."""
    word_times: bool = False
    """Whether to report the times of words, where the model knows them."""
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
    """ISO 639-1; None: the model detects it."""
    prompt: str | None = None
    """Text before the recording, as context for the model."""
    temperature: float = 0.0
    """0 to 1; at 0 the model raises it where it is unsure."""
    word_times: bool = False
    vad: bool = False
    """Remove everything but speech before the transcription."""
    hotwords: str | None = None
    """Words to expect."""
    scheduling: SchedulingOptions = SchedulingOptions(priority=Priority.INTERACTIVE)


@dataclass(frozen=True, slots=True)
class KnownSpeaker:
    """A speaker whose voice the caller knows."""

    name: str
    samples: NDArray[np.float32] = field(compare=False)
    """Of the voice alone: mono, -1 to 1, at 16 kHz."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiarizationRequest:
    """One request to a model that says who speaks when."""

    model: str
    audio: bytes
    """A file in any container and codec that PyAV opens."""
    request_id: str
    operation: DiarizationOperation = DiarizationOperation.DIARIZATION
    known_speakers: tuple[KnownSpeaker, ...] = ()
    """With different names."""
    scheduling: SchedulingOptions = SchedulingOptions(priority=Priority.INTERACTIVE)


Request: TypeAlias = (
    TextRequest
    | ImageRequest
    | VideoRequest
    | SpeechRequest
    | TranscriptionRequest
    | DiarizationRequest
)


def adapters_of(request: Request) -> tuple[str, ...]:
    """The LoRAs that a request uses."""
    if isinstance(request, TextRequest):
        return () if request.adapter is None else (request.adapter,)
    if isinstance(request, ImageRequest | VideoRequest):
        return tuple(choice.name for choice in request.loras)
    return ()


Operation: TypeAlias = (
    TextOperation
    | ImageOperation
    | VideoOperation
    | SpeechOperation
    | TranscriptionOperation
    | DiarizationOperation
)
