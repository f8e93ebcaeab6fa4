"""The weights of a loaded model: from its files to the host, from the host to the device, and off.

A library builds its modules in its own way, on the CPU and as a rule with tensors that only map
their files. `Weights` takes the tensors over: it finds out which memory each one stands on, reads
that into a few large slabs of host memory (straight from the mapped file, by several threads),
and copies each slab to the device at once. From then on the host copy is the master: parking
drops the device's bytes and copies nothing, waking is one copy a slab.

Importing this module imports torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from engine.memory.host_memory import SLAB_BYTES, HostMemory, HostMemoryFull, host_slab

CUDA_ALIGNMENT = 512
"""Of each tensor in its slab, in bytes: as torch's own allocator does it."""

CPU_ALIGNMENT = 64
"""A tensor keeps its address modulo this many bytes (torch's alignment on a CPU, and the longest
vector): the kernels' results depend on it in their last bits, so that a model answers exactly as
the library alone does from its mapped files."""

CHUNK_BYTES = 8 * 1024**2
"""Read or copied at once; between two, other threads get their turn."""

READERS = min(4, os.cpu_count() or 1)
"""Threads that read files. Several keep a disk's queue filled and copy side by side."""


class SharedMemory(Exception):
    """Two parts of a model stand on the same memory, or a tensor has none that could be moved."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A run of bytes that one tensor, or several that overlap, stand on."""

    address: int
    nbytes: int
    storage: torch.UntypedStorage | None
    """Of the library's making; None once the bytes are in the slab, or they would be kept twice."""
    offset: int = 0
    """In its slab."""

    def source(self) -> torch.Tensor:
        """Its bytes where the library put them."""
        assert self.storage is not None
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        start = self.address - self.storage.data_ptr()
        return empty.set_(self.storage, start, (self.nbytes,), (1,))


@dataclass(slots=True, eq=False)
class _Place:
    """Where one tensor's bytes are in its slab."""

    tensor: torch.Tensor
    slot: _Slot
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
        """Have the tensor be its bytes in a slab on the device."""
        _point(self.tensor, self.of(slab))
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
class _Slab:
    """Some slots, one allocation on each side."""

    slots: list[_Slot]
    nbytes: int
    places: list[_Place] = field(default_factory=list)
    master: torch.Tensor | None = None
    device: torch.Tensor | None = None

    def on_device(self) -> torch.Tensor:
        """The device's bytes, which are there."""
        assert self.device is not None
        return self.device

    def on_host(self) -> torch.Tensor:
        """The master copy, which is there: what has none is never parked."""
        assert self.master is not None
        return self.master


