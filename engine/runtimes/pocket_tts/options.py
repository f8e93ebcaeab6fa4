"""What the configuration says of a Pocket TTS model."""

from __future__ import annotations

from pydantic import Field

from engine.runtimes.common.speech_options import SpeechOptions


class PocketOptions(SpeechOptions):
    """Options of a Pocket TTS model."""

    config: str | None = None
    """The library's name of the model, such as `english` or `french_24l`. Its files are then laid
    out as in Kyutai's repositories. None: the folder has a `config.yaml`, and the files beside."""
    voice_cloning: bool | None = None
    """Whether the weights can clone. None: unless the name of the source says that they cannot."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None takes what the library recommends for the model."""
    stream_frames: int = Field(default=4, ge=1, le=64)
    """Frames of 80 ms in one piece of audio. The first piece of a request has one frame."""
