"""A vLLM model's device memory on CUDA: parked without its addresses changing.

Captured graphs hold addresses. So weights and KV cache get reserved addresses, with memory mapped
under them: CUDA's virtual memory management, through the C extension of vLLM's sleep mode. Parking
unmaps; waking maps, and copies the master back.

vLLM's allocator serves one engine a process. It copies weights to the host at every sleep, and
gives back the pools of all engines when one shuts down. So the bookkeeping is done here, with a
pool for each block of each engine.

Written from the sources of vLLM and torch; it has not been run on a GPU.

Importing this module imports vLLM.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from engine.memory.block import Block
from engine.memory.host_memory import SLAB_BYTES, HostMemory, HostMemoryFull
from engine.runtimes.vllm.park import KV_CACHE, WEIGHTS, WORKSPACE
from vllm.device_allocator import alloc_conf, cumem
from vllm.v1.worker.gpu_worker import Worker

log = logging.getLogger(__name__)

Handle = tuple[int, int, int, int]
"""Device, bytes, address, and the extension's pointer to the memory mapped there."""

GRAPHS = "graphs"
"""Captured graphs, with the buffers that they and their kernels keep."""

NOTHING: Handle = (0, 0, 0, 0)

Owner = tuple[int, str]
"""An engine and one of its blocks."""


@dataclass(slots=True, eq=False)
class Allocation:
    """A range of reserved addresses, and whether there is memory under it."""

    owner: Owner
    handle: Handle
    mapped: bool = True
    spare: bool = False
    """Whether it held nothing at the end of the load."""

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return self.handle[1]

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.handle[2]

    def view(self) -> torch.Tensor:
        """Its bytes as a tensor that owns no memory. Valid only while it is mapped."""
        device = self.handle[0]
        return torch.as_tensor(_DeviceRange(self.address, self.nbytes), device=f"cuda:{device}")


