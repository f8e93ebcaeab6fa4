"""Real shortage of device memory: what is answered, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import EngineError, LoadFailed, OutOfDeviceMemory
from tests.gpu.device import DEVICE, only_free
from tests.gpu.requests import made, text_request

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

LITTLE = 64 * 2**20
PICTURE = {"dtype": "float32", "default": {"steps": 1, "guidance": 1.0}}
TEXT = {"dtype": "float32", "max_model_len": 512, "kv_cache": "256MiB", "enforce_eager": True}
MODELS = (
    ModelConfig(id="speech", runtime="kokoro", task="speech", source="starter:tiny-kokoro"),
    ModelConfig(
        id="image", runtime="diffusers", task="image", source="starter:tiny-sd15", options=PICTURE
    ),
    ModelConfig(id="text", source="starter:tiny-llama", options=TEXT),
)
SPEECH, IMAGE, TEXT_MODEL = MODELS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("memory")
    config = EngineConfig(
        device=DEVICE,
        memory="4GiB",
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


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started: Engine) -> AsyncIterator[Engine]:
    """Everything was loaded once before, so that only the model's own bytes are asked for."""
    for model in (SPEECH, IMAGE):
        await started.load(model.id)  # at once, also after a load that failed
        await made(started, model, **({"width": 64, "height": 64} if model is IMAGE else {}))
        await started.unload(model.id)
    yield started
    for model in MODELS:
        if started.model_status(model.id).device_bytes:
            await started.unload(model.id)
    assert started.status().ledger.granted_bytes == 0


async def tokens(engine: Engine) -> int:
    session = await engine.open(text_request("text", max_tokens=4))
    return len([frame async for frame in session.events()])


async def test_in_a_load(engine: Engine) -> None:
    with only_free(LITTLE), pytest.raises((OutOfDeviceMemory, LoadFailed)):
        await made(engine, SPEECH)
    assert engine.model_status("speech").device_bytes == 0
    assert engine.status().ledger.granted_bytes == 0
    await engine.load("speech")
    assert (await made(engine, SPEECH)).size > 0


async def test_in_a_step_of_an_image(engine: Engine) -> None:
    small = await made(engine, IMAGE, width=64, height=64)
    # oneDNN on a CPU says only that it could not create a primitive.
    expected = OutOfDeviceMemory if DEVICE == "cuda" else EngineError
    side = 1536 if DEVICE == "cuda" else 768  # a processor takes its time
    with only_free(LITTLE), pytest.raises(expected):
        await made(engine, IMAGE, width=side, height=side)
    again = await made(engine, IMAGE, width=64, height=64)
    assert (again == small).all()


async def test_in_a_wake(engine: Engine) -> None:
    before = await made(engine, SPEECH)
    await engine.park("speech")
    with only_free(LITTLE), pytest.raises(EngineError) as raised:
        await made(engine, SPEECH)
    assert isinstance(raised.value, OutOfDeviceMemory | LoadFailed)
    await engine.load("speech")
    after = await made(engine, SPEECH)
    assert after == pytest.approx(before, abs=1e-3)


async def test_in_the_load_of_a_language_model(engine: Engine) -> None:
    assert await tokens(engine) > 0
    await engine.unload("text")
    with only_free(LITTLE), pytest.raises((OutOfDeviceMemory, LoadFailed)):
        await tokens(engine)
    assert engine.status().ledger.granted_bytes == 0
    await engine.load("text")
    assert await tokens(engine) > 0
