"""Starter diffusion models: real folders that the real pipelines load, and that do something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from engine.errors import LoadFailed
from engine.process.gate import GATE
from engine.starters.registry import DIFFUSION_STARTERS, FORMAT, LANGUAGE_STARTERS, ensure_starter
from tests.conftest import StarterDir

pytestmark = pytest.mark.slow

Load = Callable[..., Any]
Pixels = NDArray[np.float64]

SQUARE = {"height": 128, "width": 128}
CLIP = {"height": 64, "width": 64, "num_frames": 5}
PIPELINES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tiny-sdxl-turbo": ("StableDiffusionXLPipeline", {**SQUARE, "guidance_scale": 0.0}),
    "tiny-sdxl": ("StableDiffusionXLPipeline", SQUARE),
    "tiny-sd15": ("StableDiffusionPipeline", SQUARE),
    "tiny-flux-schnell": ("FluxPipeline", {**SQUARE, "guidance_scale": 0.0}),
    "tiny-flux-dev": ("FluxPipeline", SQUARE),
    "tiny-flux2-klein": ("Flux2KleinPipeline", SQUARE),
    "tiny-z-image": ("ZImagePipeline", {**SQUARE, "guidance_scale": 0.0}),
    "tiny-svd": ("StableVideoDiffusionPipeline", CLIP),
    "tiny-animatediff": ("AnimateDiffPipeline", CLIP),
    "tiny-animatediff-sdxl": ("AnimateDiffSDXLPipeline", CLIP),
    "tiny-wan": ("WanPipeline", CLIP),
    "tiny-wan-ti2v": ("WanPipeline", CLIP),
    "tiny-ltx": ("LTXPipeline", {**CLIP, "num_frames": 9}),
    "tiny-cogvideox": ("CogVideoXPipeline", {**CLIP, "num_frames": 9}),
    "tiny-hunyuanvideo": ("HunyuanVideoPipeline", CLIP),
}
"""Class, and the smallest request it takes."""

LORAS = {
    "tiny-lora-sd15": "tiny-sd15",
    "tiny-lora-sd15-b": "tiny-sd15",
    "tiny-lora-sdxl": "tiny-sdxl",
}
CONTROLNETS = {
    "tiny-controlnet-sd15": "tiny-sd15",
    "tiny-controlnet-sdxl": "tiny-sdxl-turbo",
}


@pytest.fixture(scope="module")
def load(starter_dir: StarterDir) -> Load:
    """Loads a pipeline anew, without its progress bar."""
    import torch
    from diffusers import DiffusionPipeline

    def load(name: str, **settings: Any) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(
            starter_dir(name), torch_dtype=torch.float32, **settings
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def picture(seed: int) -> Image.Image:
    """Large coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((128, 128), Image.Resampling.NEAREST)


def pixels(output: Any) -> Pixels:
    """The images or frames of a pipeline's answer as numbers from 0 to 255."""
    frames = output.images if hasattr(output, "images") else output.frames[0]
    stack = np.stack([np.asarray(frame, dtype=np.float64) for frame in frames])
    return stack if isinstance(frames[0], Image.Image) else stack * 255  # Wan answers 0 to 1


def run(pipeline: Any, name: str, *, prompt: str = "a cat", seed: int = 0, **inputs: Any) -> Pixels:
    """Two steps of a small request."""
    import torch

    subject: dict[str, Any] = {"prompt": prompt}
    if name == "tiny-svd":  # takes a picture instead
        subject = {"image": picture(len(prompt))}
    return pixels(
        pipeline(
            **{**PIPELINES[name][1], **subject, "num_inference_steps": 2, **inputs},
            generator=torch.Generator().manual_seed(seed),
        )
    )


def difference(one: Pixels, other: Pixels) -> float:
    """Levels of 255 by which a pixel differs on average."""
    return float(np.abs(one - other).mean())


