"""What kind of model a repository holds, read from its small files, and an entry that serves it.

The marks: `model_index.json` is a diffusers pipeline; `model.bin` beside a `config.json` with
`alignment_heads` a Whisper of CTranslate2's; a `config.json` with `istftnet` is Kokoro, with
`model: xtts` or `vits` Coqui's, with `model_type: bark` Bark; with `architectures` and safetensors
it is a model for vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.catalog.downloads import sources_of
from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.files.hub.listing import Listing, read_json

MAX_MODEL_LEN = 8192
"""Tokens that a new entry allows at most: by itself vLLM would keep room for four requests of the
checkpoint's full length, which for 128 k tokens is more than the weights."""

VIDEO_PIPELINES = re.compile(
    r"AnimateDiff|Allegro|CogVideoX|Cosmos|EasyAnimate|HunyuanVideo|I2VGen|Latte|LTX|Mochi|SkyReels|"
    r"StableVideoDiffusion|TextToVideo|VideoTo|Wan"
)
"""How the classes of diffusers' pipelines begin, or what is in them, that make videos."""

VIDEO_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "CogVideoX": {"width": 720, "height": 480, "num_frames": 49, "max_frames": 49, "fps": 8},
    "HunyuanVideo": {"width": 512, "height": 320, "num_frames": 61, "max_frames": 129, "fps": 24},
    "LTX": {"width": 704, "height": 480, "num_frames": 161, "max_frames": 257, "fps": 24},
    "StableVideoDiffusion": {
        "width": 1024,
        "height": 576,
        "num_frames": 25,
        "max_frames": 25,
        "fps": 7,
    },
    "Wan": {"width": 832, "height": 480, "num_frames": 81, "max_frames": 81, "fps": 16},
}
"""By the beginning of the pipeline's class: what the models were trained with, as their cards say
and the shipped configurations have it."""

TOOL_PARSERS = {"qwen2": "hermes", "qwen3": "hermes", "qwen3_moe": "hermes"}
"""vLLM's parser of tool calls by `model_type`; Llama's goes by its vocabulary."""

LLAMA_3_VOCABULARY = 128_256

GIVEN_UP = {
    "whisper": "a Whisper of transformers' format: take one of CTranslate2's, such as"
    " Systran/faster-whisper-small, or convert it with ct2-transformers-converter",
}
"""By `model_type`: kinds that no runtime here reads, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A model for the configuration, and what its files take."""

    runtime: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, model_id: str, source: str) -> dict[str, Any]:
        """The entry of the configuration, what is usual left out."""
        entry: dict[str, Any] = {"id": model_id}
        if self.runtime != "vllm":
            entry["runtime"] = self.runtime
        if self.task != "generate":
            entry["task"] = self.task
        entry["source"] = source
        if self.options:
            entry["options"] = dict(self.options)
        return entry


def recognise(listing: Listing) -> Recognised:
    """What the repository holds. Reads a few small files of it from the hub.

    Raises:
        LoadFailed: it holds nothing that a runtime here reads.

    """
    paths = {file.path for file in listing.files}
    if "model_index.json" in paths:
        return _pipeline(listing, paths)
    if "config.json" not in paths:
        raise LoadFailed(
            f"{listing.repo} has neither model_index.json nor config.json: it is no model that is"
            " served here" + (" (GGUF files are not read)" if _has(paths, ".gguf") else "")
        )
    config = read_json(listing, "config.json")
    if not isinstance(config, dict):
        raise LoadFailed(f"{listing.repo}: config.json is no mapping")
    kind = str(config.get("model_type") or "")
    if "model.bin" in paths:
        return _ctranslate2(listing, paths, config)
    if "istftnet" in config and _has(paths, ".pth"):
        return Recognised("kokoro", "speech")
    if str(config.get("model", "")).lower() in ("xtts", "vits") and _has(paths, ".pth"):
        return Recognised("coqui", "speech")
    if kind == "bark":
        return Recognised("bark", "speech")
    if kind in GIVEN_UP:
        raise LoadFailed(f"{listing.repo} is {GIVEN_UP[kind]}")
    if config.get("architectures") and _has(paths, ".safetensors"):
        return _language_model(listing, paths, config)
    raise LoadFailed(
        f"{listing.repo} is not recognised"
        + ("" if _has(paths, ".safetensors") else ": it has no .safetensors files")
    )


def weight_bytes(listing: Listing, model: ModelConfig) -> int:
    """Bytes of the files that a model reads of its own repository.

    Raises:
        LoadFailed: there are no weights that its runtime reads.

    """
    source = next(each for each in sources_of(model) if each.repo == listing.repo)
    return sum(file.nbytes for file in listing.choose(source))


