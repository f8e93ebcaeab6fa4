"""Speech on the device: equal to the library alone there, and after a park."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from tests.gpu.device import DEVICE
from tests.gpu.libraries import library
from tests.gpu.requests import made

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

TOLERANCE = 1e-3 if DEVICE == "cuda" else 1e-6
"""Of samples between -1 and 1."""

MODELS = (
    ModelConfig(id="kokoro", runtime="kokoro", task="speech", source="starter:tiny-kokoro"),
    ModelConfig(id="xtts", runtime="coqui", task="speech", source="starter:tiny-xtts"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("speech")
    config = EngineConfig(
        device=DEVICE,
        memory="2GiB",
        host_memory="1GiB",
        cache_dir=cache_dir,
        state_dir=folder / "state",
        data_dir=folder / "data",
        models=MODELS,
    )
    engine = Engine(config)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
async def test_it_equals_the_library_alone_and_itself_after_a_park(
    engine: Engine, model: ModelConfig
) -> None:
    first = await made(engine, model)
    assert first.std() > 0.001
    call = await asyncio.to_thread(library, model, engine.config.cache_dir, DEVICE)
    expected = await asyncio.to_thread(call)
    assert first.size == pytest.approx(expected.size, rel=0.02)
    count = min(first.size, expected.size)
    np.testing.assert_allclose(first[:count], expected[:count].reshape(-1), atol=TOLERANCE)
    await engine.park(model.id)
    assert engine.model_status(model.id).device_bytes == 0
    np.testing.assert_allclose(await made(engine, model), first, atol=TOLERANCE)
