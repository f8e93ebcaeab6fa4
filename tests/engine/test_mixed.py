"""A language model and an image model that cannot both be on the device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from engine.admission import WORKING_MARGIN
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.events import ImageResult
from engine.requests import ImageOperation, ImageRequest
from engine.runtimes.diffusers.runtime import DiffusersRuntime
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.scheduling.estimates import EstimateStore
from tests.engine.conftest import MakeModel
from tests.engine.runtimes.diffusers.test_diffusers import Shared, runtime
from tests.engine.runtimes.vllm.greedy import PROMPTS, completion
from tests.engine.runtimes.vllm.test_engine_vllm import (
    RunningRuntime,
    assert_adds_up,
    overgrants,
    text,
)

__all__ = ["runtime"]  # the fixture

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

REQUESTS = 30
AT_ONCE = 6
SPARE_BYTES = 2 * 2**20
"""Beside the language model; the pipeline takes 3 MiB, and 40 MiB more for a picture."""


@pytest_asyncio.fixture(loop_scope="session")
async def engine(
    runtime: DiffusersRuntime,
    vllm_runtime: VllmRuntime,
    make_model: MakeModel,
    cache_dir: Path,
    tmp_path: Path,
) -> AsyncIterator[Engine]:
    image = ModelConfig(
        id="image",
        runtime="diffusers",
        task="image",
        source="starter:tiny-sdxl-turbo",
        options={
            "dtype": "float32",
            "width": 448,
            "height": 448,
            "default": {"steps": 1, "guidance": 0.0},
        },
    )
    llama = make_model("llama", max_num_batched_tokens=512)
    config = EngineConfig(
        device="cpu",
        memory=vllm_runtime.estimate(llama).nbytes + SPARE_BYTES,
        max_overtake_s=1.0,
        cache_dir=cache_dir,
        state_dir=tmp_path,
        models=(llama, image),
    )
    engine = Engine(
        config,
        device=vllm_runtime.context.device,
        runtimes={"vllm": partial(RunningRuntime, vllm_runtime), "diffusers": Shared},
    )
    await engine.start()
    yield engine
    await engine.stop()


async def test_mixed_requests_take_turns_within_the_budget(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    remember = EstimateStore.put_working_bytes

    def noted(store: EstimateStore, model: ModelConfig, shape: str, nbytes: int) -> None:
        measured.append(nbytes)
        remember(store, model, shape, nbytes)

    monkeypatch.setattr(EstimateStore, "put_working_bytes", noted)
    both_resident = False
    free = asyncio.Semaphore(AT_ONCE)
    texts: dict[int, set[str]] = {}
    pictures: dict[int, bytes] = {}

    async def one(index: int) -> None:
        nonlocal both_resident
        async with free:
            if index % 2:
                prompt = index % len(PROMPTS)
                answer = await text(engine, completion("llama", PROMPTS[prompt]))
                texts.setdefault(prompt, set()).add(answer)
            else:
                request = ImageRequest(
                    model="image",
                    operation=ImageOperation.GENERATION,
                    request_id=str(index),
                    prompt="a red train",
                    seed=index,
                )
                session = await engine.open(request)
                result = [event async for event in session.events()][-1]
                assert isinstance(result, ImageResult)
                pictures[index] = np.asarray(result.images[0]).tobytes()
            resident = [model for model in engine.status().models if model.state == "resident"]
            both_resident = both_resident or len(resident) > 1
            assert_adds_up(engine)

    await asyncio.gather(*(one(index) for index in range(REQUESTS)))
    assert not both_resident
    assert sum(len(answers) for answers in texts.values()) == len(texts) > 1
    assert len(set(pictures.values())) == len(pictures) == REQUESTS // 2
    assert overgrants(engine) == []
    # A load forgets what was measured, so that the next run of it measures again.
    await engine.unload("image")
    await one(0)
    assert len(measured) >= 2
    granted = measured[0] * (1 + WORKING_MARGIN)
    assert all(abs(peak - granted) <= 0.1 * granted for peak in measured[1:])
