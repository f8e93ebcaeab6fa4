"""Real diffusers pipelines in this process, each beside a bare call of the library."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import EngineError, InvalidRequest, LoadFailed, RuntimeFailed
from engine.events import Event, ImageResult, PartialImage, Progress, VideoResult
from engine.memory.device import CpuDevice
from engine.memory.host_memory import HostMemory
from engine.process.gate import GATE
from engine.process.heap import freeze_heap, thaw_heap
from engine.process.torch_state import share_torch_state
from engine.requests import (
    ImageOperation,
    ImageRequest,
    LoraChoice,
    Quality,
    TextRequest,
    VideoRequest,
)
from engine.runtimes.base import RuntimeContext
from engine.runtimes.diffusers.runtime import DiffusersModel, DiffusersRuntime
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.starters.registry import ensure_starter
from tests.engine.conftest import MakeModel
from tests.engine.runtimes.vllm.greedy import completion, text_of
from tests.test_configs import STARTER_CONFIG, read

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

SEED = 11
TURBO = {
    "class": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
}
LINEAR = {
    "class": "DDIMScheduler",
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}

IMAGE_FAMILIES: dict[str, dict[str, Any]] = {
    "tiny-sdxl-turbo": {"steps": 2, "guidance": 0.0, "scheduler": TURBO},
    "tiny-sdxl": {"steps": 3, "guidance": 5.0},
    "tiny-sd15": {"steps": 3, "guidance": 7.5},
    "tiny-flux-schnell": {"steps": 2, "guidance": 0.0},
    "tiny-flux-dev": {"steps": 3, "guidance": 3.5},
    "tiny-flux2-klein": {"steps": 2, "guidance": 1.0},
    "tiny-z-image": {"steps": 2, "guidance": 0.0},
}
VIDEO_FAMILIES: dict[str, dict[str, Any]] = {
    "tiny-svd": {"frames": 5, "steps": 2, "guidance": 3.0},
    "tiny-animatediff": {"frames": 4, "steps": 2, "guidance": 7.5, "scheduler": LINEAR},
    "tiny-animatediff-sdxl": {"frames": 4, "steps": 2, "guidance": 7.5, "scheduler": LINEAR},
    "tiny-wan": {"frames": 5, "steps": 2, "guidance": 5.0},
    "tiny-wan-ti2v": {"frames": 5, "steps": 2, "guidance": 5.0},
    "tiny-ltx": {"frames": 9, "steps": 2, "guidance": 3.0},
    "tiny-cogvideox": {"frames": 9, "steps": 2, "guidance": 6.0},
    "tiny-hunyuanvideo": {"frames": 5, "steps": 2, "guidance": 6.0},
}
ADAPTERS = ("tiny-lora-sd15", "tiny-lora-sd15-b", "tiny-lora-sdxl")


@pytest.fixture(scope="module")
def loras(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: in a folder, as a file, and one that is for nothing."""
    folder = tmp_path_factory.mktemp("loras")
    first = ensure_starter(ADAPTERS[0], cache_dir)
    (folder / ADAPTERS[0]).symlink_to(first, target_is_directory=True)
    source = ensure_starter(ADAPTERS[2], cache_dir) / "pytorch_lora_weights.safetensors"
    (folder / f"{ADAPTERS[2]}.safetensors").symlink_to(source)
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    # One more pair of tensors, for a layer that the model has not: diffusers only warns.
    tensors = load_file(first / "pytorch_lora_weights.safetensors")
    for key in [key for key in tensors if key.startswith("unet.")][:2]:
        tensors[key.replace("unet.", "unet.nowhere.", 1)] = tensors[key].clone()
    save_file(tensors, folder / "misplaced.safetensors")
    return folder


