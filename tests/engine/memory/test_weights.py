"""Master copies of real modules: read, dropped, brought back."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.memory.host_memory import PAGE_BYTES, HostMemory
from engine.memory.slabs import CPU_ALIGNMENT, SharedMemory
from engine.memory.weights import Weights

pytestmark = pytest.mark.slow

MIB = 1024**2
PART = "part"


class Net(nn.Module):  # type: ignore[misc]
    """A tie, a view, a buffer that is not saved, and tensors of several widths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 40)
        self.deep = nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 40))
        self.head = nn.Linear(40, 300, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("first_rows", self.embed.weight.data[:3].t())
        self.register_buffer("positions", torch.arange(9), persistent=False)
        self.register_buffer("mask", torch.ones(30, 30).tril().view(1, 30, 30))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.empty(0, 5))
        self.narrow = nn.Parameter(torch.randn(3, 5).half())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.deep(self.embed(ids)))
        return made


@pytest.fixture
def net() -> Net:
    torch.manual_seed(5)
    made: Net = Net().eval()
    return made


@pytest.fixture
def host() -> HostMemory:
    return HostMemory(2 * 1024 * MIB, pinned=False)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for each in (
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
        for name, tensor in each
    }


def copies_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}


def check_equal(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(module)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def adopt(module: nn.Module, host: HostMemory | None) -> Weights:
    return Weights.adopt({PART: [module]}, host, "cpu")


def nothing_on_device(module: nn.Module) -> bool:
    tensors = list(tensors_of(module).values())
    # A view keeps the tensor that it was made from.
    tensors += [tensor._base for tensor in tensors if tensor._is_view()]
    return all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)


def test_modules_give_the_same_after_each_of_many_rounds(net: Net, host: HostMemory) -> None:
    ids = torch.tensor([0, 1, 2, 299])
    expected, before = net(ids), copies_of(net)
    identities = {name: id(tensor) for name, tensor in tensors_of(net).items()}
    weights = adopt(net, host)
    for _ in range(20):
        check_equal(net, before)
        assert torch.equal(net(ids), expected)
        weights.park([PART])
        assert nothing_on_device(net)
        weights.wake([PART])
    assert {name: id(tensor) for name, tensor in tensors_of(net).items()} == identities


def test_ties_and_views_stay(net: Net, host: HostMemory) -> None:
    weights = adopt(net, host)
    weights.park([PART])
    weights.wake([PART])
    assert net.head.weight is net.embed.weight
    with torch.no_grad():
        net.embed.weight[2, 7] = 123.0
    assert net.first_rows[7, 2] == 123.0
    assert net.first_rows.stride() == (1, 40)
    assert net.embed.weight.requires_grad and not net.first_rows.requires_grad


def test_bytes_are_those_really_allocated(net: Net, host: HostMemory) -> None:
    before = copies_of(net)
    weights = adopt(net, host)
    twice = ("head.weight", "first_rows")
    own = [tensor for name, tensor in before.items() if name not in twice]
    nbytes = weights.block_bytes()[PART]
    exactly = sum(tensor.numel() * tensor.itemsize for tensor in own)
    assert exactly <= nbytes <= exactly + 2 * CPU_ALIGNMENT * len(own)
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_of(net).values()}
    # A tensor without elements has memory of its own, of no bytes.
    assert sum(storage.nbytes() for storage in storages.values()) == nbytes
    assert weights.host_bytes == host.used_bytes == -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    weights.close()
    assert host.used_bytes == 0 and not weights.parkable


def test_parts_leave_one_by_one(host: HostMemory) -> None:
    one, two = nn.Linear(30, 30), nn.Linear(20, 20)
    before = copies_of(one), copies_of(two)
    weights = Weights.adopt({"one": [one], "two": [two]}, host, "cpu")
    weights.park(["one"])
    assert nothing_on_device(one)
    check_equal(two, before[1])
    weights.park(["one", "two"])
    weights.wake(["two"])
    assert nothing_on_device(one)
    check_equal(two, before[1])
    weights.wake(["one", "two"])
    check_equal(one, before[0])


def test_tensors_keep_their_alignment(host: HostMemory) -> None:
    """The last bits of what is computed depend on it."""
    memory = torch.randn(1000)
    module = module_of({f"at{n}": memory[n : n + 40] for n in (0, 50, 107, 900)})
    before = {
        name: tensor.data_ptr() % CPU_ALIGNMENT for name, tensor in tensors_of(module).items()
    }
    assert len(set(before.values())) == 4
    weights = adopt(module, host)
    weights.park([PART])
    weights.wake([PART])
    for name, tensor in tensors_of(module).items():
        assert tensor.data_ptr() % CPU_ALIGNMENT == before[name]


def test_tensors_at_odd_addresses(host: HostMemory) -> None:
    memory = bytearray(os.urandom(1000))
    module = module_of(
        {"odd": torch.frombuffer(memory, dtype=torch.int32, count=90, offset=3)},
    )
    expected = module.odd.tolist()
    weights = adopt(module, host)
    assert module.odd.tolist() == expected
    weights.park([PART])
    weights.wake([PART])
    assert module.odd.tolist() == expected


def test_slabs_are_bounded(net: Net, host: HostMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.memory.slabs.SLAB_BYTES", 8 * 1024)
    before = copies_of(net)
    taken: list[int] = []
    allocate = host.allocate

    def counting(nbytes: int) -> torch.Tensor:
        taken.append(nbytes)
        return allocate(nbytes)

    monkeypatch.setattr(host, "allocate", counting)
    weights = adopt(net, host)
    assert len(taken) > 3
    alone = [nbytes for nbytes in taken if nbytes > 12 * 1024]
    assert len(alone) == 1 and alone[0] - 300 * 40 * 4 <= 2 * CPU_ALIGNMENT, "the embedding"
    assert sum(taken) == weights.block_bytes()[PART]
    weights.park([PART])
    weights.wake([PART])
    check_equal(net, before)


def mapped(folder: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors as the library of safetensors maps them."""
    save_file(tensors, folder / "model.safetensors")
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def module_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were read from files since the beginning of the test."""
    counted: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        counted.append(preadv(descriptor, buffers, offset))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counted


def test_mapped_files_are_read_and_equal_memory(
    host: HostMemory, tmp_path: Path, reads: list[int]
) -> None:
    stored = mapped(tmp_path, big=torch.randn(1000, 3000), odd=torch.randn(7).bfloat16())
    module = module_of(stored)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    weights = adopt(module, host)
    assert sum(reads) == 1000 * 3000 * 4 + 14
    (tmp_path / "model.safetensors").write_bytes(b"")  # the file is not needed any more
    check_equal(module, before)
    weights.park([PART])
    weights.wake([PART])
    check_equal(module, before)


def test_a_mapped_tensor_changed_after_reading_is_taken_as_it_is(
    host: HostMemory, tmp_path: Path, reads: list[int]
) -> None:
    """Some libraries scale, fill or zero rows of what they have just read."""
    stored = mapped(tmp_path, changed=torch.randn(2000, 1000), same=torch.randn(4000, 1000))
    stored["changed"][777, 13] = 42.0
    module = module_of(stored)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    adopt(module, host)
    check_equal(module, before)
    assert module.changed[777, 13] == 42.0
    assert sum(reads) in (0, 4000 * 1000 * 4), "of the other, unless the two share the page"


def test_a_mapped_file_that_was_replaced_is_not_read(
    host: HostMemory, tmp_path: Path, reads: list[int]
) -> None:
    stored = mapped(tmp_path, a=torch.randn(100, 1000))
    module, before = module_of(stored), {"a": stored["a"].clone()}
    save_file({"a": torch.zeros(100, 1000)}, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    adopt(module, host)
    check_equal(module, before)
    assert not reads


def test_a_truncated_file_is_an_error_and_gives_everything_back(
    host: HostMemory, tmp_path: Path
) -> None:
    stored = mapped(tmp_path, a=torch.randn(1000, 1000))
    module = module_of(stored)
    address = module.a.data_ptr()
    os.truncate(tmp_path / "model.safetensors", 10_000)
    with pytest.raises(OSError, match="ends before"):
        adopt(module, host)
    assert host.used_bytes == 0
    assert module.a.data_ptr() == address, "untouched"


def test_a_change_in_place_outlives_a_park(net: Net, host: HostMemory) -> None:
    weights = adopt(net, host)
    with torch.no_grad():
        net.deep[0].weight.mul_(2)
        net.positions[4] = 99
    with torch.inference_mode():
        net.first_rows[0].zero_()
    expected = copies_of(net)
    for _ in range(2):
        weights.park([PART])
        weights.wake([PART])
        check_equal(net, expected)
    with torch.no_grad():
        net.deep[0].bias.add_(1)  # after a wake as well
    expected = copies_of(net)
    weights.park([PART])
    weights.wake([PART])
    check_equal(net, expected)


def test_what_is_unchanged_is_not_copied(
    net: Net, host: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = adopt(net, host)
    with torch.no_grad():
        net.narrow.zero_()
    copied: list[int] = []
    copy = torch.Tensor.copy_

    def counting(self: torch.Tensor, source: torch.Tensor, *rest: Any) -> torch.Tensor:
        copied.append(source.numel())
        return copy(self, source, *rest)

    monkeypatch.setattr(torch.Tensor, "copy_", counting)
    weights.park([PART])
    assert copied == [15]


def test_tensors_made_after_the_load_leave_and_come_back(net: Net, host: HostMemory) -> None:
    weights = adopt(net, host)
    with torch.inference_mode():
        net.register_buffer("cache", torch.arange(1000.0))
    net.deep.add_module("late", nn.Linear(3, 3))
    net.narrow.data = torch.ones(2, 2)  # of another shape and width than its place
    expected = copies_of(net)
    for _ in range(2):
        weights.park([PART])
        assert nothing_on_device(net)
        weights.wake([PART])
        check_equal(net, expected)


def test_data_given_to_a_known_tensor_is_kept(net: Net, host: HostMemory) -> None:
    """torch does not count this as a change."""
    weights = adopt(net, host)
    net.positions.data = torch.arange(9) * 5
    weights.park([PART])
    weights.wake([PART])
    assert torch.equal(net.positions, torch.arange(9) * 5)


def test_tensors_of_inference_mode_are_taken_for_changed(host: HostMemory) -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.register_buffer("state", torch.zeros(8))
    weights = adopt(module, host)
    for value in (3.0, 4.0):
        with torch.inference_mode():
            module.state.fill_(value)
        weights.park([PART])
        weights.wake([PART])
        assert torch.equal(module.state, torch.full((8,), value)) and module.state.is_inference()


def test_without_room_on_the_host_nothing_can_be_parked(net: Net) -> None:
    before = copies_of(net)
    small = HostMemory(50_000, pinned=False)
    for host in (None, small):
        weights = adopt(net, host)
        assert not weights.parkable and weights.host_bytes == 0
        check_equal(net, before)
        with pytest.raises(RuntimeError):
            weights.park([PART])
        check_equal(net, before)
    assert small.used_bytes == 0


def test_a_budget_that_holds_one_part_of_two_is_not_taken() -> None:
    host = HostMemory(2 * PAGE_BYTES, pinned=False)
    parts = {"one": [nn.Linear(20, 20)], "two": [nn.Linear(60, 60)]}
    assert not Weights.adopt(parts, host, "cpu").parkable
    assert host.used_bytes == 0


def out_of_room(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, after: int
) -> list[weakref.ref[torch.Tensor]]:
    """Let the device have room for so many slabs and no more. Returns those it gave."""
    given: list[weakref.ref[torch.Tensor]] = []

    def empty(nbytes: int) -> torch.Tensor:
        if len(given) == after:
            raise torch.OutOfMemoryError("no room")
        made = torch.empty(nbytes, dtype=torch.uint8)
        given.append(weakref.ref(made))
        return made

    monkeypatch.setattr(weights, "_empty", empty)
    return given


def test_a_wake_without_room_brings_back_nothing(
    host: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = nn.Linear(30, 30), nn.Linear(20, 20)
    before = copies_of(one), copies_of(two)
    weights = Weights.adopt({"one": [one], "two": [two]}, host, "cpu")
    weights.park(["one", "two"])
    with monkeypatch.context() as patch:
        given = out_of_room(weights, patch, after=1)
        with pytest.raises(torch.OutOfMemoryError):
            weights.wake(["one", "two"])
    assert nothing_on_device(one) and nothing_on_device(two)
    assert [slab() for slab in given] == [None], "given back"
    weights.wake(["one", "two"])
    check_equal(one, before[0])
    check_equal(two, before[1])


def test_a_load_without_room_on_the_device_changes_nothing(
    net: Net, host: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copies_of(net)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors_of(net).items()}

    def no_room(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Weights, "_empty", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        adopt(net, host)
    assert host.used_bytes == 0
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(net).items()} == addresses
    check_equal(net, before)


@pytest.mark.parametrize("second", [lambda net: net.head, lambda net: module_of_rows(net)])
def test_parts_that_overlap_are_refused(
    net: Net, host: HostMemory, second: Callable[[Net], nn.Module]
) -> None:
    before = copies_of(net)
    with pytest.raises(SharedMemory):
        Weights.adopt({"one": [net], "two": [second(net)]}, host, "cpu")
    assert host.used_bytes == 0
    check_equal(net, before)


def module_of_rows(net: Net) -> nn.Module:
    return module_of({"rows": net.embed.weight.data[1:2]})


def test_what_stands_on_no_memory_is_refused(host: HostMemory) -> None:
    with pytest.raises(SharedMemory, match="meta"):
        adopt(nn.Linear(3, 3, device="meta"), host)
    assert host.used_bytes == 0


def test_a_large_model_really_leaves_the_process(host: HostMemory) -> None:
    """256 MiB: on a CPU the device's copy and the master are two, the library's own is gone."""
    module = nn.ModuleList(nn.Linear(4096, 2048, bias=False) for _ in range(8))
    process, size = psutil.Process(), 256 * MIB

    def held() -> int:
        gc.collect()
        nbytes: int = process.memory_info().rss
        return nbytes

    weights = adopt(module, host)
    resident = held()
    weights.park([PART])
    parked = held()
    assert resident - parked == pytest.approx(size, rel=0.05)
    weights.wake([PART])
    assert held() - parked == pytest.approx(size, rel=0.05)
    weights.park([PART])
    weights.close()
    del weights
    assert parked - held() == pytest.approx(size, rel=0.05), "the master, and no third copy"


def test_the_budget_is_one_for_all(net: Net) -> None:
    host = HostMemory(100_000, pinned=False)
    first = adopt(net, host)
    assert first.parkable
    other = Net()
    assert not adopt(other, host).parkable
    first.close()
    assert adopt(other, host).parkable
    assert host.used_bytes + host.free_bytes == 100_000


def test_a_pause_between_chunks(host: HostMemory) -> None:
    module = nn.Linear(4096, 1024, bias=False)
    weights = adopt(module, host)
    weights.park([PART])
    pauses: list[None] = []
    weights.wake([PART], pause=lambda: pauses.append(None))
    assert len(pauses) == 2, "one for each 8 MiB"
