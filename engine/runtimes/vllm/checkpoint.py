"""A language model's checkpoint: its sizes and shapes, read without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import LoadFailed
from engine.files.safetensors_header import DTYPE_BYTES, tensor_shapes, tensor_sizes, weight_bytes
from engine.runtimes.vllm.options import VllmOptions

ENCODER_TOKENS = 1024
"""Tokens of images that one step encodes at most, unless a single image has more. An encoder sees
up to sixteen patches for a token. With vLLM's own bound, that of the text, its activations may take
as much as the weights, and one step holds up the streams of all models."""

IMAGE_TOKENS = 2048
"""Of the largest image, before the load has asked the model's processor."""

MASKED = frozenset(
    {"BertForMaskedLM", "CamembertForMaskedLM", "RobertaForMaskedLM", "XLMRobertaForMaskedLM"}
)
"""Architectures that embed texts, and whose head fills masks."""

_MASKED_HEADS = ("lm_head.", "cls.predictions.")

MASKS_AT_ONCE = 16
"""Masks whose logits are computed at once."""

_POSITIONS_AFTER_PADDING = frozenset({"camembert", "roberta", "xlm-roberta"})
"""Values of `model_type` whose first position is the one after the padding token's number."""


class Checkpoint:
    """The configuration and the tensor headers of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        try:
            self.config = read_config(folder)
            self.tensors = tensor_sizes(files)
            self.shapes = tensor_shapes(files)
        except (OSError, ValueError) as error:
            raise LoadFailed(f"{folder.name}: cannot read the checkpoint: {error}") from error
        if not self.tensors:
            raise LoadFailed(f"{folder.name}: no .safetensors file in the folder")

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of a multimodal configuration, otherwise the whole."""
        nested: dict[str, Any] = self.config.get("text_config") or self.config
        return nested

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a classifier. Without their names there are two, as transformers has it."""
        named = self.config.get("id2label")
        if isinstance(named, dict):
            return tuple(str(named[key]) for key in sorted(named, key=int))
        return tuple(f"LABEL_{index}" for index in range(int(self.config.get("num_labels", 2))))

    def item_bytes(self, dtype: str) -> int:
        """Bytes per floating-point element at run time.

        vLLM's "auto" keeps the checkpoint's dtype, but runs a float32 checkpoint in 16 bits.
        """
        return DTYPE_BYTES.get(dtype, 2)

    @property
    def fills_masks(self) -> bool:
        """Whether it has the head of a masked language model, which is kept beside its encoder."""
        return fills_masks(self.config) and any(map(is_of_masked_head, self.tensors))

    def weight_bytes(self, dtype: str, task: str) -> int:
        """Bytes of all weights at their run-time dtype; quantised ones stay as they are.

        Only a model that generates keeps the matrix that gives the logits. A masked one keeps what
        is before that matrix, which is its embedding once more.
        """
        masked, tied = self.fills_masks, self.config.get("tie_word_embeddings", True)
        kept = {
            name: size
            for name, size in self.tensors.items()
            if task == "generate"
            or (masked and not (tied and name.endswith(".decoder.weight")))
            or not (masked or name.startswith("lm_head."))
        }
        return weight_bytes(
            kept, self.item_bytes(dtype), as_stored="quantization_config" in self.config
        )

    def embedding_bytes(self, dtype: str) -> int:
        """Vocabulary × hidden size × bytes per element: one input or output embedding."""
        config = self.text_config
        shape = int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0))
        return shape * self.item_bytes(dtype)

    def rotary_bytes(self, dtype: str) -> int:
        """Positions × head size × bytes per element: the table of cosines and sines, if any."""
        config = self.text_config
        if "rope_theta" not in config and "rope_parameters" not in config:
            return 0
        positions = int(config.get("max_position_embeddings", 0))
        return positions * self.head_dim * self.item_bytes(dtype)

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        config = self.text_config
        heads = int(config.get("num_attention_heads", 1))
        return int(config.get("head_dim") or int(config.get("hidden_size", 0)) // heads)

    def has_kv_cache(self, task: str) -> bool:
        """Whether vLLM gives it a KV cache. Only encoders get none; they have no KV heads."""
        return task == "generate" or "num_key_value_heads" in self.text_config

    def kv_bytes_per_token(self, dtype: str) -> int:
        """2 (keys, values) × layers × KV heads × head size × bytes per element."""
        config = self.text_config
        heads = int(config.get("num_attention_heads", 1))
        kv_heads = int(config.get("num_key_value_heads") or heads)
        layers = int(config.get("num_hidden_layers", 1))
        return 2 * layers * kv_heads * self.head_dim * self.item_bytes(dtype)

    def max_model_len(self, options: VllmOptions) -> int:
        """The configured context length, otherwise the checkpoint's."""
        return options.max_model_len or position_count(self.text_config) or 2048

    def lora_bytes(self, options: VllmOptions, dtype: str) -> int:
        """LoRAs of a batch × rank × (inputs + outputs) × bytes per element, of all matrices.

        vLLM makes that room for each linear layer and embedding as it loads the model, whatever
        layers a LoRA changes.
        """
        if not options.takes_loras:
            return 0
        sides = sum(sum(shape) for shape in self.shapes.values() if len(shape) == 2)
        if "lm_head.weight" not in self.shapes:  # tied to the embedding, but with room of its own
            config = self.text_config
            sides += int(config.get("vocab_size", 0)) + int(config.get("hidden_size", 0))
        return options.max_loras * options.max_lora_rank * sides * self.item_bytes(dtype)

    def workspace_bytes(self, options: VllmOptions, dtype: str, task: str) -> int:
        """Activations of the largest step: a full batch's hidden and MLP states, float32 logits.

        Only a model that generates gives logits, or one that fills masks.
        """
        config = self.text_config
        tokens = self._step_tokens(options)
        hidden = int(config.get("hidden_size", 0))
        intermediate = int(config.get("intermediate_size") or 4 * hidden)
        vocabulary = int(config.get("vocab_size", 0)) if task == "generate" else 0
        activations = tokens * (4 * hidden + 2 * intermediate) * self.item_bytes(dtype)
        logits = options.max_num_seqs * vocabulary * 4
        if self.fills_masks:
            # Logits and probabilities.
            logits = MASKS_AT_ONCE * int(config.get("vocab_size", 0)) * 4 * 2
        return activations + logits

    def media_bytes(self, options: VllmOptions, dtype: str, item_tokens: int | None = None) -> int:
        """What images take beside the weights: activations of the encoder, and what it made.

        `item_tokens` are those of the largest image. Before the load they are unknown.
        """
        largest = min(self.max_model_len(options), item_tokens or IMAGE_TOKENS)
        encoded = max(min(ENCODER_TOKENS, self._step_tokens(options)), largest)
        kept = max(self._step_tokens(options), largest)
        hidden = int(self.text_config.get("hidden_size", 0))
        # Qwen 3 VL hands on what several layers of the encoder made.
        levels = 1 + len(self._vision.get("deepstack_visual_indexes") or ())
        activations = encoded * self._patches_per_token * self._patch_elements
        return (activations + kept * hidden * levels) * self.item_bytes(dtype)

    def _step_tokens(self, options: VllmOptions) -> int:
        return options.max_num_batched_tokens or max(2048, self.max_model_len(options))

    @property
    def _vision(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config.get("vision_config") or {}
        return found

    @property
    def _patch_elements(self) -> int:
        """Numbers that are held of one patch: hidden and MLP states, and its pixels.

        These are there as they wait, in a batch, as the encoder casts them, and as its mask.
        """
        vision = self._vision
        hidden = int(vision.get("hidden_size") or vision.get("embed_dim") or 1024)
        wide = int(vision.get("intermediate_size") or hidden * int(vision.get("mlp_ratio") or 4))
        size = vision.get("patch_size") or 14
        side = int(size if not isinstance(size, list) else size[0])
        return 4 * hidden + 2 * wide + 4 * 3 * side * side

    @property
    def _patches_per_token(self) -> int:
        """Patches that become one token of the language model."""
        config, vision = self.config, self._vision
        side = (
            config.get("scale_factor")
            or vision.get("spatial_merge_size")
            or config.get("spatial_merge_size")
            or config.get("downsample_factor")
        )
        if side:
            return max(1, int(side) ** 2)
        if ratio := config.get("downsample_ratio"):
            return max(1, round(1 / float(ratio) ** 2))
        size, patch = vision.get("image_size"), vision.get("patch_size")
        if config.get("mm_tokens_per_image") and isinstance(size, int) and isinstance(patch, int):
            return max(1, (size // patch) ** 2 // int(config["mm_tokens_per_image"]))
        return 1


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
        LoadFailed: it cannot be read.

    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{folder.name}: cannot read the checkpoint: {error}") from error
    return config


def fills_masks(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a masked language model that is served with its head."""
    return not MASKED.isdisjoint(map(str, config.get("architectures") or ()))


def is_of_masked_head(name: str) -> bool:
    """Whether a weight of a masked language model is of its head."""
    return name.startswith(_MASKED_HEADS)


def position_count(config: Mapping[str, Any]) -> int | None:
    """Tokens for which a model has positions; None: its configuration does not say."""
    count = config.get("max_position_embeddings")
    if not isinstance(count, int):
        return None
    if config.get("model_type") not in _POSITIONS_AFTER_PADDING:
        return count
    if config.get("position_embedding_type", "absolute") != "absolute":
        return count
    padding = config.get("pad_token_id")
    return count - 1 - (padding if isinstance(padding, int) else 1)


def tokenizer_length(folder: Path) -> int | None:
    """Tokens that a tokenizer says its model takes; None: it says nothing of use."""
    try:
        document = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said_length(document)


def said_length(tokenizer_config: Any) -> int | None:
    """The length in a `tokenizer_config.json`. Beyond a billion it stands for none."""
    said = tokenizer_config.get("model_max_length") if isinstance(tokenizer_config, dict) else None
    return int(said) if isinstance(said, int | float) and 1 <= said < 1e9 else None