class _DeviceRange:
    """Device memory as NumPy's protocol for it describes it (version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class MappedMemory:
    """Every allocation of every pool. One a process: the extension has one pair of callbacks.

    torch never frees these pools. It would call the extension, and that Python, while it holds the
    lock of its allocator; a thread that holds the interpreter and frees a tensor waits for that
    lock. So a pool is kept for ever, and `sweep` takes the memory from under it. What is left are
    addresses, of which a process has 128 TiB.
    """

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}
        self._pools: dict[Owner, Any] = {}
        self._allocator: Any = None
        self._owner: Owner | None = None
        self._ended: deque[Owner] = deque()
        """Blocks of engines that have ended, until nothing uses their memory."""
        # The extension borrows its references to these.
        self._malloc_callback = self._on_malloc
        self._free_callback = self._on_free

    @contextmanager
    def pool(self, owner: Owner) -> Iterator[None]:
        """What this thread allocates inside can be parked. One at a time, and once an owner."""
        if self._allocator is None:
            self._allocator = cumem.get_pluggable_allocator(
                self._malloc_callback, self._free_callback
            )
            _keep_for_ever(self._allocator)
        # torch's own retry cannot follow a failure of the extension.
        torch.cuda.empty_cache()
        pool = torch.cuda.memory.MemPool(self._allocator._allocator)
        _keep_for_ever(pool)
        self._pools[owner] = pool
        self._owner = owner
        try:
            with torch.cuda.memory.use_mem_pool(pool):
                yield
        except BaseException:
            self._forget_failure(owner)
            raise
        finally:
            self._owner = None
        torch.cuda.synchronize()
        for segment in pool.snapshot():  # a pool is never allocated from again
            if segment["allocated_size"] == 0:
                spare = self._allocations[segment["address"]]
                self._unmap(spare)
                spare.spare = True

    def _forget_failure(self, owner: Owner) -> None:
        """Forget an allocation that failed.

        The extension announced it before it failed. It also keeps the error, and then fails every
        later call. The next call of Python's that fails clears the error.
        """
        with suppress(RuntimeError):
            cumem.create_and_map(NOTHING)
        known = {segment["address"] for segment in self._pools[owner].snapshot()}
        for allocation in self.of(owner):
            if allocation.address not in known:
                del self._allocations[allocation.address]

    def unmapped_bytes(self) -> int:
        """Bytes of addresses without memory, which torch still counts as reserved memory."""
        return sum(each.nbytes for each in self._allocations.values() if not each.mapped)

    def of(self, owner: Owner) -> list[Allocation]:
        """The allocations that hold something."""
        return [a for a in self._allocations.values() if a.owner == owner and not a.spare]

    def unmap(self, owner: Owner) -> None:
        """Give back the memory of a block. Its addresses stay reserved; its contents are lost."""
        torch.cuda.synchronize()
        for allocation in self.of(owner):
            self._unmap(allocation)

    def map(self, owner: Owner) -> None:
        """Map memory under a block's addresses again, all of them or none. Contents are undefined.

        Raises:
            torch.OutOfMemoryError: the device lacks the room.

        """
        torch.cuda.empty_cache()  # runs of other models leave memory cached
        done = []
        try:
            for allocation in self.of(owner):
                if not allocation.mapped:
                    self._map(allocation)
                    done.append(allocation)
        except RuntimeError as error:
            for allocation in done:
                self._unmap(allocation)
            raise torch.OutOfMemoryError(str(error)) from error

    def release(self, owner: Owner) -> None:
        """Note that an engine has ended. Any thread may call it, in the middle of anything."""
        self._ended.append(owner)

    def sweep(self) -> None:
        """Give back the memory of engines that have ended, as far as no tensor lies in it."""
        torch.cuda.synchronize()
        for _ in range(len(self._ended)):
            owner = self._ended.popleft()
            pool = self._pools.get(owner)
            segments = pool.snapshot() if pool is not None else ()
            used = {each["address"] for each in segments if each["allocated_size"]}
            for allocation in self._allocations.values():
                if allocation.owner == owner and allocation.address not in used:
                    self._unmap(allocation)
            if used:
                log.warning("tensors of an engine that has ended keep its %s", owner[1])
                self._ended.append(owner)

    def _on_malloc(self, handle: Handle) -> None:
        assert self._owner is not None  # only the pools above allocate here
        self._allocations[handle[2]] = Allocation(self._owner, handle)

    def _on_free(self, address: int) -> Handle:
        # Nothing should come here (see above). The extension unmaps what it is handed.
        allocation = self._allocations.pop(address)
        if not allocation.mapped:
            self._map(allocation)
        return allocation.handle

    def _map(self, allocation: Allocation) -> None:
        cumem.create_and_map(allocation.handle)
        allocation.mapped = True

    def _unmap(self, allocation: Allocation) -> None:
        if allocation.mapped:
            allocation.mapped = False
            cumem.unmap_and_release(allocation.handle)


def _keep_for_ever(thing: object) -> None:
    """Keep an object also at the interpreter's end, where torch would free the pools."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


MAPPED = MappedMemory()

_engines = itertools.count()


