"""What the configuration says of a model that tells speakers apart."""

from __future__ import annotations

from pydantic import Field

from engine.section import Section

_FILE = r"^[\w+-][\w+.-]*(/[\w+-][\w+.-]*)*\.onnx$"


class SherpaDiarizationOptions(Section):
    """Options of a pair of models: one finds turns, the other compares voices."""

    segmentation: str = Field(default="model.onnx", pattern=_FILE)
    """The file that finds turns, in `source`: pyannote's segmentation in ONNX."""
    revision: str | None = None
    embedding_source: str | None = Field(default=None, min_length=1)
    """Where the file that compares voices is; None: in `source`."""
    embedding: str = Field(default="embedding.onnx", pattern=_FILE)
    """That file: a model of WeSpeaker, 3D-Speaker or NeMo in ONNX, with sherpa-onnx's metadata."""
    embedding_revision: str | None = None
    threshold: float = Field(default=0.5, gt=0, le=2)
    """The cosine distance above which two voices are two speakers. A larger one finds fewer."""
    known_threshold: float = Field(default=0.5, ge=0, lt=1)
    """The cosine similarity from which a speaker is one of those that a request knows."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """None: the processor's cores, four at most."""
    max_seconds: float = Field(default=3600.0, gt=0, le=4 * 3600.0)
    """A longer recording is refused. Comparing its voices takes memory by its square."""
