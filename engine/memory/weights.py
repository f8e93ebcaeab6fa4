"""The weights of a loaded model: from their files to host and device, off the device and back.

A library builds its modules in its own way: on the CPU, and usually with tensors that only map
their files. `Weights` takes these tensors over. It finds the memory under each tensor and reads
that memory into a few large slabs of host memory. Several threads read, straight from the mapped
files. Each slab is then copied to the device at once. From then on the host copy is the master:
parking drops the bytes on the device and copies nothing, and waking is one copy a slab.

Importing this module imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from engine.memory.host_memory import HostMemory, HostMemoryFull, copy_bytes, host_slab
from engine.memory.mapped_files import MappedFiles, read_file
from engine.memory.slabs import Place, Slab, Slot, check_disjoint, lay_out, point, tensors_of

READERS = min(4, os.cpu_count() or 1)
"""Threads that read files. Several keep a disk's queue filled and copy side by side."""


@dataclass(slots=True, eq=False)
class _Part:
    """One block of a model."""

    modules: Sequence[torch.nn.Module]
    slabs: list[Slab]
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Tensors that the library made after the load, or gave other data, each with its bytes on the
    host. Filled while the part is parked."""
    on_device: bool = False

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    def places(self) -> Iterator[Place]:
        for slab in self.slabs:
            yield from slab.places


class Weights:
    """The parameters and buffers of a model's parts, and their master copies.

    Parking saves what was changed in place, if torch counts the change. It does not count a write
    through `tensor.data` or through a NumPy view of a weight.
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
        parked. `pause` is called between two chunks. Nothing may use the modules during the call.

        Raises:
            SharedMemory: the tensors cannot be moved part by part. Nothing was changed.
            OSError: a file cannot be read. Master copies taken so far are given back.

        """
        on_cpu = torch.device(device).type == "cpu"
        made = {
            name: _Part(modules, lay_out(modules, on_cpu=on_cpu)) for name, modules in parts.items()
        }
        slabs = [slab for part in made.values() for slab in part.slabs]
        check_disjoint(slabs)
        weights = cls(made, host, torch.device(device))
        try:
            masters = weights._allocate_masters(slabs)
            weights._fill(slabs, masters, pause)
        except BaseException:
            weights._finish_copies()  # no memory may be used again while a copy reads it
            weights.close()
            raise
        for slab in slabs:
            for place in slab.places:
                place.point_to(slab.on_device())
            for slot in slab.slots:
                slot.storage = None
        for part in made.values():
            part.on_device = True
        return weights

    @property
    def parkable(self) -> bool:
        """Whether there are master copies."""
        return self.host_bytes > 0

    @property
    def host_bytes(self) -> int:
        """Bytes of the master copies."""
        return sum(slab.master.numel() for slab in self._all_slabs() if slab.master is not None)

    def block_bytes(self) -> dict[str, int]:
        """Device bytes of each part while it is on the device."""
        return {name: part.nbytes for name, part in self._parts.items()}

    def park(self, names: Collection[str]) -> None:
        """Drop the device's bytes of these parts.

        Tensors that were changed in place, or made by the library since, are first copied to the
        host.

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
            tensors = {id(tensor): tensor for tensor in tensors_of(part.modules)}
            # The library may have put a module aside for a while.
            tensors.update((id(place.tensor), place.tensor) for place in part.places())
            nothing: dict[torch.dtype, torch.Tensor] = {}
            for tensor in tensors.values():
                if tensor.dtype not in nothing:
                    empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
                    nothing[tensor.dtype] = empty
                point(tensor, nothing[tensor.dtype])
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
            self._finish_copies()  # no memory may be used again while a copy writes to it
            for slab in slabs:
                slab.device = None
            raise
        self._finish_copies()
        for slab in slabs:
            for place in slab.places:
                place.point_to(slab.on_device())
        for tensor, data in late:
            point(tensor, data)
        for part in parts:
            part.late.clear()
            part.on_device = True

    def close(self) -> None:
        """Give the master copies back. What is on the device stays; nothing can be parked."""
        for slab in self._all_slabs():
            if slab.master is not None and self._host is not None:
                master, slab.master = slab.master, None
                self._host.free(master)

    def _all_slabs(self) -> Iterator[Slab]:
        for part in self._parts.values():
            yield from part.slabs

    def _allocate_masters(self, slabs: list[Slab]) -> bool:
        """Allocate the master copies; whether all fit the budget. Otherwise none is kept."""
        if self._host is None:
            return False
        try:
            for slab in slabs:
                slab.master = self._host.allocate(slab.nbytes)
        except HostMemoryFull:
            self.close()
            return False
        return True

    def _fill(self, slabs: list[Slab], masters: bool, pause: Callable[[], None]) -> None:
        """Read each slab and copy it to the device, one slab while the next is read."""
        files = MappedFiles()
        on_cpu = self._device.type == "cpu"
        with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as readers:
            reading: list[list[Future[None]]] = []
            for slab in slabs:
                if on_cpu or not masters:
                    slab.device = self._empty(slab.nbytes)
                # On a CPU each chunk is copied again while it is still in the processor's cache.
                targets = [each for each in (slab.master, slab.device) if each is not None]
                reading.append(
                    [
                        readers.submit(_read, files, slot, targets)
                        for slot in slab.slots
                        if slot.nbytes
                    ]
                )
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
            copy_bytes(target, source, pause)
            return
        # The allocator gives out memory that kernels of the usual stream may still read.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def _finish_copies(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _save(self, part: _Part) -> None:
        known = {id(place.tensor) for place in part.places()}
        late = {id(each): each for each in tensors_of(part.modules) if id(each) not in known}
        for slab in part.slabs:
            for place in slab.places:
                if place.replaced():
                    late[id(place.tensor)] = place.tensor
                elif place.changed():
                    place.of(slab.on_host()).copy_(place.tensor.detach())
        part.late = [(each, each.detach().to("cpu", copy=True)) for each in late.values()]


def _read(files: MappedFiles, slot: Slot, targets: Sequence[torch.Tensor]) -> None:
    """Read a slot's bytes into slabs, from its file if it is mapped from one."""
    source = slot.source()
    into = [target[slot.offset : slot.offset + slot.nbytes] for target in targets]
    on_cpu = all(each.device.type == "cpu" for each in (source, *into))
    where = files.find(slot.address, slot.nbytes) if on_cpu else None
    if where is not None:
        read_file(*where, into)
        return
    for each in into:
        if on_cpu:
            copy_bytes(each, source)
        else:
            each.copy_(source)
