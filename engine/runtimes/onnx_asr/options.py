"""What the configuration says of a transcription model in ONNX."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from engine.section import Section

ModelType: TypeAlias = Literal[
    "nemo-conformer-ctc",
    "nemo-conformer-rnnt",
    "nemo-conformer-tdt",
    "nemo-conformer-aed",
]
"""The kinds of model, by the library's names. The last is Canary, the others are Parakeet."""


class OnnxAsrOptions(Section):
    """Options of a transcription model in ONNX."""

    model_type: ModelType | None = None
    """None: what `config.json` of the model says."""
    quantization: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    """Which of the files to take, as in `encoder-model.int8.onnx`; None: those without such."""
    revision: str | None = None
    language: str | None = Field(default=None, pattern=r"^[a-z]{2,3}$")
    """The language of requests that name none. Only Canary acts on it, which takes English
    otherwise. Of other models it is what transcripts say."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """None: the processor's cores, four at most."""
    window_s: float = Field(default=30.0, ge=5, le=600)
    """A longer recording is cut at pauses into windows of this length at most."""
    max_seconds: float = Field(default=4 * 3600.0, gt=0)
    """A longer recording is refused."""