@dataclass(slots=True, eq=False)
class _Part:
    """One block of a model."""

    modules: Sequence[torch.nn.Module]
    slabs: list[_Slab]
    known: set[int]
    """Identities of the tensors in its slabs."""
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Tensors that the library made or gave other data after the load, and their bytes on the host
    while parked."""
    on_device: bool = False

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)


class Weights:
    """The parameters and buffers of a model's parts, and their master copies.

    What is changed in place is saved when it is parked, if torch counts the change: writing through
    `tensor.data` or a NumPy view of a weight is not seen.
    """

    def __init__(
        self, parts: dict[str, _Part], host: HostMemory | None, device: torch.device
    ) -> None:
        self._parts = parts
        self._host = host
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @classmethod
    def adopt(
        cls,
        parts: Mapping[str, Sequence[torch.nn.Module]],
        host: HostMemory | None,
        device: str,
        pause: Callable[[], None] = lambda: None,
    ) -> Weights:
        """Take over what the parts' modules hold, and bring it onto the device.

        Without host memory, or without room in it, there are no master copies and nothing can be
        parked. `pause` is called between two chunks. Nothing may use the modules meanwhile.

        Raises:
            SharedMemory: the tensors cannot be moved part by part. Nothing was changed.
            OSError: a file cannot be read. Master copies taken so far are given back.

        """
        on_cpu = torch.device(device).type == "cpu"
        laid_out = {name: _lay_out(modules, on_cpu=on_cpu) for name, modules in parts.items()}
        _check_disjoint(laid_out.values())
        slabs = [slab for part in laid_out.values() for slab in part.slabs]
        weights = cls(laid_out, host, torch.device(device))
        try:
            masters = weights._allocate_masters(slabs)
            weights._fill(slabs, masters, pause)
        except BaseException:
            weights.close()
            raise
        for slab in slabs:
            for place in slab.places:
                place.point_to(slab.on_device())
            for slot in slab.slots:
                slot.storage = None
        for part in laid_out.values():
            part.on_device = True
        return weights

    @property
    def parkable(self) -> bool:
        """Whether there are master copies."""
        return self.host_bytes > 0

    @property
    def host_bytes(self) -> int:
        """Bytes of the master copies."""
        return sum(slab.master.numel() for slab in self._slabs() if slab.master is not None)

    def block_bytes(self) -> dict[str, int]:
        """Device bytes of each part while it is on the device."""
        return {name: part.nbytes for name, part in self._parts.items()}

    def park(self, names: Collection[str]) -> None:
        """Drop the device's bytes of these parts.

        What was changed in place, or made by the library since, is copied to the host first.

        Raises:
            RuntimeError: there are no master copies to come back from.

        """
        if not self.parkable:
            raise RuntimeError("weights without master copies cannot be parked")
        for name in names:
            part = self._parts[name]
            if not part.on_device:
                continue
            self._save(part)
            tensors = {id(tensor): tensor for tensor in _tensors(part.modules)}
            for slab in part.slabs:  # the library may have put a module aside for a while
                tensors.update((id(place.tensor), place.tensor) for place in slab.places)
            nothing: dict[torch.dtype, torch.Tensor] = {}
            for tensor in tensors.values():
                if tensor.dtype not in nothing:
                    empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
                    nothing[tensor.dtype] = empty
                _point(tensor, nothing[tensor.dtype])
            del tensors
            for slab in part.slabs:
                slab.device = None
            part.on_device = False

    def wake(self, names: Collection[str], pause: Callable[[], None] = lambda: None) -> None:
        """Copy these parts to the device again, all of them or none.

        Raises:
            torch.OutOfMemoryError: the device lacks the room; the parts are parked as before.

        """
        parts = [self._parts[name] for name in names if not self._parts[name].on_device]
        slabs = [slab for part in parts for slab in part.slabs]
        try:
            for slab in slabs:
                slab.device = self._empty(slab.nbytes)
                self._copy(slab.device, slab.on_host()[: slab.nbytes], pause)
            late = [
                (tensor, saved.to(self._device)) for part in parts for tensor, saved in part.late
            ]
        except BaseException:
            self._finish_copies()  # the memory must not be used again while they write to it
            for slab in slabs:
                slab.device = None
            raise
        self._finish_copies()
        for slab in slabs:
            for place in slab.places:
                place.point_to(slab.on_device())
        for tensor, data in late:
            _point(tensor, data)
        for part in parts:
            part.late.clear()
            part.on_device = True

    def close(self) -> None:
        """Give the master copies back. What is on the device stays; nothing can be parked."""
        for slab in self._slabs():
            if slab.master is not None and self._host is not None:
                master, slab.master = slab.master, None
                self._host.free(master)

    def _slabs(self) -> Iterator[_Slab]:
        for part in self._parts.values():
            yield from part.slabs

    def _allocate_masters(self, slabs: list[_Slab]) -> bool:
        """Whether all of them fit the budget; if not, none is kept."""
        if self._host is None:
            return False
        try:
            for slab in slabs:
                slab.master = self._host.allocate(slab.nbytes)
        except HostMemoryFull:
            self.close()
            return False
        return True

    def _fill(self, slabs: list[_Slab], masters: bool, pause: Callable[[], None]) -> None:
        """Read each slab and bring it onto the device, one being copied while the next is read."""
        files = _MappedFiles()
        on_cpu = self._device.type == "cpu"
        with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as readers:
            reading: list[list[Future[None]]] = []
            for slab in slabs:
                if on_cpu or not masters:
                    slab.device = self._empty(slab.nbytes)
                # On a CPU each chunk is copied on while it is still in the processor's cache.
                targets = [slab.master, slab.device]
                reading.append(files.read(slab, [t for t in targets if t is not None], readers))
            for slab, futures in zip(slabs, reading, strict=True):
                for future in futures:
                    future.result()
                    pause()
                if slab.device is None:
                    slab.device = self._empty(slab.nbytes)
                    self._copy(slab.device, slab.on_host()[: slab.nbytes], pause)
        self._finish_copies()

    def _empty(self, nbytes: int) -> torch.Tensor:
        if self._device.type == "cpu":
            return host_slab(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, pause: Callable[[], None]) -> None:
        if self._stream is None:
            _copy_bytes(target, source, pause)
            return
        # The allocator gives memory that kernels of the usual stream may still read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def _finish_copies(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _save(self, part: _Part) -> None:
        late = {id(each): each for each in _tensors(part.modules) if id(each) not in part.known}
        for slab in part.slabs:
            for place in slab.places:
                if place.replaced():
                    late[id(place.tensor)] = place.tensor
                elif place.changed():
                    place.of(slab.on_host()).copy_(place.tensor.detach())
        part.late = [(each, each.detach().to("cpu", copy=True)) for each in late.values()]


def _tensors(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """Every parameter and buffer, each once, and what it was made from if it is a view.

    A view keeps that alive, and with it the memory that it stood on.
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