class ParkingWorker(Worker):  # type: ignore[misc]
    """vLLM's worker with weights and KV cache in the pools above. For vLLM's `--worker-cls`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = next(_engines)
        self.graph_bytes = 0
        for block in (WEIGHTS, KV_CACHE):
            weakref.finalize(self, MAPPED.release, (self.number, block))

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights into their own pool."""
        # cuBLAS allocates its workspace at the first multiplication. All engines share it, so it
        # must not be in the pool of one.
        one = torch.ones(1, 1, device=self.device)
        torch.mm(one, one)
        super().load_model(**kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """Compile and capture, and measure what the graphs keep."""
        before = torch.cuda.memory_reserved()
        done = super().compile_or_warm_up_model()
        torch.cuda.empty_cache()
        self.graph_bytes = max(0, torch.cuda.memory_reserved() - before)
        return done

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        # torch's expandable segments do not go with pools (pytorch/pytorch#147851).
        expandable = alloc_conf.conf_flag_enabled(
            alloc_conf.current_alloc_conf(), alloc_conf.EXPANDABLE_SEGMENTS
        )
        if tag not in (WEIGHTS, KV_CACHE) or expandable or not cumem.cumem_available:
            return nullcontext()
        return MAPPED.pool((self.number, tag))


class CudaMemory:
    """The blocks of a model whose worker is a `ParkingWorker`."""

    def __init__(
        self, worker: ParkingWorker, host: HostMemory | None, expected: Mapping[str, int]
    ) -> None:
        """Measure a model that was just loaded, and make its master copy if there is room.

        `expected` has the bytes of each block by the model's files, for blocks that are in no pool.
        Nothing may run on the model during the call.
        """
        self._number = worker.number
        self._host = host
        self._stream = torch.cuda.Stream()
        self._slabs: list[torch.Tensor] = []
        self._masters: list[tuple[Allocation, torch.Tensor]] = []
        self._make_masters()
        blocks = []
        for name, parkable in ((WEIGHTS, bool(self._masters)), (KV_CACHE, True)):
            nbytes = sum(allocation.nbytes for allocation in MAPPED.of((self._number, name)))
            if nbytes or expected[name]:
                blocks.append(
                    Block(
                        name,
                        nbytes or expected[name],
                        parkable and nbytes > 0,
                        scratch=name == KV_CACHE,
                    )
                )
        if worker.graph_bytes:
            blocks.append(Block(GRAPHS, worker.graph_bytes, parkable=False))
        blocks.append(Block(WORKSPACE, expected[WORKSPACE], parkable=True, scratch=True))
        self._blocks = tuple(blocks)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Weights and KV cache by the bytes in their pools; the workspace as estimated."""
        return self._blocks

    @property
    def host_bytes(self) -> int:
        """Bytes of the master copy of the weights."""
        return sum(int(slab.nbytes) for slab in self._slabs)

    def park(self, names: Collection[str]) -> None:
        """Unmap weights and KV cache. No option of ours changes weights in place."""
        for block in self._blocks:
            if block.name in names and block.parkable:
                MAPPED.unmap((self._number, block.name))

    def wake(self, names: Collection[str]) -> None:
        """Map these blocks; copy the weights' master, and zero the KV cache.

        Raises:
            torch.OutOfMemoryError: the device lacks the room. They are parked as before.

        """
        woken = [block.name for block in self._blocks if block.name in names and block.parkable]
        try:
            for name in woken:
                MAPPED.map((self._number, name))
            with torch.cuda.stream(self._stream):
                if WEIGHTS in woken:
                    for allocation, master in self._masters:
                        allocation.view().copy_(master, non_blocking=True)
                if KV_CACHE in woken:
                    for allocation in MAPPED.of((self._number, KV_CACHE)):
                        allocation.view().zero_()
            self._stream.synchronize()
        except BaseException:
            self.park(woken)
            raise

    def close(self) -> None:
        """Give the master copy back. The pools go with the worker."""
        self._masters.clear()
        while self._slabs and self._host is not None:
            self._host.free(self._slabs.pop())

    def _make_masters(self) -> None:
        if self._host is None:
            return
        groups: list[list[Allocation]] = []
        room_bytes = 0
        for allocation in MAPPED.of((self._number, WEIGHTS)):
            if allocation.nbytes > room_bytes:
                groups.append([])
                room_bytes = SLAB_BYTES
            groups[-1].append(allocation)
            room_bytes -= allocation.nbytes
        try:
            for group in groups:
                slab = self._host.allocate(sum(allocation.nbytes for allocation in group))
                self._slabs.append(slab)
                start = 0
                for allocation in group:
                    master = slab[start : start + allocation.nbytes]
                    master.copy_(allocation.view())
                    self._masters.append((allocation, master))
                    start += allocation.nbytes
        except HostMemoryFull as error:
            log.info("the model's weights will not be parked: %s", error)
            self.close()
        except BaseException:
            self.close()
            raise
