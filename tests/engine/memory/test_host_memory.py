"""Host memory within a budget, and what of it may go at any time."""

from __future__ import annotations

import pytest

from engine.memory.host_memory import PAGE_BYTES, HostMemory, HostMemoryFull

pytestmark = pytest.mark.slow  # imports torch

MIB = 2**20


def spare_of(host: HostMemory, owner: str, *sizes: int) -> object:
    return host.make_spare(owner, [host.allocate(size) for size in sizes])


def test_spares_go_for_others_and_the_oldest_goes_first() -> None:
    host = HostMemory(8 * MIB, pinned=False)
    old = host.make_spare("old", [host.allocate(MIB), host.allocate(MIB)])
    new = host.make_spare("new", [host.allocate(2 * MIB)])
    assert (host.used_bytes, host.unused_bytes, host.free_bytes) == (4 * MIB, 4 * MIB, 8 * MIB)
    assert host.spare_bytes() == {"old": 2 * MIB, "new": 2 * MIB}
    first = host.allocate(4 * MIB)  # beside them
    assert host.spare_bytes() == {"old": 2 * MIB, "new": 2 * MIB}
    second = host.allocate(PAGE_BYTES)
    assert host.spare_bytes() == {"new": 2 * MIB} and host.take_spare(old) == []
    host.free(second)
    kept = host.take_spare(new)
    assert [slab.numel() for slab in kept] == [2 * MIB] and host.spare_bytes() == {}
    assert host.used_bytes == 6 * MIB
    for slab in (*kept, first):
        host.free(slab)
    assert host.used_bytes == 0


def test_what_does_not_fit_even_without_spares_drops_none() -> None:
    host = HostMemory(4 * MIB, pinned=False)
    slab = host.allocate(MIB)
    spare_of(host, "a", MIB)
    with pytest.raises(HostMemoryFull, match=r"3\.0 MiB of host memory free"):
        host.allocate(3 * MIB + 1)
    assert host.spare_bytes() == {"a": MIB}
    host.reserve(3 * MIB)
    assert host.spare_bytes() == {} and host.unused_bytes == 0
    host.unreserve(3 * MIB)
    host.free(slab)
    assert host.used_bytes == 0


def test_a_spare_is_taken_once_and_ends_with_the_memory() -> None:
    host = HostMemory(4 * MIB, pinned=False)
    spare = host.make_spare("a", [host.allocate(MIB)])
    spare_of(host, "a", PAGE_BYTES)
    assert host.spare_bytes() == {"a": MIB + PAGE_BYTES}
    (slab,) = host.take_spare(spare)
    assert host.take_spare(spare) == []
    host.free(slab)
    host.close()
    assert host.used_bytes == 0 and host.spare_bytes() == {}


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Page-locked memory of a machine without a GPU; the sizes that were allocated."""
    import torch

    made: list[int] = []
    empty = torch.empty

    def allocate(nbytes: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(nbytes)
        return empty(nbytes, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    memory = torch.accelerator.memory
    monkeypatch.setattr(memory, "empty_host_cache", lambda: made.append(0), raising=False)
    return made


def test_page_locked_slabs_are_used_again(pinned: list[int]) -> None:
    host = HostMemory(8 * MIB, pinned=True)
    slab = host.allocate(MIB + 1)
    assert slab.numel() == host.rounded(MIB + 1) == 2 * MIB, "a power of two"
    host.free(slab)
    assert host.used_bytes == 0
    assert host.allocate(2 * MIB) is slab and pinned == [2 * MIB]
    dropped = host.make_spare("a", [slab])
    host.reserve(7 * MIB)  # the slab of the spare is idle now, and its room is wanted
    assert host.take_spare(dropped) == [] and pinned == [2 * MIB, 0]
    host.unreserve(7 * MIB)
    host.allocate(2 * MIB)
    assert pinned == [2 * MIB, 0, 2 * MIB]


def test_an_allocation_that_fails_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(nbytes: int) -> None:
        raise MemoryError(nbytes)

    monkeypatch.setattr("engine.memory.host_memory.host_slab", fail)
    host = HostMemory(4 * MIB, pinned=False)
    with pytest.raises(MemoryError):
        host.allocate(MIB)
    assert host.used_bytes == 0
