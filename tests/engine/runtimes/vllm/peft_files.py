"""Random LoRAs as PEFT writes them, and the model that one gives when it is merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    seed: int = 1,
    modules: Collection[str] = MODULES,
    **config: Any,
) -> Path:
    """A LoRA of random numbers for the model in `base`."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, weight in load_file(next(base.glob("*.safetensors"))).items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or module.rpartition(".")[2] not in modules:
            continue
        rows, columns = weight.shape
        key = f"base_model.model.{module}"
        if module.endswith("embed_tokens"):
            a, b, ends = (rank, rows), (columns, rank), ("lora_embedding_A", "lora_embedding_B")
        else:
            a, b, ends = (rank, columns), (rows, rank), ("lora_A.weight", "lora_B.weight")
        for end, shape in zip(ends, (a, b), strict=True):
            values = random.standard_normal(shape).astype(np.float32)
            tensors[f"{key}.{end}"] = values * np.float32(0.05)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def merge(adapter: Path, base: Path, folder: Path) -> Path:
    """The model with W + alpha / r × B × A in place of each W."""
    shutil.copytree(base, folder)
    file = next(folder.glob("*.safetensors"))
    weights = dict(load_file(file))
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = np.float32(config["lora_alpha"] / config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        key = name.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            weights[key.replace(".lora_A", "")] += scale * (b @ a)
        elif name.endswith(".lora_embedding_A"):
            b = tensors[name.replace("embedding_A", "embedding_B")]
            weights[key.replace(".lora_embedding_A", ".weight")] += scale * (b @ a).T
    save_file(weights, file, metadata={"format": "pt"})
    return folder
