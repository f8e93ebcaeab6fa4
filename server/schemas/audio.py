"""OpenAI's requests and answers for speech and transcripts, with additions of ours."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from engine.events import Heard, Segment, Word
from engine.media.audio_output import AudioFormat
from engine.media.spoken import SpokenSegment
from engine.media.voices import ClonedVoice
from engine.requests import (
    SchedulingOptions,
    SpeechRequest,
    TranscriptionOperation,
    TranscriptionRequest,
)
from engine.runtimes.base import Voice
from server.languages import LANGUAGES
from server.schemas.fields import (
    FILE_MARK,
    Body,
    ModelName,
    Prompt,
    RequiredPrompt,
    Seed,
    as_list,
    single,
)

MAX_INPUT_CHARS = 500_000
"""Some nine hours of speech. The limit of a model is its runtime's, and is lower."""
MAX_NAME_CHARS = 256
MAX_LANGUAGE_CHARS = 16

DIARIZED = "diarized_json"
"""The format of transcripts that say who speaks."""

MAX_KNOWN_SPEAKERS = 4
"""OpenAI's limit."""

NO_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
"""OpenAI's stream of speech ends with token counts. These models have no tokens."""


def _read_file(value: Any) -> bytes:
    value = single(value)
    if not isinstance(value, bytes):
        raise ValueError("it is one uploaded file of a multipart form")
    if not value:
        raise ValueError("the file is empty")
    return value


def _read_voice(value: Any) -> Any:
    return value["id"] if isinstance(value, dict) and value.keys() == {"id"} else value


def _without_default(schema: dict[str, Any]) -> None:
    # What is written there is not the Boolean that it becomes.
    del schema["default"]


def _read_chunking(value: Any) -> bool:
    if value not in ("auto", {"type": "server_vad"}):
        # The numbers of server_vad belong to another detector than ours.
        raise ValueError("it is auto, or server_vad without settings")
    return True


def _read_reference(value: Any) -> bytes:
    head, comma, body = value.partition(",") if isinstance(value, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ValueError("it is a data: URL with base64")
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ValueError("it is not valid base64") from error
    if not data:
        raise ValueError("it is empty")
    return data


AudioFile: TypeAlias = Annotated[
    bytes, PlainValidator(_read_file), WithJsonSchema({"type": "string", FILE_MARK: True})
]
"""The bytes of an upload that is not empty."""

SpeakerReference: TypeAlias = Annotated[
    bytes, PlainValidator(_read_reference), WithJsonSchema({"type": "string", "pattern": "^data:"})
]
"""The bytes of a recording in a data: URL."""

_NAME_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
_VOICE_SCHEMA = {
    "anyOf": [
        _NAME_SCHEMA,
        {
            "type": "object",
            "properties": {"id": _NAME_SCHEMA},
            "required": ["id"],
            "additionalProperties": False,
        },
    ]
}

_CHUNKING_SCHEMA = {
    "anyOf": [
        {"const": "auto"},
        {
            "type": "object",
            "properties": {"type": {"const": "server_vad"}},
            "required": ["type"],
            "additionalProperties": False,
        },
    ]
}

VoiceName: TypeAlias = Annotated[
    # Within: what comes after a validator of ours is not known to be text, and has "items".
    Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)],
    BeforeValidator(_read_voice),
    WithJsonSchema(_VOICE_SCHEMA),
]
"""OpenAI's custom voices are objects with an `id`. Here the id alone works too."""


def _read_language(value: Any) -> Any:
    """A code for a name; None for none and for `auto`."""
    if not isinstance(value, str):
        return value
    asked = value.strip().lower()
    return None if asked in ("", "auto") else _CODES.get(asked, value.strip())


def _read_heard_language(value: Any) -> Any:
    """The same, and without the region, which Whisper does not know."""
    value = _read_language(value)
    if not isinstance(value, str):
        return value
    primary = value.lower().replace("_", "-").partition("-")[0]
    return primary if primary in LANGUAGES else value


_CODES = {name: code for code, name in LANGUAGES.items()}

Language: TypeAlias = Annotated[
    Annotated[str, Field(min_length=2, max_length=MAX_LANGUAGE_CHARS)] | None,
    BeforeValidator(_read_language),
]
"""A code (ISO 639-1) with or without a region, or an English name. `auto` is the default."""

HeardLanguage: TypeAlias = Annotated[
    Annotated[str, Field(min_length=2, max_length=MAX_LANGUAGE_CHARS)] | None,
    BeforeValidator(_read_heard_language),
]


