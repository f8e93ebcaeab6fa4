"""The models of the checks: real architectures at real size with random weights, or starters.

Speed and memory do not depend on the values of the weights. So nothing needs a hub: the names and
shapes come from the libraries' own modules and from `tests/layouts`, the numbers from one random
block that is written again and again.

Usage: python -m tests.gpu.models FOLDER CONFIG.yaml --device cuda [--small] NAME...
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.starters.registry import ensure_starter
from tests.layouts.configured import CONFIGS
from tests.layouts.layout import layouts
from tests.layouts.pipelines import pipeline_layouts
from tests.layouts.sparse import Tensor, Tensors, safetensors_header, write_hole

BLOCK = 32 * 2**20
"""Numbers of the random block."""

SPREAD = 0.02
"""Standard deviation of the weights, as transformers initialises them."""

CACHE_FOLDER = "roundhouse"
"""In the folder of the checks: what `XDG_CACHE_HOME` makes of it."""

WRITERS = 8
"""Threads that write one file: memory-backed files take as many GB/s as there are copiers."""

Build = Callable[[Path, Path], None]
"""Writes a repository into an empty folder. The second folder is the cache of the starters."""


@dataclass(frozen=True)
class CheckModel:
    """One model of the checks, at real size and small."""

    real: Mapping[str, Any]
    """Its entry in a configuration."""
    starter: str
    """What stands for it where the checks are small."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """The starter's options."""

    def entry(self, name: str, folder: Path, *, small: bool) -> dict[str, Any]:
        """Its entry for these checks. Its files are built if they are not there."""
        kept = {key: value for key, value in self.real.items() if key in ("runtime", "task")}
        if small:
            source, options = f"starter:{self.starter}", dict(self.small)
        else:
            # One set of weights is written, in the dtype of the model.
            options = {k: v for k, v in self.real.get("options", {}).items() if k != "variant"}
            if parts := options.get("components"):
                options["components"] = {
                    part: str(ensure_built(each, folder)) for part, each in parts.items()
                }
            source = str(ensure_built(self.real["source"], folder))
        return {"id": name, **kept, "source": source, "options": options}


def ensure_built(repository: str, folder: Path) -> Path:
    """The folder of a repository, written at real size if it is not there."""
    made = folder / "models" / repository.replace("/", "--")
    if not made.is_dir():
        building = made.with_name(f".{made.name}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        BUILDS[repository](building, folder / CACHE_FOLDER)
        building.rename(made)
    return made


# Language models.


def _language_model(config: Mapping[str, Any]) -> Build:
    def build(folder: Path, cache_dir: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        made = AutoConfig.for_model(**config)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
        tensors = {
            name: Tensor("BF16", tuple(each.shape)) for name, each in module.state_dict().items()
        }
        made.architectures = [type(module).__name__]
        made.dtype = torch.bfloat16
        made.save_pretrained(folder)
        write_weights(folder / "model.safetensors", tensors)
        _write_tokenizer(folder, made.vocab_size)

    return build


def _write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer with as many tokens as the model has rows; most are filling words."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"Ġx{number}" for number in range(size - len(letters) - 1)), "<|end|>"]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")


# Image and video models.


def _pipeline(repository: str, starter: str | None) -> Build:
    """A pipeline whose tokenizers, schedulers and feature extractors are those of a starter."""

    def build(folder: Path, cache_dir: Path) -> None:
        layout = pipeline_layouts()[repository]
        # A part of other models has one set of weights, and no entry that names a dtype.
        made = layout.as_loaded(layout.model(repository)) if layout.entry else layout
        sets = made.sets if layout.entry else made.sets[:1]
        for path, document in made.documents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(json.dumps(document), encoding="utf-8")
        for each in sets:
            if (index := each.index) is not None:
                (folder / index[0]).write_text(json.dumps(index[1]), encoding="utf-8")
            for path, tensors in each.parts.items():
                file = folder / path.replace(".fp16.", ".")  # no variant is asked for
                file.parent.mkdir(parents=True, exist_ok=True)
                write_weights(file, tensors)
        if starter is not None:
            for part in ensure_starter(starter, cache_dir).iterdir():
                if part.is_dir() and not list(part.glob("*.safetensors")):
                    shutil.copytree(part, folder / part.name, dirs_exist_ok=True)
        images = folder / "feature_extractor"
        if "feature_extractor" in made.documents.get("model_index.json", {}):
            from engine.starters.diffusion.parts import write_image_processor  # it imports torch

            images.mkdir(exist_ok=True)
            write_image_processor(images)

    return build


# Speech models: the writers of the starters, with the real sizes.


def _kokoro(folder: Path, cache_dir: Path) -> None:
    from engine.starters.kokoro import CONFIG, write_kokoro

    real = layouts()["hexgrad/Kokoro-82M"].documents["config.json"]
    write_kokoro(folder, {**real, "vocab": CONFIG["vocab"]})


def _xtts(folder: Path, cache_dir: Path) -> None:
    from TTS.tts.configs.xtts_config import XttsArgs

    from engine.starters.coqui import write_xtts

    # Its weights never end a sentence, so that a short bound does: some 2.6 s of audio.
    sizes = {"gpt_num_audio_tokens": 1026, "gpt_start_audio_token": 1024}
    end = {"gpt_stop_audio_token": 1025, "gpt_max_audio_tokens": 60}
    write_xtts(folder, XttsArgs(gpt_use_perceiver_resampler=True, **sizes, **end))


# Weights.


def write_weights(path: Path, tensors: Tensors) -> None:
    """A safetensors file of random numbers; the weights of norms are ones, integers are zeros."""
    head = safetensors_header(tensors)
    nbytes = sum(each.nbytes for each in tensors.values())
    write_hole(path, len(head) + nbytes, head)
    kind = next(each.dtype for each in tensors.values())
    block = memoryview(_random_block(kind)).cast("B")
    descriptor = os.open(path, os.O_RDWR)

    def fill(start: int) -> None:
        part = block[: min(len(block), nbytes - start)]
        os.pwrite(descriptor, part, len(head) + start)

    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(fill, range(0, nbytes, len(block))))
        start = len(head)
        for name, tensor in tensors.items():
            if tensor.dtype == "I64":
                os.pwrite(descriptor, bytes(tensor.nbytes), start)
            elif "norm" in name and name.endswith("weight") and len(tensor.shape) == 1:
                os.pwrite(descriptor, _one(tensor.dtype) * tensor.count, start)
            start += tensor.nbytes
    finally:
        os.close(descriptor)


def _random_block(dtype: str) -> bytes:
    numbers = np.random.default_rng(1).standard_normal(BLOCK, dtype=np.float32) * SPREAD
    if dtype == "F32":
        return numbers.astype(np.float32).tobytes()
    if dtype == "F16":
        return numbers.astype(np.float16).tobytes()
    assert dtype == "BF16"
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _one(dtype: str) -> bytes:
    if dtype == "F32":
        return struct.pack("<f", 1.0)
    return struct.pack("<e", 1.0) if dtype == "F16" else struct.pack("<H", 0x3F80)


