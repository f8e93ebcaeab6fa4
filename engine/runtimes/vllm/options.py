"""What the configuration says of a vLLM model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from engine.section import Section
from engine.units import Size

LoraName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
"""A colon would end the name of the model in `MODEL:LORA`."""


class ModerationOptions(Section):
    """How a classifier answers `/v1/moderations`."""

    categories: Mapping[str, str | None] = Field(min_length=1)
    """The category for each label of the model, OpenAI's or one of your own; null is harmless."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """The score from which a category is flagged."""


class VllmOptions(Section):
    """Options of a vLLM model; the names are vLLM's where it has one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and answer together; None takes the checkpoint's own length."""
    kv_cache: Size | None = Field(default=None)
    """Bytes of KV cache; None takes room for four requests of full length."""
    kv_host: Size | None = Field(default=None)
    """Host memory for the prefix cache while the KV cache is off the device; None: it is lost.

    It counts in `engine.host_memory`, and goes first when something else wants that.
    """
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
    prompts: Mapping[str, str] | None = None
    """Texts before an input that is embedded, as `{query: "query: ", document: "passage: "}`.

    They go over those of `config_sentence_transformers.json`.
    """
    is_matryoshka: bool | None = None
    """Whether a request may choose the `dimensions` of an embedding; None asks the checkpoint."""
    matryoshka_dimensions: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """The `dimensions` that a request may choose; None asks the checkpoint."""
    reranker: Literal["auto", "qwen3", "plain"] = "auto"
    """The form in which a reranker reads a pair; `auto` asks the checkpoint.

    `qwen3` is the prompt of Qwen3-Reranker. `plain` is query and document, with the tokenizer's
    separator.
    """
    moderation: ModerationOptions | None = None
    """How a classifier answers `/v1/moderations`; None: it does not."""
    seed: int = 0
    revision: str | None = None
    loras: Path | None = None
    """A folder of LoRAs: `NAME/` with `adapter_config.json` and `adapter_model.safetensors`."""
    lora_sources: Mapping[LoraName, str] = Field(default_factory=dict)
    """Further LoRAs by name, each a folder or a hub repository."""
    max_loras: int = Field(default=4, ge=1, le=256)
    """LoRAs in one batch. Each has room for all layers of the model at `max_lora_rank`."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """The highest rank of a LoRA; those of a higher rank are refused."""
    max_cpu_loras: int | None = Field(default=None, ge=1)
    """LoRAs kept in host memory. None takes 16, or `max_loras` if that is more."""

    @model_validator(mode="after")
    def _batch_fits_host(self) -> Self:
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras must be at least max_loras ({self.max_loras})")
        return self

    @property
    def takes_loras(self) -> bool:
        """Whether the model is loaded with room for LoRAs."""
        return self.loras is not None or bool(self.lora_sources)

    @property
    def host_loras(self) -> int:
        """How many LoRAs may be in host memory."""
        return self.max_cpu_loras or max(16, self.max_loras)
