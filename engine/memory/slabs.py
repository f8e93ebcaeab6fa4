"""The layout of tensors in slabs: large pieces of memory, each allocated and copied at once.

`lay_out` finds the memory that the tensors of some modules occupy. Tensors that overlap share one
`Slot`. Each tensor has one `Place` in its slot, and each `Slab` holds some slots.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from engine.memory.host_memory import SLAB_BYTES

CUDA_ALIGNMENT = 512
"""Bytes to which each tensor is aligned in its slab, as by torch's own allocator."""

CPU_ALIGNMENT = 64
"""A tensor keeps its address modulo this many bytes: torch's alignment on a CPU, and the longest
vector. The last bits of the kernels' results depend on it. So a model answers exactly as it does
under the library alone, from its mapped files."""


class SharedMemory(Exception):
    """Two parts of a model share memory, or a tensor has no memory that could be moved."""


@dataclass(slots=True, eq=False)
class Slot:
    """A run of bytes that holds one tensor, or several that overlap."""

    address: int
    nbytes: int
    storage: torch.UntypedStorage | None
    """The library's storage. None once the bytes are in the slab, so that they are held once."""
    offset: int = 0
    """In its slab."""

    def source(self) -> torch.Tensor:
        """Its bytes where the library put them."""
        assert self.storage is not None
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        start = self.address - self.storage.data_ptr()
        return empty.set_(self.storage, start, (self.nbytes,), (1,))


@dataclass(slots=True, eq=False)
class Place:
    """Where the bytes of one tensor are in its slab."""

    tensor: torch.Tensor
    slot: Slot
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    version: int = 0
    """torch's count of changes in place, when the device copy was made."""
    address: int = 0
    """Of the device copy."""

    def of(self, slab: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of a slab."""
        start = (self.slot.offset + self.offset) // self.dtype.itemsize
        return slab.view(self.dtype).as_strided(self.shape, self.stride, start)

    def point_to(self, slab: torch.Tensor) -> None:
        """Point the tensor to its bytes in a slab on the device."""
        point(self.tensor, self.of(slab))
        self.address = self.tensor.data_ptr()
        self.version = 0 if self.tensor.is_inference() else self.tensor._version

    def changed(self) -> bool:
        """Whether the tensor was changed since its device copy was made, or may have been.

        torch does not count the changes of tensors that were made in inference mode.
        """
        tensor = self.tensor
        if tensor.is_inference() or tensor._version != self.version:
            return True
        return bool(tensor.data_ptr() != self.address)

    def replaced(self) -> bool:
        """Whether the library gave the tensor other data, which its place cannot hold."""
        return (self.tensor.shape, self.tensor.dtype) != (self.shape, self.dtype)


@dataclass(slots=True, eq=False)
class Slab:
    """Some slots in one allocation, on the host, on the device, or on both."""

    slots: list[Slot]
    nbytes: int
    places: list[Place] = field(default_factory=list)
    master: torch.Tensor | None = None
    device: torch.Tensor | None = None

    def on_device(self) -> torch.Tensor:
        """The bytes on the device, which are there."""
        assert self.device is not None
        return self.device

    def on_host(self) -> torch.Tensor:
        """The master copy, which is there: a slab without one is never parked."""
        assert self.master is not None
        return self.master


def lay_out(modules: Iterable[torch.nn.Module], *, on_cpu: bool) -> list[Slab]:
    """The slabs for the tensors of some modules, with a place for each tensor. Allocates nothing.

    Raises:
        SharedMemory: a tensor cannot be moved.

    """
    held = [(tensor, *_extent(tensor)) for tensor in tensors_of(modules)]
    slots: list[Slot] = []
    places: list[Place] = []
    for tensor, address, nbytes in sorted(held, key=lambda each: each[1]):
        end = address + nbytes
        slot = slots[-1] if slots else None
        if slot is None or address >= slot.address + slot.nbytes:
            slot = Slot(address, nbytes, tensor.untyped_storage())
            slots.append(slot)
        elif end > slot.address + slot.nbytes:
            slot.nbytes = end - slot.address
            slot.storage = _covering(slot, tensor)
        shape, stride = tensor.shape, tensor.stride()
        offset = address - slot.address
        if offset % tensor.itemsize:
            raise SharedMemory("tensors overlap between two elements of one")
        places.append(Place(tensor, slot, offset, tensor.dtype, shape, stride))
    # Of a file whose header has an odd length. torch has no views that begin within an element.
    misplaced = {id(place.slot) for place in places if place.slot.address % place.dtype.itemsize}
    slabs: list[Slab] = []
    slab_of: dict[int, Slab] = {}
    for slot in slots:
        if on_cpu:
            lead, end = slot.address % CPU_ALIGNMENT, CPU_ALIGNMENT
            if id(slot) in misplaced:
                lead = 0
        else:
            lead, end = 0, CUDA_ALIGNMENT
        size = -(-(lead + slot.nbytes) // end) * end
        if not slabs or slabs[-1].nbytes + size > SLAB_BYTES:
            slabs.append(Slab([], 0))
        slot.offset = slabs[-1].nbytes + lead
        slabs[-1].slots.append(slot)
        slabs[-1].nbytes += size
        slab_of[id(slot)] = slabs[-1]
    for place in places:
        slab_of[id(place.slot)].places.append(place)
    return slabs


def check_disjoint(slabs: Iterable[Slab]) -> None:
    """Check that no two slots share memory.

    Raises:
        SharedMemory: two do; they are of different parts.

    """
    taken = [(slot.address, slot.nbytes) for slab in slabs for slot in slab.slots if slot.nbytes]
    taken.sort()
    for (start, nbytes), (following, _) in pairwise(taken):
        if following < start + nbytes:
            raise SharedMemory("two parts stand on the same memory")


def tensors_of(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """Every parameter and buffer once, and the base of each that is a view.

    A view keeps its base alive, and with it the memory that the base had.
    """
    found = {}
    for module in modules:
        for each in module.modules():
            for tensor in (*each._parameters.values(), *each._buffers.values()):
                if tensor is not None:
                    found[id(tensor)] = tensor
                    if tensor._is_view():
                        found[id(tensor._base)] = tensor._base
    return list(found.values())


def point(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Point a tensor to the memory of another. A tensor of inference mode stays one."""
    if not tensor.is_inference():
        tensor.data = data
        return
    with torch.inference_mode():
        alias = torch.empty(0, dtype=data.dtype, device=data.device)
        where = (data.storage_offset(), data.shape, data.stride())
        tensor.data = alias.set_(data.untyped_storage(), *where)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address, and bytes up to the last element."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise SharedMemory(f"a tensor of layout {tensor.layout} on {tensor.device}")
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize


def _covering(slot: Slot, tensor: torch.Tensor) -> torch.UntypedStorage:
    for storage in (slot.storage, tensor.untyped_storage()):
        assert storage is not None
        start = storage.data_ptr()
        if start <= slot.address and slot.address + slot.nbytes <= start + storage.nbytes():
            return storage
    raise SharedMemory("tensors overlap without a storage in common")