# What there is.

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
"""Llama 3.1 8B: 8,030,261,248 weights."""

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""Qwen 2.5 7B: 7,615,616,512 weights."""

STARTERS: Mapping[str, str | None] = {
    "stabilityai/sdxl-turbo": "tiny-sdxl-turbo",
    "stabilityai/stable-diffusion-xl-base-1.0": "tiny-sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny-sd15",
    "black-forest-labs/FLUX.1-schnell": "tiny-flux-schnell",
    "stabilityai/stable-video-diffusion-img2vid-xt": "tiny-svd",
    "guoyww/animatediff-motion-adapter-v1-5-3": None,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "tiny-wan",
}
"""The pipelines that can be built, and whose small files each takes."""

BUILDS: Mapping[str, Build] = {
    "meta-llama/Llama-3.1-8B-Instruct": _language_model(LLAMA_8B),
    "Qwen/Qwen2.5-7B-Instruct": _language_model(QWEN_7B),
    "hexgrad/Kokoro-82M": _kokoro,
    "coqui/XTTS-v2": _xtts,
    **{repository: _pipeline(repository, starter) for repository, starter in STARTERS.items()},
}


def _text(source: str, *, eager: bool | None = None) -> dict[str, Any]:
    options = {
        "enforce_eager": eager,
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "kv_cache": "8GiB",
        "max_num_seqs": 256,
    }
    return {"source": source, "options": options}


def _configured(machine: str, model_id: str, **changes: Any) -> dict[str, Any]:
    """An entry of a configuration for real machines, with other options where time is short."""
    text = (CONFIGS / f"{machine}.yaml").read_text(encoding="utf-8")
    (found,) = (each for each in yaml.safe_load(text)["models"] if each["id"] == model_id)
    return {**found, "options": {**found.get("options", {}), **changes}}


SMALL_TEXT = {"dtype": "float32", "max_model_len": 512, "kv_cache": "96MiB"}
SMALL_PICTURE = {"dtype": "float32", "width": 64, "height": 64}
FEW_STEPS = {"default": {"steps": 10, "guidance": 5.0}}


def _small(steps: int, guidance: float, **more: Any) -> dict[str, Any]:
    return {**SMALL_PICTURE, **more, "default": {"steps": steps, "guidance": guidance}}


MODELS: Mapping[str, CheckModel] = {
    "llama-8b": CheckModel(_text("meta-llama/Llama-3.1-8B-Instruct"), "tiny-llama", SMALL_TEXT),
    "qwen-7b": CheckModel(_text("Qwen/Qwen2.5-7B-Instruct", eager=True), "tiny-qwen", SMALL_TEXT),
    "sdxl-turbo": CheckModel(
        _configured("gpu-80gb", "sdxl-turbo", default={"steps": 4, "guidance": 0.0}),
        "tiny-sdxl-turbo",
        _small(2, 0.0),
    ),
    "sdxl": CheckModel(
        _configured("gpu-80gb", "sdxl", default={"steps": 30, "guidance": 5.0}),
        "tiny-sdxl",
        _small(3, 5.0),
    ),
    "sd15": CheckModel(
        _configured("gpu-80gb", "stable-diffusion-1.5"), "tiny-sd15", _small(2, 7.5)
    ),
    "flux-schnell": CheckModel(
        _configured("gpu-80gb", "flux.1-schnell"), "tiny-flux-schnell", _small(2, 0.0)
    ),
    "svd-xt": CheckModel(
        _configured("gpu-80gb", "svd-xt", **FEW_STEPS), "tiny-svd", _small(2, 3.0, num_frames=5)
    ),
    "animatediff": CheckModel(
        _configured("gpu-80gb", "animatediff", **FEW_STEPS),
        "tiny-animatediff",
        _small(2, 7.5, num_frames=4),
    ),
    "wan-1.3b": CheckModel(
        _configured("gpu-24gb", "wan2.1-1.3b", num_frames=33, **FEW_STEPS),
        "tiny-wan",
        _small(2, 5.0, num_frames=5),
    ),
    "kokoro": CheckModel(_configured("gpu-80gb", "kokoro-82m"), "tiny-kokoro"),
    "xtts": CheckModel(_configured("gpu-80gb", "xtts-v2"), "tiny-xtts"),
}
"""All of them, by name."""


def configuration(
    names: Sequence[str], folder: Path, *, device: str, small: bool, memory: str | None = None
) -> dict[str, Any]:
    """The configuration of a server with these models."""
    engine: dict[str, Any] = {
        "device": device,
        "cache_dir": str(folder / CACHE_FOLDER),
        "state_dir": str(folder / "state"),
        "data_dir": str(folder / "data"),
    }
    if memory is not None:
        engine["memory"] = memory
    models = [MODELS[name].entry(name, folder, small=small) for name in names]
    return {"engine": engine, "server": {"port": 0}, "models": models}


def main() -> None:
    """Build the models and write the configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the models, the cache and the state")
    parser.add_argument("config", type=Path, help="the configuration to write")
    parser.add_argument("names", nargs="+", choices=MODELS, metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--memory", help="the budget of all models")
    given = parser.parse_args()
    document = configuration(
        given.names, given.folder, device=given.device, small=given.small, memory=given.memory
    )
    given.config.write_text(yaml.safe_dump(document), encoding="utf-8")


if __name__ == "__main__":
    main()