def on_meta(*modules: Any) -> list[str]:
    return [
        name
        for module in modules
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.is_meta
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_each_name_is_registered_and_can_be_written() -> None:
    from engine.starters.diffusion.writers import WRITERS

    assert WRITERS.keys() == DIFFUSION_STARTERS.keys()
    assert not LANGUAGE_STARTERS.keys() & DIFFUSION_STARTERS.keys()
    assert PIPELINES.keys() <= DIFFUSION_STARTERS.keys()


def test_another_process_writes_the_same_bytes(starter_dir: StarterDir, tmp_path: Path) -> None:
    build_all = (
        "import sys, pathlib\n"
        "from engine.starters.registry import DIFFUSION_STARTERS, ensure_starter\n"
        "for name in reversed(DIFFUSION_STARTERS): ensure_starter(name, pathlib.Path(sys.argv[1]))"
    )
    built = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build_all, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "it/s" not in built.stderr, "a progress bar on the server's terminal"
    for name in DIFFUSION_STARTERS:
        assert contents(tmp_path / "starter" / FORMAT / name) == contents(starter_dir(name)), name


@pytest.mark.parametrize("name", DIFFUSION_STARTERS)
def test_a_folder_is_small_and_its_weights_are_float32_finite_and_never_all_zero(
    name: str, starter_dir: StarterDir
) -> None:
    files = sorted(starter_dir(name).rglob("*.safetensors"))
    assert files
    assert sum(path.stat().st_size for path in files) < 6_000_000
    for path in files:
        for key, tensor in load_file(path).items():
            if key == "bn.num_batches_tracked":  # counts, as in the real one
                continue
            assert tensor.dtype == np.float32, key
            assert np.isfinite(tensor).all(), key
            assert tensor.any(), key


@pytest.mark.parametrize("name", DIFFUSION_STARTERS)
def test_the_card_says_that_the_weights_are_random(name: str, starter_dir: StarterDir) -> None:
    card = (starter_dir(name) / "README.md").read_text(encoding="utf-8")
    assert "library_name: diffusers" in card
    assert f"# {name}\n\n{DIFFUSION_STARTERS[name].summary}" in card
    assert "The weights are random numbers" in card


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_loads_whole_and_its_output_depends_on_prompt_and_seed(
    name: str, load: Load
) -> None:
    import torch

    pipeline = load(name)
    modules = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    assert type(pipeline).__name__ == PIPELINES[name][0]
    assert not on_meta(*modules)

    steps: list[int] = []

    def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    frames = run(pipeline, name, callback_on_step_end=on_step_end)
    asked = PIPELINES[name][1]
    assert steps == list(range(pipeline.num_timesteps))  # PNDM takes one more than asked
    assert len(steps) == (3 if name == "tiny-sd15" else 2)
    assert frames.shape == (asked.get("num_frames", 1), asked["height"], asked["width"], 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 20
    assert np.mean((frames <= 0) | (frames >= 255)) < 0.15
    assert np.array_equal(frames, run(pipeline, name))
    assert difference(frames, run(pipeline, name, seed=1)) > 20
    assert difference(frames, run(pipeline, name, prompt="two dogs running on the beach")) > 4
    if len(frames) > 1:
        assert difference(frames[0], frames[-1]) > 4


def test_sdxl_and_its_turbo_differ_in_weights_and_scheduler(load: Load) -> None:
    sdxl, turbo = load("tiny-sdxl"), load("tiny-sdxl-turbo")
    one, other = ({**each.unet.config, "_name_or_path": None} for each in (sdxl, turbo))
    assert one == other
    assert not sdxl.unet.conv_in.weight.equal(turbo.unet.conv_in.weight)
    assert type(sdxl.scheduler).__name__ == "EulerDiscreteScheduler"
    assert sdxl.scheduler.config.timestep_spacing == "leading"
    assert type(turbo.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert turbo.scheduler.config.timestep_spacing == "trailing"


def test_flux_dev_takes_guidance_as_an_input_and_schnell_does_not(load: Load) -> None:
    schnell, dev = load("tiny-flux-schnell"), load("tiny-flux-dev")
    assert not schnell.scheduler.config.use_dynamic_shifting
    assert dev.scheduler.config.use_dynamic_shifting

    def effect(pipeline: Any, name: str) -> float:
        one, other = (run(pipeline, name, guidance_scale=scale) for scale in (1.0, 8.0))
        return difference(one, other)

    assert effect(dev, "tiny-flux-dev") > 4
    assert effect(schnell, "tiny-flux-schnell") == 0


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sdxl", "tiny-flux-dev"])
def test_an_input_image_reaches_the_latents_at_their_scale(name: str, load: Load) -> None:
    import torch

    pipeline = load(name)
    vae = pipeline.vae
    image = pipeline.image_processor.preprocess(picture(0))
    with torch.no_grad():
        latents = vae.encode(image).latent_dist
    assert 0.2 < (latents.mean * vae.config.scaling_factor).std() < 3
    assert latents.std.max() < 0.1


def test_image_to_image_depends_on_the_image(load: Load) -> None:
    import torch
    from diffusers import AutoPipelineForImage2Image

    pipeline = AutoPipelineForImage2Image.from_pipe(load("tiny-sd15"))
    pipeline.set_progress_bar_config(disable=True)
    one, other = (
        pixels(
            pipeline(
                prompt="a cat",
                image=picture(seed),
                strength=0.5,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(0),
            )
        )
        for seed in (0, 1)
    )
    assert difference(one, other) > 10


@pytest.mark.parametrize(("lora", "name"), LORAS.items())
def test_a_lora_changes_the_image_by_its_weight_and_leaves_without_trace(
    lora: str, name: str, load: Load, starter_dir: StarterDir
) -> None:
    pipeline = load(name)
    plain = run(pipeline, name)
    pipeline.load_lora_weights(starter_dir(lora), adapter_name="style")
    parts = ["unet", "text_encoder"] if lora == "tiny-lora-sd15-b" else ["unet"]
    assert pipeline.get_list_adapters() == {part: ["style"] for part in parts}
    full = run(pipeline, name)
    pipeline.set_adapters("style", 0.5)
    half = run(pipeline, name)
    assert difference(full, plain) > 10
    assert difference(half, plain) > 5
    assert difference(half, full) > 5
    pipeline.unload_lora_weights()
    assert np.array_equal(run(pipeline, name), plain)


def test_a_lora_changes_turbo_as_well(load: Load, starter_dir: StarterDir) -> None:
    name = "tiny-sdxl-turbo"
    pipeline = load(name)
    plain = run(pipeline, name)
    pipeline.load_lora_weights(starter_dir("tiny-lora-sdxl"))
    assert difference(run(pipeline, name), plain) > 5


def test_each_part_of_the_second_lora_has_an_effect(load: Load, starter_dir: StarterDir) -> None:
    pipeline = load("tiny-sd15")
    plain = run(pipeline, "tiny-sd15")
    pipeline.load_lora_weights(starter_dir("tiny-lora-sd15-b"), adapter_name="style")
    for weights in ({"unet": 1.0, "text_encoder": 0.0}, {"unet": 0.0, "text_encoder": 1.0}):
        pipeline.set_adapters("style", weights)
        assert difference(run(pipeline, "tiny-sd15"), plain) > 5, weights


@pytest.mark.parametrize(("controlnet", "name"), CONTROLNETS.items())
def test_a_controlnet_follows_its_image(
    controlnet: str, name: str, load: Load, starter_dir: StarterDir
) -> None:
    from diffusers import AutoPipelineForText2Image, ControlNetModel

    module = ControlNetModel.from_pretrained(starter_dir(controlnet))
    assert not on_meta(module)
    plain_pipeline = load(name)
    pipeline = AutoPipelineForText2Image.from_pipe(plain_pipeline, controlnet=module)
    pipeline.set_progress_bar_config(disable=True)
    plain = run(plain_pipeline, name)
    one, other = (run(pipeline, name, image=picture(seed)) for seed in (0, 1))
    assert difference(one, plain) > 10
    assert difference(one, other) > 8
    off = run(pipeline, name, image=picture(0), controlnet_conditioning_scale=0.0)
    assert np.array_equal(off, plain)


def test_an_ip_adapter_follows_its_image(load: Load, starter_dir: StarterDir) -> None:
    pipeline = load("tiny-sd15")
    plain = run(pipeline, "tiny-sd15")
    pipeline.load_ip_adapter(
        str(starter_dir("tiny-ip-adapter-sd15")),
        subfolder="models",
        weight_name="ip-adapter_sd15.safetensors",
    )
    assert not on_meta(pipeline.unet, pipeline.image_encoder)
    one, other = (run(pipeline, "tiny-sd15", ip_adapter_image=picture(seed)) for seed in (0, 1))
    assert difference(one, plain) > 10
    assert difference(one, other) > 5
    pipeline.set_ip_adapter_scale(0.0)
    assert np.array_equal(run(pipeline, "tiny-sd15", ip_adapter_image=picture(0)), plain)


def test_clip_encoders_have_the_tensor_names_of_the_real_repositories(
    starter_dir: StarterDir,
) -> None:
    for part in ("text_encoder", "text_encoder_2"):
        tensors = load_file(starter_dir("tiny-sdxl") / part / "model.safetensors")
        assert "text_model.embeddings.token_embedding.weight" in tensors
        assert all(key.startswith(("text_model.", "text_projection.")) for key in tensors)


def test_a_clip_tokenizer_knows_words_and_spells_the_rest(load: Load) -> None:
    pipeline = load("tiny-sdxl")
    tokenizer = pipeline.tokenizer
    tokens = tokenizer.tokenize("A Photo of a cat, 猫")
    assert tokens[:6] == ["a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>", ",</w>"]
    assert all(token in tokenizer.get_vocab() for token in tokens)
    ids = tokenizer("a cat", padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids.index(max(ids)) == 3  # the encoder takes the highest id for the end
    assert pipeline.tokenizer_2("a cat", padding="max_length").input_ids[4:] == [0] * 73
    config = pipeline.text_encoder.config
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config.bos_token_id,
        config.eos_token_id,
    )
    assert len(tokenizer) == config.vocab_size


@pytest.mark.parametrize("name", ["tiny-flux-schnell", "tiny-wan", "tiny-ltx", "tiny-cogvideox"])
def test_a_t5_tokenizer_fits_its_encoder(name: str, load: Load) -> None:
    pipeline = load(name)
    tokenizer = getattr(pipeline, "tokenizer_2", None) or pipeline.tokenizer
    encoder = getattr(pipeline, "text_encoder_2", None) or pipeline.text_encoder
    ids = tokenizer("a photo of a cat, 85mm").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a photo of a cat, 85mm"
    assert ids[-1] == tokenizer.eos_token_id == encoder.config.eos_token_id == 1
    assert tokenizer.pad_token_id == encoder.config.pad_token_id == 0
    assert len(tokenizer) == encoder.config.vocab_size


def test_hunyuanvideo_loses_nothing_of_the_prompt_with_its_instruction(load: Load) -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    tokenizer = load("tiny-hunyuanvideo").tokenizer
    ids = tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format("cat")).input_ids
    kept = tokenizer.decode(ids[DEFAULT_PROMPT_TEMPLATE["crop_start"] :])
    assert kept == "\ncat<|eot_id|>"


def test_a_build_leaves_torch_as_it_found_it(starter_dir: StarterDir, tmp_path: Path) -> None:
    import torch
    from transformers.utils import logging

    expected = contents(starter_dir("tiny-flux-dev"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        random_state = torch.get_rng_state()
        bar = logging.is_progress_bar_enabled()
        folder = ensure_starter("tiny-flux-dev", tmp_path)
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.equal(torch.get_rng_state(), random_state)
        assert logging.is_progress_bar_enabled() == bar
    finally:
        torch.set_default_dtype(torch.float32)
    assert contents(folder) == expected


@pytest.mark.parametrize("name", DIFFUSION_STARTERS)
def test_modules_are_constructed_behind_the_gate(name: str, tmp_path: Path) -> None:
    from torch.nn.modules.module import register_module_module_registration_hook

    held: list[bool] = []
    hook = register_module_module_registration_hook(lambda *_: held.append(GATE.held))
    try:
        ensure_starter(name, tmp_path)
    finally:
        hook.remove()
    assert held and all(held)
    assert not GATE.held


def test_without_the_libraries_a_build_is_a_failed_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "engine.starters.diffusion.writers", None)
    with pytest.raises(LoadFailed, match=r"cannot build starter:tiny-sd15: .*diffusion\.writers"):
        ensure_starter("tiny-sd15", tmp_path)
    assert not list((tmp_path / "starter" / FORMAT).iterdir())


def test_an_image_processor_is_named_as_in_the_real_repository(starter_dir: StarterDir) -> None:
    folder = starter_dir("tiny-svd") / "feature_extractor"
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert config["image_processor_type"] == "CLIPImageProcessor"
