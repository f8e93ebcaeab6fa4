"""What the configuration says of a vLLM model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from engine.section import Section
from engine.units import Size

Medium = Literal["image", "video", "audio"]
"""What a prompt may hold beside text."""

LoraName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
"""A colon would end the name of the model in `MODEL:LORA`."""


class ModerationOptions(Section):
    """How a classifier answers `/v1/moderations`."""

    categories: Mapping[str, str | None] = Field(min_length=1)
    """The category for each label of the model, OpenAI's or one of your own; null is harmless."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """The score from which a category is flagged."""


def _sixteen_images() -> Mapping[Medium, int]:
    return {"image": 16}


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
    pooling: Literal["mean", "cls", "last"] | None = None
    """How the vectors of tokens become one embedding; None asks the checkpoint.

    A masked language model whose files do not say takes the mean, as sentence-transformers does.
    """
    normalize: bool | None = None
    """Whether embeddings have length 1. None asks the checkpoint; one that does not say does."""
    preprocessing: Literal["auto", "wangchanberta", "none"] = "auto"
    """What is done to texts before the tokenizer; `auto` asks the tokenizer.

    `wangchanberta`: as WangchanBERTa was trained: lower case, and `<_>` for a space.
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
    limit_mm_per_prompt: Mapping[
        Literal["image", "video", "audio"], Annotated[int, Field(ge=0)]
    ] = Field(default_factory=_sixteen_images)
    """How many images, videos and recordings a request may have, if the model takes such a thing.

    Kinds that are not named are refused.
    """
    mm_processor_cache: Size = Field(default=128 * 2**20, ge=0)
    """Bytes of images and the like that are kept, ready for the model; 0 keeps none."""
    mm_processor_kwargs: Mapping[str, Any] | None = None
    """What the model's processor of images is given, as `{size: {longest_edge: 1024}}`."""
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
    def media_counts(self) -> Mapping[str, int]:
        """`limit_mm_per_prompt` with those that it does not name."""
        return {kind: self.limit_mm_per_prompt.get(kind, 0) for kind in get_args(Medium)}

    @property
    def takes_loras(self) -> bool:
        """Whether the model is loaded with room for LoRAs."""
        return self.loras is not None or bool(self.lora_sources)

    @property
    def host_loras(self) -> int:
        """How many LoRAs may be in host memory."""
        return self.max_cpu_loras or max(16, self.max_loras)
