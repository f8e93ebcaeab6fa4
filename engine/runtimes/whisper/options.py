"""What the configuration says of a transcription model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.section import Section
from engine.units import Duration

ComputeType = Literal[
    "auto",
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
]


class WhisperOptions(Section):
    """Options of a transcription model."""

    compute_type: ComputeType = "auto"
    """The type of the loaded weights. `auto`: int8 on a CPU, float16 on a GPU."""
    revision: str | None = None
    language: str | None = None
    """The language of requests that name none. None: the model detects it."""
    beam_size: int = Field(default=5, ge=1, le=100)
    cpu_threads: int | None = Field(default=None, ge=1)
    """None: the processor's cores, four at most."""
    batch_after: Duration | None = 600.0
    """Longer recordings, in seconds, go through the batched pipeline; None: none does.

    That pipeline cuts a recording at pauses, with or without `vad` in the request, and runs
    several windows at once. They do not see the text before them, and are not tried again at a
    higher temperature.
    """
    batch_size: int = Field(default=8, ge=1, le=256)
    """Windows at once in the batched pipeline."""
    max_batch: int | None = Field(default=None, ge=1, le=64)
    """Recordings at once. None: 4 on a CPU, 8 on a GPU.

    Their windows share calls of the encoder and of the decoder, each where its batches are faster.
    CTranslate2 cannot share those of bfloat16, so with it one recording runs at once.
    """
    max_seconds: float = Field(default=4 * 3600.0, gt=0)
    """A longer recording is refused."""


def run_compute_type(options: WhisperOptions, device: str) -> str:
    """The type of the loaded weights, where the options say `auto` too."""
    if options.compute_type != "auto":
        return options.compute_type
    return "float16" if device == "cuda" else "int8"


def run_max_batch(options: WhisperOptions, device: str) -> int:
    """How many recordings run at once."""
    if run_compute_type(options, device).endswith("bfloat16"):
        return 1  # NumPy has no such type, and encoded windows are joined in NumPy
    return options.max_batch or (8 if device == "cuda" else 4)