class SpeechBody(Body):
    """`POST /v1/audio/speech`."""

    model: ModelName
    input: str = Field(min_length=1, max_length=MAX_INPUT_CHARS)
    voice: VoiceName | None = None
    response_format: AudioFormat = "mp3"
    speed: float = Field(default=1.0, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: str = Field(default="", max_length=4096)
    """Without effect, as in OpenAI's own tts-1."""
    # Additions of ours:
    language: Language = None
    word_times: bool = False
    seed: Seed | None = None

    @field_validator("input")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("there is nothing to say")
        return value

    @field_validator("word_times")
    @classmethod
    def _only_events_carry_words(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("stream_format") == "audio":
            raise ValueError("words have a place in events only; ask for stream_format sse")
        return value

    def to_request(
        self, voice_sample: Path | None, *, request_id: str, scheduling: SchedulingOptions
    ) -> SpeechRequest:
        """The engine's form of it. With `voice_sample`, `voice` is a cloned voice."""
        return SpeechRequest(
            model=self.model,
            text=self.input,
            request_id=request_id,
            voice=self.voice if voice_sample is None else None,
            voice_sample=voice_sample,
            language=self.language,
            speed=self.speed,
            word_times=self.word_times,
            seed=self.seed,
            scheduling=scheduling,
        )


class VoiceBody(Body):
    """`POST /v1/audio/voices`."""

    name: str
    audio_sample: AudioFile
    consent: str = ""
    """Without effect: the operator of the server is responsible for its recordings."""


class VoicesQuery(Body):
    """The query of `GET /v1/audio/voices`."""

    model: str | None = Field(default=None, min_length=1)


def voice_document(voice: Voice, model: str) -> dict[str, Any]:
    """A voice of the model `model`."""
    return {
        "id": voice.id,
        "object": "audio.voice",
        "name": voice.name,
        "model": model,
        "language": voice.language,
    }


def voice_choices(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Ids and names, as Open WebUI reads them; a voice of several models is there once."""
    names = {each["id"]: each["name"] for each in reversed(documents)}
    return [{"id": each, "name": names[each]} for each in dict.fromkeys(d["id"] for d in documents)]


def cloned_voice_document(voice: ClonedVoice) -> dict[str, Any]:
    """OpenAI's voice object, for a voice of every model that can clone."""
    return {
        "id": voice.id,
        "object": "audio.voice",
        "name": voice.name,
        "created_at": voice.created_at,
    }


def words_document(words: Sequence[Word]) -> list[dict[str, Any]]:
    """OpenAI's word objects; times in seconds."""
    return [{"word": word.text.strip(), "start": word.start_s, "end": word.end_s} for word in words]


class RecordingBody(Body):
    """What transcriptions and translations both take."""

    operation: ClassVar[TranscriptionOperation]

    file: AudioFile
    model: ModelName
    prompt: Prompt | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json", "diarized_json"] = "json"
    temperature: float = Field(default=0.0, ge=0, le=1)
    # Additions of ours:
    vad: bool = False
    hotwords: RequiredPrompt | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events."""
        return False

    @property
    def diarizes(self) -> bool:
        """Whether the answer says who speaks."""
        return False

    def to_request(self, *, request_id: str, scheduling: SchedulingOptions) -> TranscriptionRequest:
        """The engine's form of it."""
        return TranscriptionRequest(
            model=self.model,
            audio=self.file,
            request_id=request_id,
            operation=self.operation,
            prompt=self.prompt,
            temperature=self.temperature,
            vad=self.vad,
            hotwords=self.hotwords,
            scheduling=scheduling,
        )

    def document(self, heard: Heard, segments: Sequence[Segment]) -> dict[str, Any]:  # noqa: ARG002
        """The short answer."""
        return {"text": transcript_text(segments)}

    def verbose_document(self, heard: Heard, segments: Sequence[Segment]) -> dict[str, Any]:
        """The long answer."""
        return {
            "task": "translate",
            "language": "english",  # "always", says the contract
            "duration": heard.duration_s,
            "text": transcript_text(segments),
            "segments": [_segment_document(segment) for segment in segments],
        }


class TranslationBody(RecordingBody):
    """`POST /v1/audio/translations`."""

    operation = TranscriptionOperation.TRANSLATION

    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"


class TranscriptionBody(RecordingBody):
    """`POST /v1/audio/transcriptions`."""

    operation = TranscriptionOperation.TRANSCRIPTION

    language: HeardLanguage = None
    stream: bool = False
    include: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    timestamp_granularities: Annotated[
        list[Literal["word", "segment"]], BeforeValidator(as_list)
    ] = Field(default_factory=list)
    chunking_strategy: Annotated[
        bool, PlainValidator(_read_chunking), WithJsonSchema(_CHUNKING_SCHEMA)
    ] = Field(default=False, json_schema_extra=_without_default)
    """`auto`: a voice activity detector cuts the recording."""
    keywords: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]],
        BeforeValidator(as_list),
        Field(max_length=100),
    ] = Field(default_factory=list)
    """OpenAI's newer name of `hotwords`."""
    known_speaker_names: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]],
        BeforeValidator(as_list),
        Field(max_length=MAX_KNOWN_SPEAKERS),
    ] = Field(default_factory=list)
    known_speaker_references: Annotated[
        list[SpeakerReference], BeforeValidator(as_list), Field(max_length=MAX_KNOWN_SPEAKERS)
    ] = Field(default_factory=list, validate_default=True)
    """A recording of each of these speakers alone."""

    @field_validator("stream")
    @classmethod
    def _events_carry_text(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("response_format") not in ("json", "text", "diarized_json"):
            raise ValueError(
                "the events of a stream carry text; ask for json, text or diarized_json"
            )
        return value

    @field_validator("include")
    @classmethod
    def _nothing_to_include(cls, value: list[str]) -> list[str]:
        if value:
            raise ValueError("there is nothing that can be included; logprobs are not supported")
        return value

    @field_validator("timestamp_granularities")
    @classmethod
    def _only_verbose_answers_have_times(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if value and info.data.get("response_format") != "verbose_json":
            raise ValueError("response_format must be verbose_json")
        return value

    @field_validator("keywords")
    @classmethod
    def _hotwords_are_given_once(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if value and info.data.get("hotwords") is not None:
            raise ValueError("give keywords or hotwords, not both")
        return value

    @field_validator("known_speaker_names", "known_speaker_references")
    @classmethod
    def _speakers_are_told_apart(cls, value: list[Any], info: ValidationInfo) -> list[Any]:
        if value and info.data.get("response_format") != DIARIZED:
            raise ValueError(f"response_format must be {DIARIZED}")
        return value

    @field_validator("known_speaker_names")
    @classmethod
    def _names_differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("two speakers have one name")
        return value

    @field_validator("known_speaker_references")
    @classmethod
    def _each_name_has_a_reference(cls, value: list[bytes], info: ValidationInfo) -> list[bytes]:
        names = info.data.get("known_speaker_names")
        if names is not None and len(value) != len(names):
            raise ValueError("there is one for each of known_speaker_names")
        return value

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.stream

    @property
    def diarizes(self) -> bool:
        """Whether the answer says who speaks."""
        return self.response_format == DIARIZED

    def to_request(self, *, request_id: str, scheduling: SchedulingOptions) -> TranscriptionRequest:
        """The engine's form of it."""
        request = super().to_request(request_id=request_id, scheduling=scheduling)
        return replace(
            request,
            language=self.language,
            word_times="word" in self.timestamp_granularities,
            vad=self.vad or self.chunking_strategy,
            hotwords=", ".join(self.keywords) or self.hotwords,
        )

    def document(self, heard: Heard, segments: Sequence[Segment]) -> dict[str, Any]:
        """The short answer, with the seconds of the recording."""
        return {**super().document(heard, segments), "usage": _usage(heard)}

    def verbose_document(self, heard: Heard, segments: Sequence[Segment]) -> dict[str, Any]:
        """The long answer: segments, words or both, as requested."""
        document = super().verbose_document(heard, segments)
        if self.timestamp_granularities and "segment" not in self.timestamp_granularities:
            del document["segments"]
        if "word" in self.timestamp_granularities:
            words = [word for segment in segments for word in segment.words]
            document["words"] = words_document(words)
        return {
            **document,
            "task": "transcribe",
            "language": LANGUAGES.get(heard.language, heard.language),
            "usage": _usage(heard),
        }


def diarized_document(
    heard: Heard, segments: Sequence[Segment], spoken: Sequence[SpokenSegment]
) -> dict[str, Any]:
    """The answer with speakers."""
    return {
        "task": "transcribe",
        "duration": heard.duration_s,
        "text": transcript_text(segments),
        "segments": spoken_documents(spoken),
        "usage": _usage(heard),
    }


def spoken_documents(spoken: Sequence[SpokenSegment]) -> list[dict[str, Any]]:
    """OpenAI's segments with speakers, which are its events as well."""
    return [
        {
            "type": "transcript.text.segment",
            "id": f"seg_{number:03}",
            "start": each.start_s,
            "end": each.end_s,
            "text": each.text,
            "speaker": each.speaker,
        }
        for number, each in enumerate(spoken, start=1)
    ]


def transcript_text(segments: Sequence[Segment]) -> str:
    """The whole text. In languages with spaces, a segment begins with one."""
    return "".join(segment.text for segment in segments).strip()


def _usage(heard: Heard) -> dict[str, Any]:
    return {"type": "duration", "seconds": heard.duration_s}


def _segment_document(segment: Segment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "seek": segment.seek,
        "start": segment.start_s,
        "end": segment.end_s,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }
