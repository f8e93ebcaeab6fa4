"""Speech models that leave the device and come back: each of the real libraries."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.errors import LoadFailed, OutOfDeviceMemory
from engine.memory.device import CpuDevice
from engine.memory.host_memory import HostMemory
from engine.memory.weights import Weights
from engine.process.gate import GATE
from engine.process.torch_state import share_torch_state
from engine.runtimes.bark.runtime import BarkRuntime
from engine.runtimes.base import RuntimeContext
from engine.runtimes.common.torch_model import TorchModel, TorchRuntime
from engine.runtimes.common.torch_run import WHOLE
from engine.runtimes.coqui.runtime import CoquiRuntime
from engine.runtimes.kokoro.runtime import KokoroRuntime
from engine.runtimes.pocket_tts.runtime import PocketRuntime
from tests.engine.runtimes.common.speaking import speech_model, spoken

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

KOKORO = speech_model("kokoro", "tiny-kokoro")
VITS = speech_model("coqui", "tiny-vits")
XTTS = speech_model("coqui", "tiny-xtts", language="en")
BARK = speech_model("bark", "tiny-bark")
POCKET = speech_model("pocket_tts", "tiny-pocket-tts")
RUNTIMES: dict[str, type[TorchRuntime]] = {
    "kokoro": KokoroRuntime,
    "coqui": CoquiRuntime,
    "bark": BarkRuntime,
    "pocket_tts": PocketRuntime,
}

SENTENCE = "The quick brown fox jumps over the lazy dog, again and again."
ROUNDS = 8
HOST_BYTES = 2**30
LEFT_BYTES = 24 * 1024
"""What may stay of a parked model beside its masters: the latents of tiny-xtts' two voices are 20
kB, and in host memory on a GPU machine as well."""


@dataclass
class Loaded:
    """A model, and what it says before it was ever parked."""

    runtime: TorchRuntime
    config: ModelConfig
    host: HostMemory
    model: TorchModel[Any]
    names: frozenset[str]
    others_bytes: int
    """Of all tensors before it was loaded."""
    expected: NDArray[np.float32]

    async def says_the_same(self) -> None:
        np.testing.assert_array_equal(
            await say(self.runtime, self.config, self.model), self.expected
        )


async def say(
    runtime: TorchRuntime, config: ModelConfig, model: TorchModel[Any]
) -> NDArray[np.float32]:
    return np.concatenate(await spoken(runtime, config, model, SENTENCE))


def started(config: ModelConfig, cache_dir: Path, host: HostMemory | None) -> TorchRuntime:
    runtime = RUNTIMES[config.runtime](RuntimeContext(CpuDevice(), cache_dir, host))
    runtime.start()
    share_torch_state()
    return runtime


async def load(runtime: TorchRuntime, config: ModelConfig) -> TorchModel[Any]:
    model = await runtime.load(config, pytest.fail)
    assert isinstance(model, TorchModel)
    return model


def tensor_bytes() -> int:
    """Of the memory of every tensor that Python knows."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # By its type: some libraries' objects raise when they are asked for their class.
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def bytes_on_device(model: TorchModel[Any]) -> int:
    assert model.model is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in model.model.known_tensors())


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="session",
    params=[KOKORO, VITS, XTTS, BARK, POCKET],
    ids=lambda config: config.id,
)
async def loaded(request: pytest.FixtureRequest, cache_dir: Path) -> AsyncIterator[Loaded]:
    config, host = request.param, HostMemory(HOST_BYTES, pinned=False)
    runtime = started(config, cache_dir, host)
    others_bytes = tensor_bytes()
    model = await load(runtime, config)
    names = frozenset(block.name for block in model.blocks())
    expected = await say(runtime, config, model)
    assert expected.std() > 0.001
    yield Loaded(runtime, config, host, model, names, others_bytes, expected)
    await runtime.unload(model)
    assert host.used_bytes == 0
    assert tensor_bytes() <= others_bytes + LEFT_BYTES
    await runtime.stop()


async def test_speech_is_the_same_after_many_rounds(loaded: Loaded) -> None:
    host_bytes = loaded.host.used_bytes
    for number in range(ROUNDS):
        await loaded.runtime.park(loaded.model, loaded.names)
        assert bytes_on_device(loaded.model) == 0
        await loaded.runtime.wake(loaded.model, loaded.names)
        if number in (0, ROUNDS - 1):
            await loaded.says_the_same()
    assert loaded.model.host_bytes == loaded.host.used_bytes == host_bytes


async def test_each_block_can_leave_alone(loaded: Loaded) -> None:
    for block in loaded.model.blocks():
        whole = bytes_on_device(loaded.model)
        await loaded.runtime.park(loaded.model, {block.name})
        assert bytes_on_device(loaded.model) < whole
        await loaded.runtime.wake(loaded.model, {block.name})
    await loaded.says_the_same()


async def test_nothing_but_the_masters_is_left_of_a_parked_model(loaded: Loaded) -> None:
    """Nor of its runs: weights computed from others, attention scores, prompts, voices."""
    await loaded.says_the_same()
    assert tensor_bytes() > loaded.others_bytes + 1.9 * loaded.host.used_bytes
    await loaded.runtime.park(loaded.model, loaded.names)
    left_bytes = tensor_bytes() - loaded.others_bytes - loaded.host.used_bytes
    await loaded.runtime.wake(loaded.model, loaded.names)
    assert left_bytes <= LEFT_BYTES


