"""What the residency measures of the models that it moves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.engine import Engine
from engine.residency import LEAK_BYTES
from engine.runtimes.base import LoadedModel
from engine.runtimes.registry import REGISTRY
from tests.server.fake import MODEL_BYTES, FakeDevice, FakeRuntime, fake_engine

RESIDUAL = "roundhouse_unload_residual_bytes"


class CountedDevice(FakeDevice):
    """Reports what the test says that the process uses."""

    used_bytes = 0

    def own_bytes(self) -> int:
        return self.used_bytes


class Leaky(FakeRuntime):
    """Gives back all but `kept_bytes`."""

    device: CountedDevice
    kept_bytes = 0

    async def unload(self, loaded: LoadedModel) -> None:
        self.device.used_bytes += self.kept_bytes - MODEL_BYTES


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, unfrozen_heap: None) -> Leaky:
    monkeypatch.setitem(REGISTRY, "fake", "tests.server.fake:FakeRuntime")
    runtime = Leaky()
    runtime.device = CountedDevice()
    return runtime


@pytest_asyncio.fixture
async def engine(runtime: Leaky, tmp_path: Path) -> AsyncIterator[Engine]:
    config = fake_engine(runtime, tmp_path).config
    engine = Engine(config, device=runtime.device, runtimes={"fake": runtime})
    await engine.start()
    yield engine
    await engine.stop()


@pytest.mark.parametrize(
    ("kept_bytes", "warned"), [(0, False), (LEAK_BYTES, False), (LEAK_BYTES + 1, True)]
)
async def test_what_an_unload_does_not_give_back_is_reported(
    engine: Engine,
    runtime: Leaky,
    caplog: pytest.LogCaptureFixture,
    kept_bytes: int,
    warned: bool,
) -> None:
    await engine.load("small")
    runtime.device.used_bytes += MODEL_BYTES
    runtime.kept_bytes = kept_bytes
    with caplog.at_level(logging.WARNING, "engine.residency"):
        await engine.unload("small")
    assert engine.metrics.get_sample_value(RESIDUAL, {"model": "small"}) == kept_bytes
    assert ("were not given back" in caplog.text) is warned
