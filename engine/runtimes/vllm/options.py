"""What the configuration says of a vLLM model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from engine.section import Section
from engine.units import Size


class VllmOptions(Section):
    """Options of a vLLM model; the names are vLLM's where it has one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None takes the checkpoint's own length."""
    kv_cache: Size | None = Field(default=None)
    """Bytes of KV cache; None takes room for four requests of full length."""
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=16)
    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs; None: on a CPU only."""
    quantization: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: Path | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    """What the chat template is given, as `{enable_thinking: false}`; a request's own go before."""
    seed: int = 0
    revision: str | None = None
