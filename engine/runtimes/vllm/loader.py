"""The vLLM load format that takes safetensors only and lets other models step during a load.

Importing this module imports vLLM and registers the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from engine.process.gate import GATE
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOAD_FORMAT = "roundhouse"


@register_model_loader(LOAD_FORMAT)
class YieldingModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader, which lets other models step while it reads the weights.

    Reading the files takes seconds, so the gate is opened now and then between two tensors.
    """

    def __init__(self, load_config: Any) -> None:
        # Not "auto": that falls back to pickled weights. A copy: vLLM asks for the loader again.
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

    def track_weights_loading(
        self, model: Any, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """Refuse a checkpoint that leaves a plain linear or embedding layer unfilled.

        vLLM's check skips every layer that has a quantisation method, and the method of a plain
        layer is called "unquantised". The model would answer from whatever the memory held.
        """
        if loaded_weights is not None and not quantized:
            missing = [
                full_name
                for name, module in model.named_modules()
                if isinstance(
                    getattr(module, "quant_method", None),
                    UnquantizedLinearMethod | UnquantizedEmbeddingMethod,
                )
                for parameter, _ in module.named_parameters(recurse=False)
                if (full_name := f"{name}.{parameter}") not in loaded_weights
            ]
            # Tied weights are one parameter under two names. vLLM reports the first.
            named = {name for name, _ in model.named_parameters()}
            if missing := sorted(named.intersection(missing)):
                raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
        super().track_weights_loading(model, loaded_weights, quantized)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """Every (name, tensor) of the checkpoint."""
        for item in super().get_all_weights(model_config, model):
            GATE.breathe()
            yield item
