"""The libraries alone, as their documentation calls them, on the device of the checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.config import ModelConfig
from engine.model_folder import local_folder
from engine.process.gate import GATE
from engine.runtimes.diffusers.options import DiffusersOptions

SEED = 11
PROMPT = "a red train"
SENTENCE = "The locomotive waits."

Call = Callable[[], NDArray[Any]]
"""Makes the pixels or the samples once."""


def scene(width: int, height: int) -> Image.Image:
    """A picture with edges and gradients, so that scaling it wrongly shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, 255 * ((x + y) % 64 > 32)], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def library(model: ModelConfig, cache_dir: Path, device: str) -> Call:
    """A call of the library with the model's own options, on its own copy of the weights."""
    folder = local_folder(model.source, cache_dir)
    with GATE.exclusive():
        if model.runtime == "diffusers":
            return _diffusers(model, folder, cache_dir, device)
        return _kokoro(folder, device) if model.runtime == "kokoro" else _xtts(folder, device)


def _diffusers(model: ModelConfig, folder: Path, cache_dir: Path, device: str) -> Call:
    import diffusers
    import torch

    options = model.options_as(DiffusersOptions)
    kind = getattr(diffusers, options.pipeline or "DiffusionPipeline")
    dtypes = {"default": getattr(torch, options.dtype)}
    if options.vae_dtype is not None:
        dtypes["vae"] = getattr(torch, options.vae_dtype)
    parts = {
        name: diffusers.MotionAdapter.from_pretrained(
            local_folder(str(source), cache_dir), dtype=dtypes["default"]
        )
        for name, source in options.components.items()
    }
    pipe = kind.from_pretrained(folder, dtype=dtypes, **parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    if settings := dict(options.scheduler):
        scheduler = getattr(diffusers, settings.pop("class"))
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    arguments: dict[str, Any] = {
        "width": options.width,
        "height": options.height,
        "num_inference_steps": options.default.steps,
        "output_type": "pil",
        **options.call,
    }
    if isinstance(pipe, diffusers.StableVideoDiffusionPipeline):
        arguments |= {"image": scene(options.width, options.height), "fps": options.fps}
        arguments |= {"max_guidance_scale": options.default.guidance, "motion_bucket_id": 60}
    else:
        arguments |= {"prompt": PROMPT, "guidance_scale": options.default.guidance}
    if model.task == "video":
        arguments["num_frames"] = options.num_frames
        if "frame_rate" in inspect.signature(pipe.__call__).parameters:
            arguments["frame_rate"] = options.fps

    def call() -> NDArray[Any]:
        made = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(SEED))
        images = made.frames[0] if model.task == "video" else made.images[:1]
        return np.stack([np.asarray(image) for image in images])

    return call


def _kokoro(folder: Path, device: str) -> Call:
    import torch
    from kokoro import KModel

    from engine.runtimes.kokoro.phonemes import Phonemizer

    model = KModel(
        repo_id="hexgrad/Kokoro-82M",
        config=str(folder / "config.json"),
        model=str(folder / "kokoro-v1_0.pth"),
    )
    model = model.to(device).eval()
    pack = torch.load(folder / "voices" / "af_heart.pt", weights_only=True)
    phonemizer = Phonemizer()  # the library's own would download a tagger

    def call() -> NDArray[Any]:
        torch.manual_seed(SEED)
        (chunk,) = phonemizer.chunks(SENTENCE, "en-us")
        made = model(chunk.phonemes, pack[len(chunk.phonemes) - 1].to(device))
        return np.asarray(made.cpu())

    return call


def _xtts(folder: Path, device: str) -> Call:
    import torch
    from TTS.config import load_config
    from TTS.tts.models.xtts import Xtts

    config = load_config(folder / "config.json")
    model = Xtts(config)
    model.load_checkpoint(config, checkpoint_dir=folder)
    model.to(device)
    voice = model.speaker_manager.speakers["Claribel Dervla"]
    names = ("temperature", "length_penalty", "repetition_penalty", "top_k", "top_p")

    def call() -> NDArray[Any]:
        torch.manual_seed(SEED)
        pieces = model.inference_stream(
            SENTENCE,
            "en",
            voice["gpt_cond_latent"].to(device),
            voice["speaker_embedding"].to(device),
            **{name: config[name] for name in names},
        )
        return np.concatenate([np.asarray(piece.cpu()) for piece in pieces])

    return call
