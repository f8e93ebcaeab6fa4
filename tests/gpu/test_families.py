"""Every image and video family on the device, beside a bare call of the library there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.runtimes.diffusers.runtime import DiffusersModel
from tests.engine.runtimes.diffusers.test_diffusers import (
    IMAGE_FAMILIES,
    VIDEO_FAMILIES,
    model_of,
)
from tests.gpu.device import DEVICE
from tests.gpu.libraries import library
from tests.gpu.requests import made

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

LEVELS = 2 if DEVICE == "cuda" else 0
"""Of 255: kernels of a card may be chosen by where the memory lies."""

EVERY = {**IMAGE_FAMILIES, **VIDEO_FAMILIES}
FAMILIES = EVERY if DEVICE == "cuda" else {name: EVERY[name] for name in ("tiny-sd15", "tiny-wan")}
"""On a CPU two show that these tests run: the tests of the runtime have them all."""

HALF = "float16" if DEVICE == "cuda" else "bfloat16"
"""Convolutions in float16 are slow on a CPU, or not there."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "half": ("tiny-sd15", {"dtype": HALF}),
    # Its VAE overflows in float16: the pipeline takes it to float32 for each picture, and back.
    "half-upcast": ("tiny-sdxl", {"dtype": HALF}),
    "half-vae32": ("tiny-wan", {"dtype": HALF, "vae_dtype": "float32"}),
    "tiled": ("tiny-sd15", {"vae_tiling": True}),
    "offloaded": ("tiny-sd15", {"offload": "group"}),
}


def task_of(name: str) -> str:
    return "image" if name in IMAGE_FAMILIES else "video"


def models() -> list[ModelConfig]:
    every = [model_of(name, task_of(name), spec) for name, spec in FAMILIES.items()]
    return every + [
        model_of(starter, task_of(starter), EVERY[starter], **options).model_copy(
            update={"id": name}
        )
        for name, (starter, options) in VARIANTS.items()
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("families")
    config = EngineConfig(
        device=DEVICE,
        memory="2GiB",
        host_memory="1GiB",
        cache_dir=cache_dir,
        state_dir=folder / "state",
        data_dir=folder / "data",
        models=tuple(models()),
    )
    engine = Engine(config)
    await engine.start()
    yield engine
    await engine.stop()


def assert_alike(found: NDArray[Any], expected: NDArray[Any], levels: int = LEVELS) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= levels


async def alone(engine: Engine, name: str) -> NDArray[Any]:
    model = engine.config.find(name)
    call = await asyncio.to_thread(library, model, engine.config.cache_dir, DEVICE)
    return await asyncio.to_thread(call)


@pytest.mark.parametrize("name", FAMILIES)
async def test_it_equals_the_library_alone_and_itself_after_a_park(
    engine: Engine, name: str
) -> None:
    model = engine.config.find(name)
    first = await made(engine, model)
    assert first.std() > 5
    assert_alike(first, await alone(engine, name))
    await engine.park(name)
    assert engine.model_status(name).device_bytes == 0
    assert_alike(await made(engine, model), first)
    await engine.unload(name)


@pytest.mark.parametrize("name", ["half", "half-upcast", "half-vae32", "tiled"])
async def test_dtypes_and_tiles_as_the_library_has_them(engine: Engine, name: str) -> None:
    model = engine.config.find(name)
    found = await made(engine, model)
    assert found.std() > 5, "a black or an even picture"
    assert_alike(found, await alone(engine, name))
    await engine.unload(name)


async def test_offloaded_parts_make_the_same_picture(engine: Engine) -> None:
    expected = await made(engine, engine.config.find("tiny-sd15"))
    found = await made(engine, engine.config.find("offloaded"))
    assert_alike(found, expected)
    full = engine.model_status("tiny-sd15").device_bytes
    assert engine.model_status("offloaded").device_bytes < 0.7 * full
    await engine.unload("offloaded")


async def test_parts_are_where_and_as_they_should_be(engine: Engine) -> None:
    """All weights on the device in the dtype of the options, attention by torch's own kernels."""
    for model_id in ("half", "half-vae32"):
        await made(engine, engine.config.find(model_id))
        loaded = engine._residency.loaded[model_id]
        assert isinstance(loaded, DiffusersModel) and loaded.model is not None
        for name, part in loaded.model.modules().items():
            wanted = "float32" if (model_id, name) == ("half-vae32", "vae") else HALF
            for tensor in part.parameters():
                assert tensor.device.type == DEVICE
                # What a library keeps in float32 by its own rule stays so: norms, embeddings.
                assert tensor.dtype in (getattr(torch, wanted), torch.float32), name
        if model_id == "half":
            kinds = {type(p).__name__ for p in loaded.model.base.unet.attn_processors.values()}
            assert kinds == {"AttnProcessor2_0"}
        await engine.unload(model_id)
