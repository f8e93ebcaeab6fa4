"""Multiplication by LoRAs on a CPU, where each row of a batch may have another one, or none.

vLLM's own operations copy the whole matrix for each row: gigabytes for a long prompt. They also
take the last LoRA for a row that has none. These multiply the rows of one LoRA together.

Importing this module imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

NONE = -1
"""The index of a row without a LoRA."""


def _groups(indices: torch.Tensor) -> Iterator[tuple[int, Any]]:
    """Each LoRA of a batch with its rows: a slice if it has all, otherwise their numbers."""
    found = indices.unique().tolist()
    for index in found:
        if index != NONE:
            rows = slice(None) if len(found) == 1 else (indices == index).nonzero().squeeze(1)
            yield index, rows


def _matrix(weights: torch.Tensor, index: int) -> torch.Tensor:
    """The matrix of one LoRA, from the stack that holds one for each."""
    matrix = weights[index]
    return matrix.squeeze(0) if matrix.dim() == 3 else matrix


def shrink(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """Set each row of `output` to `scaling` × A × row; to zero without a LoRA."""
    count = indices.shape[0]
    rank = weights.shape[-2]
    target = output[:count, :rank]
    if (indices == NONE).any():
        target.zero_()
    inputs = inputs[:count]
    for index, rows in _groups(indices):
        matrix = _matrix(weights, index).to(output.dtype)
        target[rows] = scaling * (inputs[rows].to(output.dtype) @ matrix.T)


def expand(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Add B × row to each row of `output`, or set it; nothing without a LoRA."""
    width = min(weights.shape[-2], output.shape[-1])
    expand_slice(inputs, weights, output, indices, 0, width, add_inputs)


def expand_slice(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same for some columns of `output`."""
    count = min(indices.shape[0], output.shape[0])
    indices, inputs = indices[:count], inputs[:count]
    target = output[:count, slice_offset : slice_offset + slice_size]
    for index, rows in _groups(indices):
        matrix = _matrix(weights, index)[:slice_size].to(output.dtype)
        product = inputs[rows].to(output.dtype) @ matrix.T
        if add_inputs:
            target[rows] += product
        else:
            target[rows] = product


def multiply_by_group() -> None:
    """Have vLLM use these operations on a CPU."""
    for module in (lora_ops, punica_cpu):
        module.bgmv_shrink = shrink
        module.bgmv_expand = expand
        module.bgmv_expand_slice = expand_slice