def free_id(repo: str, taken: frozenset[str]) -> str:
    """An id from a repository's name, which no model has yet: `llama-3.2-1b-instruct`."""
    base = repo.rsplit("/", 1)[-1].lower()
    model_id, number = base, 2
    while model_id in taken:
        model_id, number = f"{base}-{number}", number + 1
    return model_id


def _has(paths: set[str], suffix: str) -> bool:
    return any(path.endswith(suffix) for path in paths)


def _ctranslate2(listing: Listing, paths: set[str], config: Mapping[str, Any]) -> Recognised:
    if "alignment_heads" not in config and "lang_ids" not in config:
        raise LoadFailed(f"{listing.repo} is a model of CTranslate2's, but no Whisper")
    if "tokenizer.json" not in paths:
        raise LoadFailed(
            f"{listing.repo} has no tokenizer.json; convert the model with"
            " --copy_files tokenizer.json preprocessor_config.json"
        )
    return Recognised("whisper", "transcribe")


def _language_model(listing: Listing, paths: set[str], config: Mapping[str, Any]) -> Recognised:
    text: Mapping[str, Any] = config.get("text_config") or config
    options: dict[str, Any] = {}
    positions = text.get("max_position_embeddings")
    if isinstance(positions, int):
        options["max_model_len"] = min(positions, MAX_MODEL_LEN)
    architectures = config["architectures"]
    generates = any("For" in str(name) for name in architectures) and not _is_encoder(paths, config)
    if not generates:
        return Recognised("vllm", "embed", options)
    kind = str(config.get("model_type") or "")
    if "deepseek-r1" in listing.repo.lower():
        options["reasoning_parser"] = "deepseek_r1"
    elif kind == "llama" and text.get("vocab_size") == LLAMA_3_VOCABULARY:
        options["tool_call_parser"] = "llama3_json"
    elif kind in TOOL_PARSERS:
        options["tool_call_parser"] = TOOL_PARSERS[kind]
    return Recognised("vllm", "generate", options)


def _is_encoder(paths: set[str], config: Mapping[str, Any]) -> bool:
    """Whether it makes embeddings: sentence-transformers' files, or a masked language model."""
    masked = any("MaskedLM" in str(name) for name in config["architectures"])
    return masked or "modules.json" in paths or "config_sentence_transformers.json" in paths


def _pipeline(listing: Listing, paths: set[str]) -> Recognised:
    index = read_json(listing, "model_index.json")
    name = str(index.get("_class_name", "")) if isinstance(index, dict) else ""
    if not name.endswith("Pipeline"):
        raise LoadFailed(f"{listing.repo}: model_index.json names no pipeline")
    options: dict[str, Any] = {"pipeline": name}
    half = _has_variant(paths, "fp16")
    # In float16 wherever a repository has such files: half of the download, and what they are for.
    options["dtype"] = "float16" if half else "bfloat16"
    if half:
        options["variant"] = "fp16"
    if VIDEO_PIPELINES.search(name):
        shape = next((each for key, each in VIDEO_SHAPES.items() if name.startswith(key)), {})
        return Recognised("diffusers", "video", {**options, **shape})
    options |= _image_options(listing, paths)
    return Recognised("diffusers", "image", options)


def _has_variant(paths: set[str], variant: str) -> bool:
    """Whether every part with weights has them in that variant too."""
    parts = {path.partition("/")[0] for path in paths if path.endswith(".safetensors")}
    parts = {part for part in parts if not part.endswith(".safetensors")}
    varied = {
        path.partition("/")[0]
        for path in paths
        if path.endswith(".safetensors") and f".{variant}" in path
    }
    return bool(parts) and parts <= varied


def _image_options(listing: Listing, paths: set[str]) -> dict[str, Any]:
    """Size and steps, where the files or the name tell them."""
    options: dict[str, Any] = {}
    if "unet/config.json" in paths and "vae/config.json" in paths:
        unet, vae = read_json(listing, "unet/config.json"), read_json(listing, "vae/config.json")
        scale = 2 ** (len(vae.get("block_out_channels") or (0, 0, 0, 0)) - 1)
        if isinstance(sample := unet.get("sample_size"), int):
            options |= {"width": sample * scale, "height": sample * scale}
    few_steps = None
    if "transformer/config.json" in paths:
        transformer = read_json(listing, "transformer/config.json")
        if transformer.get("guidance_embeds") is False and "schnell" in listing.repo.lower():
            few_steps = {"steps": 4, "guidance": 0.0}
    elif "turbo" in listing.repo.lower():
        few_steps = {"steps": 2, "guidance": 0.0}
        options["scheduler"] = {
            "class": "EulerAncestralDiscreteScheduler",
            "timestep_spacing": "trailing",
        }
    if few_steps is not None:
        options["default"] = few_steps
    return options
