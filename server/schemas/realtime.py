"""The session and the client's events of `/v1/realtime`, OpenAI's GA protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from server.schemas.audio import HeardLanguage, VoiceName
from server.schemas.fields import Body

MAX_TEXT_CHARS = 1_000_000
MAX_TOOLS = 128
MAX_CONTENT = 64
"""Parts of one item."""


def _read_format(value: Any) -> Any:
    # OpenAI's documents write the default without a rate too.
    if isinstance(value, Mapping) and value.get("type") == "audio/pcm":
        return {"rate": 24_000, **value}
    return value


class AudioFormat(Body):
    """The encoding of a session's audio: 16 bits at 24 kHz, or G.711 at 8 kHz."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[24_000, 8_000] | None = None

    @model_validator(mode="after")
    def _check_rate(self) -> AudioFormat:
        if self.rate not in (None, 24_000 if self.type == "audio/pcm" else 8_000):
            raise ValueError(f"{self.type} has another rate")
        return self

    @property
    def codec(self) -> Literal["pcm", "pcmu", "pcma"]:
        """Its short name."""
        short: dict[str, Literal["pcm", "pcmu", "pcma"]] = {
            "audio/pcm": "pcm",
            "audio/pcmu": "pcmu",
            "audio/pcma": "pcma",
        }
        return short[self.type]


FormatField: TypeAlias = Annotated[AudioFormat, BeforeValidator(_read_format)]


class ServerVad(Body):
    """Turns that end with a silence."""

    type: Literal["server_vad"]
    threshold: float = Field(default=0.5, gt=0, lt=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5_000)
    silence_duration_ms: int = Field(default=500, ge=64, le=10_000)
    idle_timeout_ms: int | None = Field(default=None, ge=5_000, le=30_000)
    create_response: bool = True
    interrupt_response: bool = True


class SemanticVad(Body):
    """Turns that end sooner after a whole sentence."""

    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True


TurnDetection: TypeAlias = Annotated[ServerVad | SemanticVad, Field(discriminator="type")]


class Transcription(Body):
    """Whether and how the client gets transcripts of what was said."""

    model: str | None = Field(default=None, min_length=1)
    """None: the first transcription model of the configuration."""
    language: HeardLanguage = None
    prompt: str | None = Field(default=None, max_length=32_000)


class InputAudio(Body):
    """What the client sends."""

    format: FormatField = AudioFormat()
    transcription: Transcription | None = None
    turn_detection: TurnDetection | None = ServerVad(type="server_vad")
    noise_reduction: None = None
    """Refused: nothing here reduces noise."""


class OutputAudio(Body):
    """What the client gets."""

    format: FormatField = AudioFormat()
    voice: VoiceName | None = None
    speed: float = Field(default=1.0, ge=0.25, le=1.5)
    model: str | None = Field(default=None, min_length=1)
    """An addition of ours. None: the first speech model of the configuration."""


class Audio(Body):
    """Both directions."""

    input: InputAudio = InputAudio()
    output: OutputAudio = OutputAudio()


class FunctionTool(Body):
    """A function that the client runs."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class NamedFunction(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: str = Field(min_length=1)


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | NamedFunction
MaxTokens: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)] | Literal["inf"]
Modalities: TypeAlias = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=2)]


class RealtimeSession(Body):
    """`session` of a conversation."""

    type: Literal["realtime"] = "realtime"
    model: str | None = Field(default=None, min_length=1)
    """Needed, but the address of the connection may name it."""
    instructions: str = Field(default="", max_length=MAX_TEXT_CHARS)
    output_modalities: Modalities = Field(default=["audio"])
    audio: Audio = Audio()
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: MaxTokens = "inf"
    truncation: Literal["disabled"] | None = None
    """Nothing is left out of a conversation that is too long."""
    tracing: Literal["auto"] | None = None
    """Without effect: traces go where `server.otlp_endpoint` says."""
    include: Annotated[list[str], Field(max_length=0)] | None = None


class TranscriptionInput(InputAudio):
    """What the client of a transcription sends."""


class TranscriptionAudio(Body):
    """There is no way out."""

    input: TranscriptionInput = TranscriptionInput(transcription=Transcription())


class TranscriptionSession(Body):
    """`session` that only transcribes."""

    type: Literal["transcription"]
    audio: TranscriptionAudio = TranscriptionAudio()
    include: Annotated[list[str], Field(max_length=0)] | None = None


Session: TypeAlias = RealtimeSession | TranscriptionSession


class ResponseOutput(Body):
    """The audio of one response."""

    format: FormatField | None = None
    voice: VoiceName | None = None


class ResponseAudio(Body):
    """The audio of one response."""

    output: ResponseOutput = ResponseOutput()


class ResponseOptions(Body):
    """What a response may have otherwise than its session."""

    instructions: str | None = Field(default=None, max_length=MAX_TEXT_CHARS)
    output_modalities: Modalities | None = None
    audio: ResponseAudio | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: MaxTokens | None = None
    conversation: Literal["auto", "none"] = "auto"
    input: Annotated[list[dict[str, Any]], Field(max_length=1_000)] | None = None
    metadata: dict[str, str] | None = None
