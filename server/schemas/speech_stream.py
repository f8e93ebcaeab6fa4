"""What a client of `/v1/audio/speech/stream` sends, in the form of vLLM-omni's endpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.media.audio_output import AudioFormat
from server.schemas.audio import Language, VoiceName
from server.schemas.fields import Body, Seed

MAX_MESSAGE_CHARS = 128 * 1024
"""As at vLLM-omni."""


class SpeechConfig(Body):
    """`session.config`: how the text is spoken from then on."""

    type: Literal["session.config"] = "session.config"
    model: str | None = Field(default=None, min_length=1)
    """None: the first speech model of the configuration."""
    voice: VoiceName | None = None
    response_format: AudioFormat = "wav"
    speed: float = Field(default=1.0, ge=0.25, le=4)
    language: Language = None
    seed: Seed | None = None
    stream_audio: bool = False
    """Whether the audio of a sentence comes while it is made, or as one frame."""
    split_granularity: Literal["none", "sentence", "clause"] = "clause"
    """Where text is cut. The first clause is short, as somebody waits for it."""
    instructions: str = Field(default="", max_length=4096)
    """Without effect, as in `POST /v1/audio/speech`."""
    task_type: Literal["CustomVoice"] | None = None
    """Without effect: `voice` names what it names at vLLM-omni with this type, or a clone."""
    word_timestamps: Literal[False] = False


class InputText(Body):
    """`input.text`: a piece of text, cut anywhere."""

    type: Literal["input.text"] = "input.text"
    text: str = Field(max_length=MAX_MESSAGE_CHARS)