def _point(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Have a tensor stand on the memory of another. One of inference mode stays one."""
    if not tensor.is_inference():
        tensor.data = data
        return
    with torch.inference_mode():
        alias = torch.empty(0, dtype=data.dtype, device=data.device)
        where = (data.storage_offset(), data.shape, data.stride())
        tensor.data = alias.set_(data.untyped_storage(), *where)


def _lay_out(modules: Sequence[torch.nn.Module], *, on_cpu: bool) -> _Part:
    """Find the memory that the tensors stand on, and a place in a slab for each run of it."""
    tensors = _tensors(modules)
    held = [(tensor, *_extent(tensor)) for tensor in tensors]
    slots: list[_Slot] = []
    places: list[_Place] = []
    for tensor, address, nbytes in sorted(held, key=lambda each: each[1]):
        end = address + nbytes
        slot = slots[-1] if slots else None
        if slot is None or address >= slot.address + slot.nbytes:
            slot = _Slot(address, nbytes, tensor.untyped_storage())
            slots.append(slot)
        elif end > slot.address + slot.nbytes:
            slot.nbytes = end - slot.address
            slot.storage = _covering(slot, tensor)
        shape, stride = tensor.shape, tensor.stride()
        offset = address - slot.address
        if offset % tensor.itemsize:
            raise SharedMemory("tensors overlap between two elements of one")
        places.append(_Place(tensor, slot, offset, tensor.dtype, shape, stride))
    # Of a file whose header has an odd length: torch has no views that begin within an element.
    misplaced = {id(place.slot) for place in places if place.slot.address % place.dtype.itemsize}
    slabs: list[_Slab] = []
    slab_of: dict[int, _Slab] = {}
    for slot in slots:
        if on_cpu:
            lead, end = slot.address % CPU_ALIGNMENT, CPU_ALIGNMENT
            if id(slot) in misplaced:
                lead = 0
        else:
            lead, end = 0, CUDA_ALIGNMENT
        size = -(-(lead + slot.nbytes) // end) * end
        if not slabs or slabs[-1].nbytes + size > SLAB_BYTES:
            slabs.append(_Slab([], 0))
        slot.offset = slabs[-1].nbytes + lead
        slabs[-1].slots.append(slot)
        slabs[-1].nbytes += size
        slab_of[id(slot)] = slabs[-1]
    for place in places:
        slab_of[id(place.slot)].places.append(place)
    return _Part(modules, slabs, {id(tensor) for tensor in tensors})


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and bytes up to the last element."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise SharedMemory(f"a tensor of layout {tensor.layout} on {tensor.device}")
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize


def _covering(slot: _Slot, tensor: torch.Tensor) -> torch.UntypedStorage:
    for storage in (slot.storage, tensor.untyped_storage()):
        assert storage is not None
        start = storage.data_ptr()
        if start <= slot.address and slot.address + slot.nbytes <= start + storage.nbytes():
            return storage
    raise SharedMemory("tensors overlap without a storage in common")


def _check_disjoint(parts: Iterable[_Part]) -> None:
    taken: list[tuple[int, int]] = []
    for part in parts:
        for slab in part.slabs:
            taken += [(slot.address, slot.nbytes) for slot in slab.slots if slot.nbytes]
    taken.sort()
    for (start, nbytes), (following, _) in pairwise(taken):
        if following < start + nbytes:
            raise SharedMemory("two parts stand on the same memory")


def _copy_bytes(target: torch.Tensor, source: torch.Tensor, pause: Callable[[], None]) -> None:
    """Copy within host memory, on this thread alone.

    torch would copy with all its threads and take the cores from whatever runs beside.
    """
    for start in range(0, source.numel(), CHUNK_BYTES):
        nbytes = min(CHUNK_BYTES, source.numel() - start)
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, nbytes)
        pause()


class _MappedFiles:
    """Which memory of this process maps which file."""

    LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ ([1-9]\d*)\s+(/.*)$")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._maps: list[tuple[int, int, str]] = []
        """(end, offset in the file, path), by start."""
        try:
            with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    if match := self.LINE.match(line):
                        start, end, offset = (int(text, 16) for text in match.group(1, 2, 3))
                        self._starts.append(start)
                        self._maps.append((end, offset, match.group(5)))
        except OSError:
            pass  # no such file on this system: everything is copied from memory

    def read(
        self, slab: _Slab, targets: Sequence[torch.Tensor], readers: ThreadPoolExecutor
    ) -> list[Future[None]]:
        """Start reading a slab's bytes, from the files where they are mapped from them."""
        return [readers.submit(self._read, slot, targets) for slot in slab.slots if slot.nbytes]

    def _read(self, slot: _Slot, targets: Sequence[torch.Tensor]) -> None:
        source = slot.source()
        into = [target[slot.offset : slot.offset + slot.nbytes] for target in targets]
        on_cpu = all(each.device.type == "cpu" for each in (source, *into))
        where = self._find(slot.address, slot.nbytes) if on_cpu else None
        if where is not None:
            _read_file(*where, into)
            return
        for each in into:
            if on_cpu:
                _copy_bytes(each, source, lambda: None)
            else:
                each.copy_(source)

    def _find(self, address: int, nbytes: int) -> tuple[str, int] | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        end, offset, path = self._maps[index]
        if address + nbytes > end or path.startswith("/dev/") or path.endswith(" (deleted)"):
            return None
        if _written(address, nbytes):  # by the library, which the file knows nothing of
            return None
        return path, offset + address - self._starts[index]


def _read_file(path: str, offset: int, targets: Sequence[torch.Tensor]) -> None:
    """Read a piece of a file into the first target, and from there into the others."""
    view = memoryview(targets[0].numpy())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + CHUNK_BYTES]], offset + done)
            if got == 0:
                raise OSError(f"{path} ends before its tensors do")
            for other in targets[1:]:
                ctypes.memmove(other.data_ptr() + done, targets[0].data_ptr() + done, got)
            done += got
    finally:
        os.close(descriptor)


def _written(address: int, nbytes: int) -> bool:
    """Whether pages of a mapped file were written to, so that they are memory of their own now.

    By /proc/self/pagemap: bits 63 and 62 say that a page is in memory or swapped out, bit 61 that
    it is the file's (https://docs.kernel.org/admin-guide/mm/pagemap.html).
    """
    first = address // mmap.PAGESIZE
    count = -(-(address + nbytes) // mmap.PAGESIZE) - first
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return True  # nobody knows
    try:
        entries = np.frombuffer(os.pread(descriptor, 8 * count, 8 * first), np.uint64) >> 61
    finally:
        os.close(descriptor)
    return len(entries) < count or bool(np.isin(entries, (0b010, 0b100, 0b110)).any())