def model_of(name: str, task: str, spec: dict[str, Any], **options: Any) -> ModelConfig:
    return ModelConfig(
        id=name,
        runtime="diffusers",
        task=task,
        source=f"starter:{name}",
        options={
            "dtype": "float32",
            "width": 64,
            "height": 64,
            "fps": 8,
            "num_frames": spec.get("frames", 1),
            "scheduler": spec.get("scheduler", {}),
            "default": {"steps": spec["steps"], "guidance": spec["guidance"]},
            **options,
        },
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runtime(cache_dir: Path, vllm_runtime: VllmRuntime) -> DiffusersRuntime:
    """The runtime, started after vLLM's as in a server that has both."""
    made = DiffusersRuntime(RuntimeContext(CpuDevice(), cache_dir))
    thaw_heap()
    made.start()
    share_torch_state()
    freeze_heap()
    assert vllm_runtime.metrics is not None
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(
    runtime: DiffusersRuntime,
    loras: Path,
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Engine]:
    """An engine with every family, and some variations of the small ones."""
    images = IMAGE_FAMILIES
    sd15 = images["tiny-sd15"]
    second = f"starter:{ADAPTERS[1]}"
    adapters = {"loras": loras, "lora_sources": {ADAPTERS[1]: second}}
    models = [
        *(
            model_of(name, "image", spec, **(adapters if name == "tiny-sd15" else {}))
            for name, spec in images.items()
        ),
        *(model_of(name, "video", spec) for name, spec in VIDEO_FAMILIES.items()),
        model_of("tiny-sd15", "image", sd15, controlnet="starter:tiny-controlnet-sd15").model_copy(
            update={"id": "controlled"}
        ),
        model_of(
            "tiny-sd15",
            "image",
            sd15,
            ip_adapter={"source": "starter:tiny-ip-adapter-sd15", "scale": 0.8},
            low={"steps": 1, "guidance": 1.0},
            high={"steps": 5, "guidance": 2.0},
        ).model_copy(update={"id": "adapted"}),
    ]
    config = EngineConfig(
        device="cpu",
        memory="256MiB",
        cache_dir=cache_dir,
        state_dir=tmp_path_factory.mktemp("state"),
        models=tuple(models),
    )
    engine = Engine(config, device=CpuDevice(), runtimes={"diffusers": Shared})
    await engine.start()
    yield engine
    await engine.stop()


class Shared(DiffusersRuntime):
    """The session's runtime: the libraries are imported already and stay after the engine."""

    def start(self) -> None:
        pass


async def events(engine: Engine, request: ImageRequest | VideoRequest) -> list[Event]:
    session = await engine.open(request)
    return [event async for event in session.events()]


async def picture(engine: Engine, model: str, **fields: Any) -> NDArray[np.uint8]:
    found = (await events(engine, image_request(model, **fields)))[-1]
    assert isinstance(found, ImageResult)
    return np.asarray(found.images[0])


async def park(engine: Engine, name: str) -> None:
    await engine.park(name)
    status = engine.model_status(name)
    assert (status.state, status.tier, status.device_bytes) == ("parked", "host", 0)


def image_request(model: str, **fields: Any) -> ImageRequest:
    defaults = {
        "model": model,
        "operation": ImageOperation.GENERATION,
        "request_id": "test",
        "prompt": "a red train",
        "seed": SEED,
    }
    return ImageRequest(**{**defaults, **fields})


def video_request(model: str, **fields: Any) -> VideoRequest:
    defaults = {"model": model, "request_id": "test", "prompt": "a red train", "seed": SEED}
    return VideoRequest(**{**defaults, **fields})


def bare(name: str, cache_dir: Path, spec: dict[str, Any]) -> Any:
    """The library alone, as its documentation says to use it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        ensure_starter(name, cache_dir), dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    if settings := dict(spec.get("scheduler", {})):
        kind = getattr(diffusers, settings.pop("class"))
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    return pipe


def seeded(seed: int = SEED) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def scene(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture with edges and gradients, so that scaling it wrongly shows."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, 255 * ((x + y) % 64 > 32)], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
async def test_an_image_equals_that_of_the_library_alone(
    engine: Engine, cache_dir: Path, name: str
) -> None:
    spec = IMAGE_FAMILIES[name]
    with GATE.exclusive():
        pipe = bare(name, cache_dir, spec)
    expected = np.asarray(
        pipe(
            prompt="a red train",
            width=64,
            height=64,
            num_inference_steps=spec["steps"],
            guidance_scale=spec["guidance"],
            generator=seeded(),
        ).images[0]
    )
    assert expected.std() > 5
    first = await picture(engine, name)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(await picture(engine, name), expected)
    await engine.unload(name)
    np.testing.assert_array_equal(await picture(engine, name), expected)
    await park(engine, name)
    np.testing.assert_array_equal(await picture(engine, name), expected)
    assert (await picture(engine, name, seed=SEED + 1) != expected).any()


def single_tokens(tokenizer: Any) -> list[str]:
    """Words of one token each."""
    words = [
        token.removesuffix("</w>")
        for token in tokenizer.get_vocab()
        if token.endswith("</w>") and token.removesuffix("</w>").isalpha()
    ]
    return [word for word in words if len(tokenizer(word).input_ids) == 3]


CLIP_FAMILIES = {
    name: {**IMAGE_FAMILIES, **VIDEO_FAMILIES}[name]
    for name in ("tiny-sd15", "tiny-sdxl", "tiny-sdxl-turbo", "tiny-animatediff-sdxl")
}


@pytest.mark.parametrize(
    ("name", "negative_count"),
    [
        (name, count)
        for name, spec in CLIP_FAMILIES.items()
        for count in ((0, 30, 200) if spec["guidance"] > 1 else (0,))
    ],
)
async def test_a_prompt_beyond_clips_positions_is_encoded_in_chunks(
    engine: Engine, cache_dir: Path, name: str, negative_count: int
) -> None:
    """Each chunk as the library encodes it alone, one after the other, padded with empty ones."""
    spec = CLIP_FAMILIES[name]
    guided = spec["guidance"] > 1
    with GATE.exclusive():
        pipe = bare(name, cache_dir, spec)
    words = single_tokens(pipe.tokenizer)
    choose = np.random.default_rng(2)
    prompt = [str(word) for word in choose.choice(words, 160)]
    negative = [str(word) for word in choose.choice(words, negative_count)]

    def pieces(words: list[str]) -> list[str]:
        return [" ".join(words[at : at + 75]) for at in (0, 75, 150)]

    each = "num_videos_per_prompt" if "frames" in spec else "num_images_per_prompt"
    encoded = [
        pipe.encode_prompt(
            first,
            device="cpu",
            do_classifier_free_guidance=guided,
            **{each: 1},
            negative_prompt=second if negative else None,
        )
        for first, second in zip(pieces(prompt), pieces(negative), strict=True)
    ]
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    arguments: dict[str, Any] = {}
    for key, parts in zip(names, zip(*encoded, strict=True), strict=False):
        if parts[0] is not None:
            arguments[key] = parts[0] if "pooled" in key else torch.cat(parts, dim=1)
    arguments |= {"width": 64, "height": 64, "num_inference_steps": spec["steps"]}
    arguments |= {"guidance_scale": spec["guidance"], "generator": seeded()}
    fields: dict[str, Any] = {"negative_prompt": " ".join(negative) or None}
    if "frames" in spec:
        made = pipe(**arguments, num_frames=spec["frames"], output_type="pil").frames[0]
        expected = np.stack([np.asarray(frame) for frame in made])

        async def ask(text: str) -> tuple[Any, NDArray[np.uint8]]:
            session = await engine.open(video_request(name, prompt=text, **fields))
            result = [event async for event in session.events()][-1]
            assert isinstance(result, VideoResult)
            return session, result.frames
    else:
        expected = np.asarray(pipe(**arguments).images[0])

        async def ask(text: str) -> tuple[Any, NDArray[np.uint8]]:
            session = await engine.open(image_request(name, prompt=text, **fields))
            result = [event async for event in session.events()][-1]
            assert isinstance(result, ImageResult)
            return session, np.asarray(result.images[0])

    session, found = await ask(" ".join(prompt))
    np.testing.assert_array_equal(found, expected)
    assert session.notes.cuts == []
    _, other = await ask(" ".join([*prompt[:-1], next(w for w in words if w != prompt[-1])]))
    assert (other != expected).any(), "the last word has no effect"


async def test_a_long_prompt_has_a_working_memory_of_its_own(engine: Engine) -> None:
    plain, longer = (
        engine.prepare(image_request("tiny-sd15", prompt="word " * count)) for count in (10, 500)
    )
    assert longer.shape == f"{plain.shape}-text4"
    assert longer.working_bytes > plain.working_bytes


SEQUENCES = {
    "tiny-flux-schnell": 512,
    "tiny-flux2-klein": 512,
    "tiny-z-image": 512,
    "tiny-wan": 512,
    "tiny-ltx": 128,
    "tiny-cogvideox": 226,
    "tiny-hunyuanvideo": 256,
}
"""The longest sequence of each pipeline."""

CHAT_MARKS = 6
"""Tokens before the text of a turn: the mark of its beginning, and the letters of the role."""


@pytest.mark.parametrize("name", SEQUENCES)
async def test_what_a_longest_sequence_cuts_is_said(engine: Engine, name: str) -> None:
    """The text beyond it has no effect."""
    limit = SEQUENCES[name]
    make = image_request if name in IMAGE_FAMILIES else video_request

    async def ask(count: int, end: str) -> tuple[Any, bytes]:
        text = f"{'a ' * (count - len(end) // 2)}{end}"
        session = await engine.open(make(name, prompt=text))
        last = [event async for event in session.events()][-1]
        if isinstance(last, ImageResult):
            return session.notes.cuts, last.images[0].tobytes()
        assert isinstance(last, VideoResult)
        return session.notes.cuts, last.frames.tobytes()

    cuts, _ = await ask(20, "b ")
    assert cuts == []
    cuts, far = await ask(4 * limit, "b ")
    [cut] = cuts
    assert cut.param == "prompt" and cut.given > limit - 10
    marks = CHAT_MARKS if name in ("tiny-flux2-klein", "tiny-z-image") else 2
    assert limit - marks <= cut.kept < limit
    # The last token that is kept acts.
    _, least = await ask(cut.kept, "b ")
    _, most = await ask(cut.kept, "c ")
    assert least != most
    again, other = await ask(4 * limit, "c ")
    assert again == cuts and other == far


UNGUIDED: list[tuple[str, dict[str, Any], str | None]] = [
    ("tiny-sdxl-turbo", {"negative_prompt": "blurry"}, "negative_prompt"),
    ("tiny-sdxl-turbo", {"negative_prompt": "blurry", "guidance": 5.0}, None),
    ("tiny-sdxl", {"negative_prompt": "blurry", "guidance": 1.0}, "negative_prompt"),
    ("tiny-sdxl", {"negative_prompt": "blurry"}, None),
    ("tiny-sd15", {"negative_prompt": ""}, None),
    ("tiny-flux-dev", {"negative_prompt": "blurry"}, "negative_prompt"),
    ("tiny-flux-dev", {"guidance": 2.0}, None),
    ("tiny-flux-schnell", {"negative_prompt": "blurry"}, "negative_prompt"),
    ("tiny-flux-schnell", {"guidance": 5.0}, "guidance"),
    ("tiny-flux-schnell", {"guidance": 0.0}, None),
    ("tiny-flux2-klein", {"negative_prompt": "blurry"}, "negative_prompt"),
    ("tiny-flux2-klein", {"guidance": 4.0}, "guidance"),
    ("tiny-z-image", {"negative_prompt": "blurry"}, "negative_prompt"),
    ("tiny-z-image", {"negative_prompt": "blurry", "guidance": 0.5}, None),
    ("tiny-z-image", {"guidance": 0.5}, None),
    ("tiny-sdxl", {"strength": 0.5}, "strength"),
    ("controlled", {"strength": 0.5, "control_image": Image.new("RGB", (64, 64))}, "strength"),
    ("tiny-svd", {"negative_prompt": "blurry", "image": Image.new("RGB", (64, 64))},
     "negative_prompt"),
    ("tiny-hunyuanvideo", {"negative_prompt": "blurry"}, "negative_prompt"),
    ("tiny-wan", {"negative_prompt": "blurry"}, None),
    ("tiny-wan", {"negative_prompt": "blurry", "guidance": 1.0}, "negative_prompt"),
    ("tiny-wan", {"motion": 3}, "motion"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "param"), UNGUIDED)
async def test_a_field_without_effect_is_refused_before_a_load(
    engine: Engine, cache_dir: Path, name: str, fields: dict[str, Any], param: str | None
) -> None:
    """What is not refused changes the picture."""
    ensure_starter(engine.config.find(name).source.removeprefix("starter:"), cache_dir)
    make = video_request if name in VIDEO_FAMILIES else image_request
    if param is not None:
        with pytest.raises(InvalidRequest) as raised:
            engine.prepare(make(name, **fields))
        assert raised.value.param == param
        return

    async def shown(**fields: Any) -> bytes:
        last = (await events(engine, make(name, **fields)))[-1]
        if isinstance(last, VideoResult):
            return last.frames.tobytes()
        assert isinstance(last, ImageResult)
        return last.images[0].tobytes()

    same = not any(fields.values())  # "" and 0 are what it does anyway
    plain = {key: value for key, value in fields.items() if key != "negative_prompt"}
    assert (
        await shown(**fields) == await shown(**(plain if len(plain) < len(fields) else {}))
    ) == same


async def test_one_part_leaves_and_comes_back_while_the_others_stay(
    runtime: DiffusersRuntime, cache_dir: Path
) -> None:
    """A text encoder can make room alone; the model does not run without it."""
    host = HostMemory(64 * 1024**2, pinned=False)
    runtime.context = replace(runtime.context, host=host)
    model = model_of("tiny-flux-schnell", "image", IMAGE_FAMILIES["tiny-flux-schnell"])
    loaded = await runtime.load(model, lambda _: None)
    assert isinstance(loaded, DiffusersModel)
    prepared = runtime.prepare(model, image_request(model.id))

    async def image() -> NDArray[np.uint8]:
        found = [event async for event in loaded.run(prepared)]
        assert isinstance(found[-1], ImageResult)
        return np.asarray(found[-1].images[0])

    try:
        expected = await image()
        pipeline = loaded.model
        assert pipeline is not None
        before = {
            name: sum(t.nbytes for t in m.parameters()) for name, m in pipeline.modules().items()
        }
        await runtime.park(loaded, {"text_encoder_2"})
        after = {
            name: sum(t.nbytes for t in m.parameters()) for name, m in pipeline.modules().items()
        }
        assert after == {**before, "text_encoder_2": 0}
        with pytest.raises(RuntimeFailed):
            await image()
        await runtime.wake(loaded, {"text_encoder_2"})
        np.testing.assert_array_equal(await image(), expected)
    finally:
        await runtime.unload(loaded)
        runtime.context = replace(runtime.context, host=None)
    assert host.used_bytes == 0


async def test_a_model_parked_with_its_loras_attached_comes_back_whole(engine: Engine) -> None:
    lora = (LoraChoice(ADAPTERS[0], 0.9),)
    plain = await picture(engine, "tiny-sd15")
    adapted = await picture(engine, "tiny-sd15", loras=lora)
    await park(engine, "tiny-sd15")
    np.testing.assert_array_equal(await picture(engine, "tiny-sd15", loras=lora), adapted)
    await park(engine, "tiny-sd15")
    np.testing.assert_array_equal(await picture(engine, "tiny-sd15"), plain)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
async def test_a_video_equals_that_of_the_library_alone(
    engine: Engine, cache_dir: Path, name: str
) -> None:
    spec = VIDEO_FAMILIES[name]
    with GATE.exclusive():
        pipe = bare(name, cache_dir, spec)
    arguments: dict[str, Any] = {
        "width": 64,
        "height": 64,
        "num_frames": spec["frames"],
        "num_inference_steps": spec["steps"],
        "generator": seeded(),
        "output_type": "pil",
    }
    fields: dict[str, Any] = {}
    if name == "tiny-svd":
        fields = {"image": scene(), "motion": 60}
        arguments |= {"image": scene(), "motion_bucket_id": 60, "fps": 8}
        arguments["max_guidance_scale"] = spec["guidance"]
    else:
        arguments |= {"prompt": "a red train", "guidance_scale": spec["guidance"]}
    if name == "tiny-ltx":
        arguments["frame_rate"] = 8
    expected = np.stack([np.asarray(frame) for frame in pipe(**arguments).frames[0]])

    async def frames() -> NDArray[np.uint8]:
        found = (await events(engine, video_request(name, **fields)))[-1]
        assert isinstance(found, VideoResult)
        assert found.fps == 8
        return found.frames

    np.testing.assert_array_equal(await frames(), expected)
    await engine.unload(name)
    np.testing.assert_array_equal(await frames(), expected)
    await park(engine, name)
    np.testing.assert_array_equal(await frames(), expected)


async def test_images_stay_equal_beside_a_language_model(
    engine: Engine, vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    """Neither changes the other's answers, also while the other is loaded and unloaded."""
    alone = {name: await picture(engine, name) for name in ("tiny-sd15", "tiny-flux-schnell")}
    model = make_model("beside")
    request = completion("beside", "hello", max_tokens=64)
    enough = threading.Event()

    async def told(loaded: Any, request: TextRequest) -> str:
        frames = loaded.run(vllm_runtime.prepare(model, request))
        return "".join([text_of(frame) async for frame in frames])

    loaded = await vllm_runtime.load(model, pytest.fail)
    expected = await told(loaded, request)

    async def chatter() -> list[str]:
        texts = []
        while not enough.is_set():
            texts.append(await told(loaded, request))
        return texts

    chattering = [asyncio.create_task(chatter()) for _ in range(2)]
    for name, image in alone.items():
        np.testing.assert_array_equal(await picture(engine, name), image)
        await engine.unload(name)
        np.testing.assert_array_equal(await picture(engine, name), image)
    enough.set()
    texts = [text for task in chattering for text in await task]
    assert texts and set(texts) == {expected}
    # And the other way round: images while the language model goes and comes.
    pictures = asyncio.gather(*(picture(engine, "tiny-flux-schnell", n=2) for _ in range(3)))
    await vllm_runtime.unload(loaded)
    await vllm_runtime.unload(await vllm_runtime.load(model, pytest.fail))
    for image in await pictures:
        np.testing.assert_array_equal(image, alone["tiny-flux-schnell"])


async def test_several_images_are_those_of_their_seeds(engine: Engine) -> None:
    found = (await events(engine, image_request("tiny-sd15", n=3)))[-1]
    assert isinstance(found, ImageResult) and len(found.images) == 3
    for index, image in enumerate(found.images):
        alone = await picture(engine, "tiny-sd15", seed=SEED + index)
        np.testing.assert_array_equal(np.asarray(image), alone)


PREVIEWED = ["tiny-sd15", "tiny-sdxl", "tiny-flux-dev", "tiny-flux2-klein", "tiny-z-image"]


@pytest.mark.parametrize("name", PREVIEWED)
async def test_partial_images_are_the_latents_of_their_steps(
    engine: Engine, cache_dir: Path, name: str
) -> None:
    run = await events(engine, image_request(name, steps=4, partial_images=3))
    previews = [event for event in run if isinstance(event, PartialImage)]
    result = run[-1]
    assert isinstance(result, ImageResult)
    assert [preview.index for preview in previews] == [0, 1, 2]
    final = np.asarray(result.images[0]).astype(float)
    distances = [np.abs(np.asarray(each.image).astype(float) - final).mean() for each in previews]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0
    np.testing.assert_array_equal(final, await picture(engine, name, steps=4))
    # One of them against the library's own decoding of the same latents.
    with GATE.exclusive():
        pipe = bare(name, cache_dir, IMAGE_FAMILIES[name])
    kept: list[torch.Tensor] = []

    def keep(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            kept.append(tensors["latents"].clone())
        return {}

    profile = IMAGE_FAMILIES[name]
    common = {"width": 64, "height": 64, "guidance_scale": profile["guidance"]}
    pipe(
        prompt="a red train",
        num_inference_steps=4,
        generator=seeded(),
        callback_on_step_end=keep,
        output_type="latent",
        **common,
    )
    pipe.scheduler = Still.from_config(pipe.scheduler.config)
    latents = kept[0]
    if name == "tiny-flux2-klein":  # it takes them as an image, and gives them as a sequence
        latents = latents.unflatten(1, (4, 4)).movedim(-1, 1)
    decoded = pipe(prompt="a red train", num_inference_steps=1, latents=latents, **common).images[0]
    np.testing.assert_array_equal(np.asarray(previews[1].image), np.asarray(decoded))


class Still(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """A scheduler whose step changes nothing: the pipeline decodes the latents it was given."""

    init_noise_sigma = 1.0
    order = 1

    def scale_model_input(self, sample: Any, *_: Any) -> Any:
        return sample

    def set_timesteps(self, *_: Any, sigmas: Any = None, **__: Any) -> None:
        self.timesteps = torch.tensor([1.0])
        self.sigmas = torch.tensor([1.0, 0.0])

    def step(self, _output: Any, _time: Any, sample: Any, **_: Any) -> tuple[Any]:
        return (sample,)


async def test_progress_rises_to_one(engine: Engine) -> None:
    run = await events(engine, image_request("tiny-sd15", n=2))
    done = [event.done for event in run if isinstance(event, Progress)]
    assert done[0] == 0 and done[-1] == 1 and done == sorted(done) and len(done) >= 7


async def test_edits_and_variations(engine: Engine, cache_dir: Path) -> None:
    """Image to image and inpainting equal the library's own; an image of another size is scaled."""
    name = "tiny-sd15"
    with GATE.exclusive():
        pipe = bare(name, cache_dir, IMAGE_FAMILIES[name])
        to_image = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        inpaint = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    common = {"prompt": "a red train", "num_inference_steps": 4, "guidance_scale": 7.5}
    expected = to_image(image=scene(), strength=0.5, generator=seeded(), **common).images[0]
    edit = {"operation": ImageOperation.EDIT, "steps": 4, "strength": 0.5}
    found = await picture(engine, name, images=(scene(),), **edit)
    np.testing.assert_array_equal(found, np.asarray(expected))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    expected = inpaint(
        image=scene(), mask_image=mask, strength=0.5, width=64, height=64, generator=seeded(),
        **common,
    ).images[0]  # fmt: skip
    found = await picture(engine, name, images=(scene(),), mask=mask, **edit)
    np.testing.assert_array_equal(found, np.asarray(expected))
    variation = {"operation": ImageOperation.VARIATION, "prompt": ""}
    found = await picture(engine, name, images=(scene((100, 75)),), **variation)
    assert found.shape == (72, 96, 3)
    found = await picture(engine, name, images=(scene((100, 75)),), width=64, height=64, **edit)
    assert found.shape == (64, 64, 3)


async def test_flux2_klein_looks_at_several_images_and_paints_within_a_mask(
    engine: Engine, cache_dir: Path
) -> None:
    name = "tiny-flux2-klein"
    with GATE.exclusive():
        pipe = bare(name, cache_dir, IMAGE_FAMILIES[name])
        inpaint = diffusers.Flux2KleinInpaintPipeline(**pipe.components, is_distilled=True)
    size = {"width": 64, "height": 64}
    common = {"prompt": "a red train", "guidance_scale": 1.0, **size}
    black = Image.new("RGB", (64, 64))
    edit: dict[str, Any] = {"operation": ImageOperation.EDIT}
    for images in ((scene(),), (scene(), black)):
        expected = pipe(
            image=list(images), num_inference_steps=2, generator=seeded(), **common
        ).images[0]
        found = await picture(engine, name, images=images, **edit)
        np.testing.assert_array_equal(found, np.asarray(expected))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    expected = inpaint(
        image=scene(), mask_image=mask, strength=0.5, num_inference_steps=4, generator=seeded(),
        **common,
    ).images[0]  # fmt: skip
    found = await picture(engine, name, images=(scene(),), mask=mask, strength=0.5, steps=4, **edit)
    np.testing.assert_array_equal(found, np.asarray(expected))
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(image_request(name, images=(scene(),), strength=0.5, **edit))
    assert raised.value.param == "strength"


async def test_control_image_and_reference_image_act(engine: Engine) -> None:
    plain = await picture(engine, "tiny-sd15")
    # Without their images the adapted models are the plain one.
    np.testing.assert_array_equal(await picture(engine, "controlled"), plain)
    np.testing.assert_array_equal(await picture(engine, "adapted"), plain)
    controlled = await picture(engine, "controlled", control_image=scene())
    other = await picture(engine, "controlled", control_image=Image.new("RGB", (64, 64)))
    assert (controlled != plain).any() and (controlled != other).any()
    adapted = await picture(engine, "adapted", reference_image=scene())
    assert (adapted != plain).any()
    np.testing.assert_array_equal(await picture(engine, "adapted"), plain)


async def test_quality_chooses_the_profile(engine: Engine) -> None:
    for quality, steps in ((Quality.LOW, 1), (Quality.MEDIUM, 3), (Quality.HIGH, 5)):
        request = image_request("adapted", quality=quality)
        prepared = engine.prepare(request).request
        assert isinstance(prepared, ImageRequest) and prepared.steps == steps


def with_loras(name: str, cache_dir: Path, choices: dict[str, float]) -> NDArray[np.uint8]:
    """A fresh pipeline with these adapters and no other."""
    spec = IMAGE_FAMILIES[name]
    with GATE.exclusive():
        pipe = bare(name, cache_dir, spec)
        for adapter in choices:
            pipe.load_lora_weights(
                str(ensure_starter(adapter, cache_dir)),
                weight_name="pytorch_lora_weights.safetensors",
                adapter_name=adapter,
            )
        if choices:
            pipe.set_adapters(list(choices), list(choices.values()))
    image = pipe(
        "a red train",
        width=64,
        height=64,
        num_inference_steps=spec["steps"],
        guidance_scale=spec["guidance"],
        generator=seeded(),
    ).images[0]
    return np.asarray(image)


async def test_loras_alternate_and_leave_no_trace(engine: Engine, cache_dir: Path) -> None:
    first, second = ADAPTERS[:2]
    choices = [{first: 1.0}, {second: 0.7}, {first: 0.4, second: 1.0}, {}]
    expected = [with_loras("tiny-sd15", cache_dir, choice) for choice in choices]
    for one in range(len(expected)):
        for other in range(one):
            assert (expected[one] != expected[other]).any()

    async def with_choice(choice: dict[str, float]) -> NDArray[np.uint8]:
        adapters = tuple(LoraChoice(name, weight) for name, weight in choice.items())
        return await picture(engine, "tiny-sd15", loras=adapters)

    for turn in range(20):
        index = turn % 2
        np.testing.assert_array_equal(await with_choice(choices[index]), expected[index])
    for choice, image in zip(choices, expected, strict=True):
        np.testing.assert_array_equal(await with_choice(choice), image)
    together = await asyncio.gather(*(with_choice(choice) for choice in choices))
    for found, image in zip(together, expected, strict=True):
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("name", [ADAPTERS[2], "broken", "misplaced"])
async def test_a_lora_that_does_not_fit_is_told_and_leaves_no_trace(
    engine: Engine, name: str
) -> None:
    plain = await picture(engine, "tiny-sd15")
    fits = LoraChoice(ADAPTERS[0])
    for loras in ((LoraChoice(name),), (fits, LoraChoice(name))):
        with pytest.raises(InvalidRequest) as raised:
            await picture(engine, "tiny-sd15", loras=loras)
        assert raised.value.param == f"loras[{len(loras) - 1}].name"
        np.testing.assert_array_equal(await picture(engine, "tiny-sd15"), plain)


BAD_IMAGES: list[tuple[dict[str, Any], str]] = [
    ({"width": 100}, "size"),
    ({"width": 0}, "size"),
    ({"width": 4096, "height": 4096}, "size"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"steps": 0}, "steps"),
    ({"steps": 10**6}, "steps"),
    ({"guidance": -1.0}, "guidance"),
    ({"guidance": float("nan")}, "guidance"),
    ({"seed": -1}, "seed"),
    ({"loras": (LoraChoice("nothing"),)}, "loras[0].name"),
    ({"loras": (LoraChoice("../x"),)}, "loras[0].name"),
    ({"loras": (LoraChoice(ADAPTERS[0], float("nan")),)}, "loras[0].weight"),
    ({"loras": (LoraChoice(ADAPTERS[0]),) * 2}, "loras"),
    ({"operation": ImageOperation.EDIT}, "image"),
    ({"operation": ImageOperation.EDIT, "images": (scene(), scene())}, "image"),
    ({"images": (scene(),), "mask": Image.new("L", (32, 64))}, "mask"),
    ({"mask": Image.new("L", (64, 64))}, "mask"),
    ({"images": (scene(),), "strength": 0.0}, "strength"),
    ({"images": (scene(),), "strength": 0.1, "steps": 5}, "steps"),
    ({"control_image": scene()}, "control_image"),
    ({"reference_image": scene()}, "reference_image"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_IMAGES)
async def test_what_an_image_model_cannot_do_is_told_before_anything_is_loaded(
    engine: Engine, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(image_request("tiny-sd15", **fields))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("pipeline", "fields", "param"),
    [
        ("HunyuanVideo15Pipeline", {"guidance": 7.0}, "guidance"),
        ("WanPipeline", {"motion": 100}, "motion"),
    ],
)
async def test_a_field_without_an_argument_is_refused_where_the_pipeline_is_known(
    runtime: DiffusersRuntime, pipeline: str, fields: dict[str, Any], param: str
) -> None:
    model = ModelConfig(
        id="m",
        runtime="diffusers",
        task="video",
        source="me/is-not-here",
        options={"pipeline": pipeline},
    )
    with pytest.raises(InvalidRequest, match="no setting") as raised:
        runtime.prepare(model, video_request("m", **fields))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("tiny-ltx", {"width": 72}, "size"),
        ("tiny-svd", {"width": 72, "image": scene()}, "size"),
        ("tiny-wan", {"num_frames": 0}, "num_frames"),
        ("tiny-wan", {"seconds": 1e9}, "seconds"),
        ("tiny-wan", {"fps": 0}, "fps"),
        ("tiny-svd", {"motion": 300, "image": scene()}, "motion"),
        ("tiny-ltx", {"motion": 180}, "motion"),
        ("tiny-svd", {}, "input_reference"),
        ("tiny-cogvideox", {"image": scene()}, "input_reference"),
        ("tiny-animatediff", {"image": scene()}, "input_reference"),
    ],
)
async def test_what_a_video_model_cannot_do_is_told_before_anything_is_loaded(
    engine: Engine, cache_dir: Path, name: str, fields: dict[str, Any], param: str
) -> None:
    ensure_starter(name, cache_dir)  # what its files say is known once they are here
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(video_request(name, **fields))
    assert raised.value.param == param


async def test_nothing_is_refused_that_files_still_to_come_may_allow(tmp_path: Path) -> None:
    runtime = DiffusersRuntime(RuntimeContext(CpuDevice(), tmp_path))
    model = ModelConfig(id="m", runtime="diffusers", task="video", source="me/is-not-here")
    for guidance in (0.0, 7.0):
        runtime.prepare(
            model, video_request("m", motion=100, negative_prompt="rain", guidance=guidance)
        )


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("tiny-ltx", {"width": 72}, "size"),
        ("tiny-svd", {}, "input_reference"),
        ("tiny-wan", {"motion": 10}, "motion"),
        ("tiny-wan", {"image": scene()}, "input_reference"),
        ("tiny-svd", {"image": scene(), "negative_prompt": "blur"}, "negative_prompt"),
    ],
)
async def test_what_only_the_loaded_pipeline_knows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, fields: dict[str, Any], param: str
) -> None:
    monkeypatch.setattr("engine.model_folder.present_folder", lambda *_, **__: None)
    with pytest.raises(InvalidRequest) as raised:
        await events(engine, video_request(name, **fields))
    assert raised.value.param == param


