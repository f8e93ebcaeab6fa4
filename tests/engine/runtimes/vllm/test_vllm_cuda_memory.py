"""The bookkeeping of parkable CUDA memory, with the C extension replaced at its own interface.

What it cannot tell: whether torch and CUDA do as their sources say (tests/gpu/test_vllm_park.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.memory.host_memory import HostMemory
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.runtime import VllmRuntime

pytestmark = pytest.mark.slow

EXPECTED = {"weights": 1, "kv_cache": 1, "workspace": 7}
PAGE = 4096


class Card:
    """The extension's side: addresses that may have memory under them."""

    def __init__(self, total_bytes: int) -> None:
        self.free_bytes = total_bytes
        self.memory: dict[int, Any] = {}
        self.reserved: set[int] = set()
        self.segments: list[dict[str, int]] = []
        self.failed = False
        """The extension keeps an error, which fails all that comes after, until a call raises."""
        self._malloc: Callable[[Any], None]
        self._free: Callable[[int], Any]
        self._next = PAGE

    def allocator(self, malloc: Callable[[Any], None], free: Callable[[int], Any]) -> Any:
        self._malloc, self._free = malloc, free
        return SimpleNamespace(_allocator=None)

    def allocate(self, nbytes: int, *, used: bool = True) -> int:
        import torch

        address, self._next = self._next, self._next + nbytes
        handle = (0, nbytes, address, 0)
        self._malloc(handle)  # before anything can fail
        if self.failed or nbytes > self.free_bytes:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.reserved.add(address)
        self.map(*handle)
        self.segments.append({"address": address, "allocated_size": nbytes if used else 0})
        return address

    def map(self, device: int, nbytes: int, address: int, pointer: int) -> None:
        import torch

        if not nbytes:
            self.failed = False
            raise RuntimeError("CUDA Error: invalid argument")
        assert address in self.reserved
        assert address not in self.memory
        if nbytes > self.free_bytes:
            raise RuntimeError("CUDA Error: out of memory")
        self.free_bytes -= nbytes
        self.memory[address] = torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def unmap(self, device: int, nbytes: int, address: int, pointer: int) -> None:
        assert not self.failed, "unmapped, and its memory lost"
        del self.memory[address]
        self.free_bytes += nbytes


@pytest.fixture
def card(vllm_runtime: VllmRuntime, monkeypatch: pytest.MonkeyPatch) -> Card:
    """A device of 64 KiB, and bookkeeping with nothing in it."""
    import torch
    from vllm.device_allocator import cumem

    from engine.runtimes.vllm import cuda_memory

    card = Card(16 * PAGE)

    @contextmanager
    def use_pool(pool: Any) -> Iterator[None]:
        yield

    def view(allocation: cuda_memory.Allocation) -> Any:
        return card.memory[allocation.handle[2]]

    monkeypatch.setattr(cumem, "get_pluggable_allocator", card.allocator)
    monkeypatch.setattr(cumem, "python_create_and_map", card.map)
    monkeypatch.setattr(cumem, "python_unmap_and_release", card.unmap)

    def new_pool(allocator: Any) -> Any:
        segments: list[dict[str, int]] = []
        card.segments = segments
        return SimpleNamespace(snapshot=lambda: list(segments))

    monkeypatch.setattr(torch.cuda.memory, "MemPool", new_pool)
    monkeypatch.setattr(torch.cuda.memory, "use_mem_pool", use_pool)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card.free_bytes, 16 * PAGE))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(cuda_memory.Allocation, "view", view)
    monkeypatch.setattr(cuda_memory, "MAPPED", cuda_memory.MappedMemory())
    return card


def engine(card: Card, number: int, host: HostMemory | None) -> tuple[Any, list[int], list[int]]:
    """An engine of two pages of weights, one that is freed in the load, and three of KV cache."""
    from engine.runtimes.vllm import cuda_memory

    mapped = cuda_memory.MAPPED
    with mapped.pool((number, "weights")):
        weights = [card.allocate(PAGE), card.allocate(PAGE)]
        card.allocate(PAGE, used=False)
    for index, address in enumerate(weights):
        card.memory[address].fill_(10 * number + index)
    with mapped.pool((number, "kv_cache")):
        kv_cache = [card.allocate(3 * PAGE)]
    worker: Any = SimpleNamespace(number=number, graph_bytes=0)
    return cuda_memory.CudaMemory(worker, host, EXPECTED), weights, kv_cache


def test_engines_park_one_by_one_and_come_back_at_their_addresses(card: Card) -> None:
    host = HostMemory(2**20, pinned=False)
    one, weights, kv_cache = engine(card, 1, host)
    other, other_weights, other_kv = engine(card, 2, host)
    assert {b.name: (b.nbytes, b.parkable) for b in one.blocks} == {
        "weights": (2 * PAGE, True),
        "kv_cache": (3 * PAGE, True),
        "workspace": (7, True),
    }
    one.park(("kv_cache",))
    assert set(card.memory) == {*weights, *other_weights, *other_kv}
    one.park(("weights", "kv_cache", "workspace"))
    assert set(card.memory) == {*other_weights, *other_kv}
    one.wake(("weights", "kv_cache"))
    assert set(card.memory) == {*weights, *kv_cache, *other_weights, *other_kv}
    assert [int(card.memory[address].unique()) for address in weights] == [10, 11]
    assert [int(card.memory[address].unique()) for address in other_weights] == [20, 21]
    assert int(card.memory[kv_cache[0]].unique()) == 0
    one.close()
    other.close()
    assert host.used_bytes == 0


