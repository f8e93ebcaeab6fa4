"""The eyes of the vision-language starter: Idefics 3's vision tower and image processor.

A picture is cut into tiles, and one tile more shows the whole of it. Its processor needs no
torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.starters.json_text import write_json
from engine.starters.tensors import RandomTensors, Tensors

TILE, PATCH = 64, 16
"""Pixels along the side of a tile, and of a patch."""
SHUFFLE = 2
"""Patches along the side of the square that becomes one token."""
TILES = 4
"""Along the longer side of a picture, whatever its size."""
TILE_TOKENS = (TILE // PATCH // SHUFFLE) ** 2

_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS = 96, 192, 2, 3

IMAGE, AROUND, WHOLE, END = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
IMAGE_TOKENS = (
    AROUND,
    IMAGE,
    END,
    WHOLE,
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
)
"""The tokens that Idefics 3's processor writes. It knows six tiles along a side."""

VISION_CONFIG: dict[str, Any] = {
    "model_type": "idefics3_vision",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_channels": 3,
    "image_size": TILE,
    "patch_size": PATCH,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}


def vision_tensors(weights: RandomTensors, text_hidden: int) -> Tensors:
    """The vision tower, and the projection to the width of the language model."""
    tower = "model.vision_model"
    patches = (TILE // PATCH) ** 2
    tensors: Tensors = {
        f"{tower}.embeddings.patch_embedding.weight": weights.normal(
            _HIDDEN, 3, PATCH, PATCH, std=(3 * PATCH * PATCH) ** -0.5
        ),
        # A patch of one colour sums all weights of a channel, so only a bias keeps a grey one seen.
        f"{tower}.embeddings.patch_embedding.bias": weights.normal(_HIDDEN, std=0.1),
        f"{tower}.embeddings.position_embedding.weight": weights.normal(patches, _HIDDEN, std=0.1),
        **_layer_norm(f"{tower}.post_layernorm"),
        "model.connector.modality_projection.proj.weight": weights.linear(
            text_hidden, _HIDDEN * SHUFFLE**2, gain=0.3
        ),
    }
    for index in range(_LAYERS):
        layer = f"{tower}.encoder.layers.{index}"
        for part, outputs, inputs in (
            ("self_attn.q_proj", _HIDDEN, _HIDDEN),
            ("self_attn.k_proj", _HIDDEN, _HIDDEN),
            ("self_attn.v_proj", _HIDDEN, _HIDDEN),
            ("self_attn.out_proj", _HIDDEN, _HIDDEN),
            ("mlp.fc1", _INTERMEDIATE, _HIDDEN),
            ("mlp.fc2", _HIDDEN, _INTERMEDIATE),
        ):
            tensors[f"{layer}.{part}.weight"] = weights.linear(outputs, inputs)
            tensors[f"{layer}.{part}.bias"] = np.zeros(outputs, np.float32)
        tensors |= _layer_norm(f"{layer}.layer_norm1")
        tensors |= _layer_norm(f"{layer}.layer_norm2")
    return tensors


def write_processor(folder: Path) -> None:
    """The files that say how a picture becomes tiles and tokens."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": TILE},
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": TILES * TILE},
        },
    )
    write_json(
        folder / "processor_config.json",
        {"processor_class": "Idefics3Processor", "image_seq_len": TILE_TOKENS},
    )


def _layer_norm(name: str) -> Tensors:
    return {
        f"{name}.weight": np.ones(_HIDDEN, np.float32),
        f"{name}.bias": np.zeros(_HIDDEN, np.float32),
    }