async def test_a_size_between_those_of_the_code_is_cut_out_of_a_larger_one(engine: Engine) -> None:
    """LTX makes multiples of 32, and OpenAI's sizes have sides of 720."""
    cut, made = [
        (await events(engine, video_request("tiny-ltx", width=width, height=64)))[-1]
        for width in (80, 96)
    ]
    assert isinstance(cut, VideoResult) and isinstance(made, VideoResult)
    assert cut.frames.shape[1:] == (64, 80, 3)
    np.testing.assert_array_equal(cut.frames, made.frames[:, :, 8:88])


async def test_wan_22_makes_multiples_of_32_and_may_start_from_an_image(
    engine: Engine, cache_dir: Path
) -> None:
    """Its files say so: Wan 2.1 of the same class makes multiples of 16, from text alone."""
    name = "tiny-wan-ti2v"
    cut, made = [
        (await events(engine, video_request(name, width=width, height=64)))[-1]
        for width in (80, 96)
    ]
    assert isinstance(cut, VideoResult) and isinstance(made, VideoResult)
    np.testing.assert_array_equal(cut.frames, made.frames[:, :, 8:88])
    with GATE.exclusive():
        pipe = bare(name, cache_dir, VIDEO_FAMILIES[name])
        moving = diffusers.WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    moving._get_t5_prompt_embeds = pipe._get_t5_prompt_embeds
    expected = moving(
        image=scene(), prompt="a red train", width=64, height=64, num_frames=5,
        num_inference_steps=2, guidance_scale=5.0, generator=seeded(), output_type="pil",
    ).frames[0]  # fmt: skip
    still = (await events(engine, video_request(name, image=scene())))[-1]
    assert isinstance(still, VideoResult)
    np.testing.assert_array_equal(still.frames, np.stack([np.asarray(each) for each in expected]))
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(video_request(name, width=72))
    assert raised.value.param == "size"


