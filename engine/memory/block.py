"""The block, which is the unit of residency, and the estimate of a model in blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """The unit of residency: one named part of a model and its device bytes."""

    name: str
    nbytes: int
    parkable: bool = False
    """It can leave the device while the model stays loaded."""
    scratch: bool = False
    """What it holds is made anew (KV cache, workspace): it needs no host copy and no copying."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model will take, known before it is loaded.

    `blocks` are the parts that stay on the device while the model is resident.
    `load_seconds` is disk to ready.
    """

    blocks: tuple[Block, ...]
    load_seconds: float

    @property
    def nbytes(self) -> int:
        """Device bytes of all blocks together."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def host_bytes(self) -> int:
        """What its host copy will take, where there is room for one."""
        return sum(b.nbytes for b in self.blocks if b.parkable and not b.scratch)
