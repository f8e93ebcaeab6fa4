"""The files of a LoRA for a language model, checked against the model before anything is loaded.

Only headers are read. Nothing here imports vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest
from engine.files.lora_folder import PEFT_CONFIG, PEFT_WEIGHTS
from engine.files.safetensors_header import TensorShapes, tensor_shapes
from engine.runtimes.vllm.options import VllmOptions

MAX_CONFIG_BYTES = 2**20

PREFIX = "base_model.model."
"""What PEFT writes before the name of each module."""

EXPERTS = ".experts"
"""In the names of modules whose checkpoints may keep all experts in one tensor."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
"""Settings of PEFT that vLLM does not serve, each with the values that leave it off."""

_A, _B = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two matrices of one module, whose change is B × A."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    embeds: bool
    """Whether they change an embedding, whose weight has a row for each token."""

    @property
    def rank(self) -> int:
        """Rows of A and columns of B."""
        return self.a[0]

    @property
    def weight(self) -> tuple[int, int]:
        """The shape of the weight that they change."""
        return (self.a[1], self.b[0]) if self.embeds else (self.b[0], self.a[1])


class AdapterFiles:
    """A folder with the files that PEFT writes."""

    def __init__(self, folder: Path) -> None:
        """Read the configuration and the header.

        Raises:
            InvalidRequest: they are no files of a LoRA.

        """
        self.folder = folder
        self.config = _config(folder / PEFT_CONFIG)
        try:
            self.shapes = tensor_shapes([folder / PEFT_WEIGHTS])
        except (OSError, ValueError, AttributeError, IndexError, RecursionError) as error:
            raise _wrong(f"{PEFT_WEIGHTS} is no complete safetensors file") from error
        self.pairs = dict(_pairs(self.shapes))

    @property
    def elements(self) -> int:
        """Elements of all its tensors."""
        return sum(a * b for a, b in self.shapes.values())

    def check(self, options: VllmOptions, base: TensorShapes | None) -> None:
        """Return if the LoRA can be served on a model; `base` has the shapes of its checkpoint.

        Raises:
            InvalidRequest: with the reason.

        """
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA":
            raise _wrong(f"its peft_type is {str(kind)[:40]!r}, and only 'LORA' is served")
        for key, off in UNSUPPORTED.items():
            if self.config.get(key) not in off:
                raise _wrong(f"its {key} is not served")
        rank = max(pair.rank for pair in self.pairs.values())
        if rank > options.max_lora_rank:
            raise _wrong(
                f"its rank {rank} is above the model's max_lora_rank, {options.max_lora_rank}"
            )
        self._check_ranks()
        if base is not None:
            for module, pair in self.pairs.items():
                _check_module(module, pair, base)

    def _check_ranks(self) -> None:
        """Return if the configuration has the ranks of the tensors: the scale depends on it."""
        own, others = self.config.get("r"), self.config.get("rank_pattern") or {}
        if not isinstance(own, int) or not isinstance(self.config.get("lora_alpha"), int | float):
            raise _wrong(f"{PEFT_CONFIG} must have the numbers r and lora_alpha")
        ranks = {own, *others.values()} if isinstance(others, Mapping) else {own}
        for module, pair in self.pairs.items():
            if pair.rank not in ranks:
                raise _wrong(f"{module} has the rank {pair.rank}, and {PEFT_CONFIG} says {own}")


def _config(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("too long")
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(f"{PEFT_CONFIG} is missing, or is not JSON", "config") from error
    if not isinstance(config, dict):
        raise _wrong(f"{PEFT_CONFIG} is not an object", "config")
    return config


def _pairs(shapes: TensorShapes) -> Iterator[tuple[str, Pair]]:
    """The modules that the LoRA changes, by their names in the checkpoint."""
    for name, shape in shapes.items():
        if not name.endswith((*_A, *_B)):
            raise _wrong(f"it has a tensor {name[:100]!r}")
        if len(shape) != 2 or not all(shape):
            raise _wrong(f"{name[:100]} is no matrix")
    if not shapes:
        raise _wrong("it has no tensor")
    for end_a, end_b in zip(_A, _B, strict=True):
        modules = {name.removesuffix(end) for name in shapes for end in (end_a, end_b)
                   if name.endswith(end)}  # fmt: skip
        for module in sorted(modules):
            a, b = shapes.get(module + end_a), shapes.get(module + end_b)
            if a is None or b is None or a[0] != b[1]:
                raise _wrong(f"{module[:100]} needs an A and a B of one rank")
            yield module.removeprefix(PREFIX), Pair(a, b, embeds="embedding" in end_a)


def _check_module(module: str, pair: Pair, base: TensorShapes) -> None:
    """Return if the model has that module, with a weight of the shape that the pair changes."""
    if EXPERTS in module:
        return  # vLLM checks them as it loads them
    own = base.get(f"{module}.weight")
    if own is None:
        if module.endswith("lm_head") or any(name.startswith(f"{module}.") for name in base):
            return  # tied to the embedding, or quantised: its shape is not in the header
        raise _wrong(f"the model has no module {module[:100]!r}; it is for another model")
    if len(own) != 2:
        raise _wrong(f"{module[:100]} is no linear layer and no embedding")
    if own != pair.weight:
        want, have = ("×".join(map(str, each)) for each in (pair.weight, own))
        raise _wrong(f"it changes a weight {module[:100]} of {want}, and the model's is {have}")


def _wrong(why: str, param: str = "file") -> InvalidRequest:
    return InvalidRequest(f"The LoRA does not fit the model: {why}.", param=param)