async def test_a_wake_without_room_leaves_it_parked(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded.model.model is not None
    weights: Weights = loaded.model.model.weights
    given: list[int] = []

    def empty(nbytes: int) -> torch.Tensor:
        if given:
            raise torch.OutOfMemoryError("no room")
        given.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    await loaded.runtime.park(loaded.model, loaded.names)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_empty", empty)
        with pytest.raises(OutOfDeviceMemory):
            await loaded.runtime.wake(loaded.model, loaded.names)
        patch.setattr(weights, "_copy", None)
        given.clear()
        with pytest.raises(LoadFailed):
            await loaded.runtime.wake(loaded.model, loaded.names)
    assert bytes_on_device(loaded.model) == 0
    await loaded.runtime.wake(loaded.model, loaded.names)
    await loaded.says_the_same()


async def test_estimates_say_what_the_load_will_do(loaded: Loaded) -> None:
    runtime, config = loaded.runtime, loaded.config
    measured = {block.name: block for block in loaded.model.blocks()}
    assert all(block.parkable for block in measured.values())
    estimate = runtime.estimate(config)
    assert all(block.parkable for block in estimate.blocks)
    assert {block.name for block in estimate.blocks} <= measured.keys()
    assert estimate.host_bytes == pytest.approx(loaded.model.host_bytes, rel=0.05)
    runtime.context = replace(runtime.context, host=None)
    try:
        assert not any(block.parkable for block in runtime.estimate(config).blocks)
    finally:
        runtime.context = replace(runtime.context, host=loaded.host)


async def test_speech_without_master_copies_is_the_same(loaded: Loaded, cache_dir: Path) -> None:
    for host in (None, HostMemory(1000, pinned=False)):
        runtime = started(loaded.config, cache_dir, host)
        model = await load(runtime, loaded.config)
        assert not any(block.parkable for block in model.blocks())
        assert model.host_bytes == 0
        np.testing.assert_array_equal(await say(runtime, loaded.config, model), loaded.expected)
        await runtime.unload(model)
        await runtime.stop()


async def test_moving_bytes_holds_nobody_up(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = started(VITS, cache_dir, HostMemory(HOST_BYTES, pinned=False))
    held = []
    fill = Weights._fill

    def watched(self: Weights, *arguments: Any) -> None:
        held.append(GATE.held)
        fill(self, *arguments)

    monkeypatch.setattr(Weights, "_fill", watched)
    model = await load(runtime, VITS)
    assert held == [False]
    await runtime.unload(model)


async def test_a_load_without_room_gives_everything_back(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostMemory(HOST_BYTES, pinned=False)
    runtime = started(VITS, cache_dir, host)
    before = tensor_bytes()

    def no_room(*_: Any) -> torch.Tensor:
        assert host.used_bytes
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "_empty", no_room)
        with pytest.raises(LoadFailed) as failed:
            await runtime.load(VITS, pytest.fail)
        assert host.used_bytes == 0
        # Although somebody holds the error.
        assert tensor_bytes() <= before + LEFT_BYTES, failed.value
    model = await load(runtime, VITS)
    assert model.host_bytes
    await runtime.unload(model)


async def test_parts_that_share_a_tensor_leave_together(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.runtimes.coqui.models import VitsSpeaker

    runtime = started(VITS, cache_dir, HostMemory(HOST_BYTES, pinned=False))
    place = VitsSpeaker.place

    def tie(self: VitsSpeaker, host: HostMemory | None) -> None:
        self.module.flow.register_parameter("tied", next(self.module.text_encoder.parameters()))
        place(self, host)

    model = await load(runtime, VITS)
    expected = await say(runtime, VITS, model)
    await runtime.unload(model)
    monkeypatch.setattr(VitsSpeaker, "place", tie)
    model = await load(runtime, VITS)
    assert [block.name for block in model.blocks()] == [WHOLE]
    await runtime.park(model, {WHOLE})
    await runtime.wake(model, {WHOLE})
    np.testing.assert_array_equal(await say(runtime, VITS, model), expected)
    await runtime.unload(model)


async def test_the_memory_of_a_large_model_leaves_the_process(cache_dir: Path) -> None:
    runtime = started(KOKORO, cache_dir, HostMemory(HOST_BYTES, pinned=False))
    model = await load(runtime, KOKORO)
    names = {block.name for block in model.blocks()}
    nbytes = sum(block.nbytes for block in model.blocks())
    await say(runtime, KOKORO, model)
    assert model.model is not None
    voices = [weakref.ref(voice) for voice in model.model._packs.values()]
    resident = psutil.Process().memory_info().rss
    await runtime.park(model, names)
    assert resident - psutil.Process().memory_info().rss == pytest.approx(nbytes, rel=0.05)
    assert [voice() for voice in voices] == [None], "read again when it is asked for again"
    await runtime.unload(model)
    assert resident - psutil.Process().memory_info().rss >= 1.95 * nbytes
    await runtime.stop()