WELL_KNOWN = {
    "dall-e-2": ("256x256", "512x512", "1024x1024"),
    "dall-e-3": ("1024x1024", "1792x1024", "1024x1792"),
    "gpt-image-1": ("1024x1024", "1536x1024", "1024x1536"),
    "sora-2": ("720x1280", "1280x720", "1024x1792", "1792x1024"),
    "sora-2-pro": ("720x1280", "1280x720", "1024x1792", "1792x1024"),
}
"""OpenAI's sizes by the names of its models."""


@pytest.mark.parametrize("name", WELL_KNOWN)
async def test_the_starters_take_the_sizes_of_the_names_that_they_stand_for(
    runtime: DiffusersRuntime, cache_dir: Path, name: str
) -> None:
    model = read(STARTER_CONFIG).find(name)
    ensure_starter(model.source.removeprefix("starter:"), cache_dir)
    for size in WELL_KNOWN[name]:
        width, height = map(int, size.split("x"))
        if model.task == "image":
            runtime.prepare(model, image_request(name, width=width, height=height))
        else:
            for seconds in (4, 8, 12):
                asked = video_request(name, width=width, height=height, seconds=seconds)
                runtime.prepare(model, asked)


async def test_a_model_whose_files_are_not_here_may_be_of_any_family(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked again once they are."""
    monkeypatch.setattr("engine.model_folder.present_folder", lambda *_, **__: None)
    engine.prepare(video_request("tiny-svd", motion=60, image=scene()))
    engine.prepare(video_request("tiny-wan", negative_prompt="blur", guidance=1.0))
    engine.prepare(image_request("tiny-flux-schnell", negative_prompt="blur", guidance=5.0))


async def test_an_image_moves_in_a_model_with_a_pipeline_for_it(engine: Engine) -> None:
    still = (await events(engine, video_request("tiny-ltx", image=scene())))[-1]
    moved = (await events(engine, video_request("tiny-ltx")))[-1]
    assert isinstance(still, VideoResult) and isinstance(moved, VideoResult)
    assert still.frames.shape == moved.frames.shape and (still.frames != moved.frames).any()


@pytest.mark.parametrize(
    ("name", "asked"), [("tiny-ltx", 7), ("tiny-wan", 2), ("tiny-cogvideox", 4)]
)
async def test_a_video_has_the_frames_that_were_asked_for(
    engine: Engine, name: str, asked: int
) -> None:
    found = (await events(engine, video_request(name, num_frames=asked, fps=5)))[-1]
    assert isinstance(found, VideoResult)
    assert found.frames.shape == (asked, 64, 64, 3) and found.frames.dtype == np.uint8
    assert found.fps == 5
    prepared = engine.prepare(video_request(name, seconds=0.5, fps=10)).request
    assert isinstance(prepared, VideoRequest) and prepared.num_frames == 5


async def test_a_run_stops_within_a_step_and_gives_back_what_it_took(engine: Engine) -> None:
    expected = await picture(engine, "tiny-sd15")
    session = await engine.open(image_request("tiny-sd15", steps=500))
    async with aclosing(session.events()) as run:
        while not isinstance(event := await anext(run), Progress) or not event.done:
            pass
        assert engine.model_status("tiny-sd15").leases == 1
    # The thread has ended its run before the lease ends, and far from all steps.
    pipeline = engine._residency.loaded["tiny-sd15"].model  # type: ignore[attr-defined]
    assert pipeline.running is None
    assert pipeline.base.scheduler.counter < 400
    assert engine.model_status("tiny-sd15").leases == 0
    assert not [entry for entry in engine.status().ledger.entries if entry.kind == "lease"]
    np.testing.assert_array_equal(await picture(engine, "tiny-sd15"), expected)


async def test_a_grant_is_the_measured_peak_from_the_second_run_of_a_shape_on(
    engine: Engine,
) -> None:
    request = image_request("tiny-sdxl-turbo", width=192, height=128)
    prepared = engine.prepare(request)
    await events(engine, request)
    model = engine.config.find("tiny-sdxl-turbo")
    assert engine._admission.estimates is not None
    measured = engine._admission.estimates.working_bytes(model, prepared.shape)
    assert measured is not None and measured != prepared.working_bytes
    granted = engine._admission.working_bytes(model, prepared)
    assert measured <= granted <= measured * 1.1
    loaded = engine._residency.loaded["tiny-sdxl-turbo"]
    loaded.model.measured.clear()  # type: ignore[attr-defined]
    await events(engine, request)
    again = engine._admission.estimates.working_bytes(model, prepared.shape)
    assert again is not None and abs(again - granted) <= 0.1 * granted


async def test_every_part_is_a_block(engine: Engine, cache_dir: Path) -> None:
    await picture(engine, "tiny-sdxl")
    blocks = {block.name: block.nbytes for block in engine._residency.loaded["tiny-sdxl"].blocks()}
    assert set(blocks) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    unet = ensure_starter("tiny-sdxl", cache_dir) / "unet" / "diffusion_pytorch_model.safetensors"
    assert blocks["unet"] == pytest.approx(unet.stat().st_size, rel=0.05)
    await engine.unload("tiny-sdxl")
    assert not [entry for entry in engine.status().ledger.entries if entry.owner == "tiny-sdxl"]


@pytest.mark.parametrize("harm", ["missing", "lacking", "lacking text", "truncated"])
async def test_a_damaged_folder_fails_with_the_reason(
    runtime: DiffusersRuntime, cache_dir: Path, tmp_path: Path, harm: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-sd15", cache_dir), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if harm == "missing":
        weights.unlink()
    elif harm.startswith("lacking"):
        key = "conv_in.weight"
        if harm == "lacking text":
            weights = folder / "text_encoder" / "model.safetensors"
            key = "text_model.encoder.layers.0.mlp.fc1.weight"
        tensors = load_file(weights)
        tensors.pop(key)
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        weights.write_bytes(weights.read_bytes()[:5000])
    model = ModelConfig(
        id="harmed", runtime="diffusers", task="image", source=str(folder),
        options={"dtype": "float32"},
    )  # fmt: skip
    before = threading.active_count()
    with pytest.raises(LoadFailed):
        runtime.estimate(model)
        await runtime.load(model, pytest.fail)
    assert threading.active_count() <= before + 1  # the loading thread


async def test_text_is_not_for_an_image_model(engine: Engine) -> None:
    with pytest.raises(EngineError):
        engine.prepare(completion("tiny-sd15", "hello"))
    with pytest.raises(InvalidRequest):
        engine.prepare(video_request("tiny-sd15"))
    with pytest.raises(InvalidRequest):
        engine.prepare(image_request("tiny-wan"))