def test_a_wake_without_room_leaves_all_parked(card: Card) -> None:
    import torch

    memory, weights, kv_cache = engine(card, 1, HostMemory(2**20, pinned=False))
    memory.park(("weights", "kv_cache"))
    card.free_bytes = 4 * PAGE
    with pytest.raises(torch.OutOfMemoryError):
        memory.wake(("weights", "kv_cache"))
    assert not card.memory
    assert card.free_bytes == 4 * PAGE
    card.free_bytes = 5 * PAGE
    memory.wake(("weights", "kv_cache"))
    assert set(card.memory) == {*weights, *kv_cache}


def test_an_engine_that_has_ended_gives_its_memory_back_by_the_sweep(card: Card) -> None:
    """Parked or not, and never by torch: its addresses stay reserved."""
    from engine.runtimes.vllm import cuda_memory

    mapped = cuda_memory.MAPPED
    memory, _, _ = engine(card, 1, HostMemory(2**20, pinned=False))
    _, other_weights, other_kv = engine(card, 2, None)
    memory.park(("weights",))
    for block in ("weights", "kv_cache"):
        mapped.release((1, block))
        for segment in mapped._pools[1, block].snapshot():
            segment["allocated_size"] = 0  # its tensors are gone
    assert len(card.memory) == 4, "given back where the engine ended, in the middle of anything"
    mapped.sweep()
    assert set(card.memory) == {*other_weights, *other_kv}
    assert mapped.unmapped_bytes() == (6 + 1) * PAGE, "with the one that the other's load freed"
    mapped.sweep()
    assert set(card.memory) == {*other_weights, *other_kv}


def test_memory_that_a_tensor_still_uses_waits_for_the_next_sweep(card: Card) -> None:
    from engine.runtimes.vllm import cuda_memory

    mapped = cuda_memory.MAPPED
    engine(card, 1, None)
    (segment,) = card.segments  # of the KV cache, whose pool was the last
    mapped.release((1, "kv_cache"))
    mapped.sweep()
    assert segment["address"] in card.memory
    segment["allocated_size"] = 0
    mapped.sweep()
    assert segment["address"] not in card.memory


def test_a_load_without_room_leaves_nothing_behind(card: Card) -> None:
    """The extension told of the allocation before it failed, and keeps its error."""
    import torch

    from engine.runtimes.vllm import cuda_memory

    mapped = cuda_memory.MAPPED
    other, _, other_kv = engine(card, 2, HostMemory(2**20, pinned=False))
    with pytest.raises(torch.OutOfMemoryError), mapped.pool((1, "weights")):
        first = card.allocate(PAGE)
        card.allocate(100 * PAGE)
    assert [each.address for each in mapped.of((1, "weights"))] == [first]
    other.park(("kv_cache",))
    assert other_kv[0] not in card.memory
    card.segments[0]["allocated_size"] = 0
    mapped.release((1, "weights"))
    mapped.sweep()
    assert first not in card.memory
    engine(card, 3, None)


def test_graphs_are_counted(card: Card) -> None:
    from engine.runtimes.vllm import cuda_memory

    worker: Any = SimpleNamespace(number=1, graph_bytes=5 * PAGE)
    memory = cuda_memory.CudaMemory(worker, None, EXPECTED)
    (graphs,) = (block for block in memory.blocks if block.name == "graphs")
    assert (graphs.nbytes, graphs.parkable) == (5 * PAGE, False)


@pytest.mark.parametrize("host", [None, HostMemory(PAGE, pinned=False)])
def test_without_a_master_the_weights_stay(
    card: Card, monkeypatch: pytest.MonkeyPatch, host: HostMemory | None
) -> None:
    from engine.runtimes.vllm import cuda_memory

    monkeypatch.setattr(cuda_memory, "SLAB_BYTES", PAGE)  # the first of two finds room
    memory, weights, _ = engine(card, 1, host)
    assert {b.name: b.parkable for b in memory.blocks} == {
        "weights": False,
        "kv_cache": True,
        "workspace": True,
    }
    memory.park(("weights", "kv_cache"))
    assert set(card.memory) == set(weights)
    assert memory.host_bytes == 0
    assert host is None or host.used_bytes == 0


def test_the_worker_takes_the_place_of_vllms_own(
    vllm_runtime: VllmRuntime, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name that vLLM's command line is given, and through the one method it asks."""
    from vllm.device_allocator import cumem
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_worker import Worker

    from engine.runtimes.vllm import cuda_memory

    device: Any = SimpleNamespace(kind="cuda")
    runtime = VllmRuntime(RuntimeContext(device, tmp_path))
    line = runtime._files(ModelConfig(id="m", source="starter:tiny-llama")).command_line(1)
    found = resolve_obj_by_qualname(line[line.index("--worker-cls") + 1])
    assert issubclass(found, Worker)
    assert "_maybe_get_memory_pool_context" in vars(Worker)
    monkeypatch.setattr(cumem, "cumem_available", True)
    worker = object.__new__(found)
    worker.number = 5
    for tag in ("weights", "kv_cache", "runtime", "workspace"):
        with worker._maybe_get_memory_pool_context(tag):
            if tag in ("weights", "kv_cache"):
                card.allocate(PAGE)
                assert len(cuda_memory.MAPPED.of((5, tag))) == 1
    assert set(cuda_memory.MAPPED._pools) == {(5, "weights"), (5, "kv_cache")}
