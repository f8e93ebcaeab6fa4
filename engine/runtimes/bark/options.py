"""What the configuration says of a Bark model."""

from __future__ import annotations

from typing import Literal

from engine.runtimes.common.speech_options import SentenceOptions


class BarkOptions(SentenceOptions):
    """Options of a Bark model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
