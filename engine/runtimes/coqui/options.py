"""What the configuration says of a Coqui model."""

from __future__ import annotations

from pydantic import Field

from engine.runtimes.common.speech_options import SentenceOptions


class CoquiOptions(SentenceOptions):
    """Options of a VITS or XTTS model. The last five are XTTS's; None takes the checkpoint's."""

    stream_chunk_tokens: int = Field(default=20, ge=4)
    """Tokens of 46 ms each in one piece of audio. Fewer are heard sooner, and cost more."""
    temperature: float | None = Field(default=None, gt=0, le=2)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1)
