"""Random tensors from a seed, and the safetensors files that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensor = NDArray[np.float32]
Tensors = dict[str, Tensor]


class RandomTensors:
    """One seeded stream of normal float32 numbers: the order of the calls decides the bytes."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Independent numbers around zero."""
        return self._generator.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def linear(self, outputs: int, inputs: int, gain: float = 1.0) -> Tensor:
        """A projection that keeps the scale of its input, times `gain`."""
        return self.normal(outputs, inputs, std=gain * inputs**-0.5)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that transformers and diffusers take for one of PyTorch.

    Raises:
        OSError: the file cannot be written.

    """
    save_file(dict(tensors), path, metadata={"format": "pt"})
