"""The starter models by name, and the cache that holds their folders.

A starter is a tiny, real model folder. Roundhouse builds it on this machine, with no download.
Its weights are random, so its answers mean nothing. Everything else about it is real: the format
of a hub repository, the tokenizer, the chat template with tools, the runtime that loads it. A
configuration names one as `starter:NAME`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from engine.errors import ConfigError, LoadFailed
from engine.files.built_folder import ensure_built
from engine.files.source import starter_source

FORMAT = "v4"
"""Part of each folder's path: the version of all bytes that the modules of this package write.

Raise it with any change to those bytes, so that no old folder is used. Most of the text in these
modules ends up there: corpora, chat templates, summaries, and each number of a model's shape.
"""


@dataclass(frozen=True, slots=True)
class Starter:
    """One starter model: what it is, and the function that writes it into an empty folder.

    `pipeline` and `library` are the hub's words for its task and for the library that loads it.
    """

    summary: str
    pipeline: str
    write: Callable[[Path], None]
    library: str = "transformers"
    weights: str = "random numbers"
    """What they are: nobody trained any."""


def starter_folder(name: str, cache_dir: Path) -> Path:
    """The folder of a starter model, whether it is built or not."""
    return cache_dir / "starter" / FORMAT / name


def ensure_starter(name: str, cache_dir: Path) -> Path:
    """The folder of a starter model, built if it is not there.

    A build takes well under a second. The first of a family in a process also imports the
    libraries that build it, which takes some seven seconds for `DIFFUSION_STARTERS`.

    Any number of threads and processes may ask at once. An interrupted build leaves no
    half-made folder under the model's name.

    Raises:
        ConfigError: there is no starter model of that name.
        LoadFailed: the folder cannot be written, or a library that builds it is not installed.

    """
    starter = STARTERS.get(name)
    if starter is None:
        families = (LANGUAGE_STARTERS, DIFFUSION_STARTERS, SPEECH_STARTERS)
        known = ", ".join(each for family in families for each in sorted(family))
        raise ConfigError(f"starter:{name}: no such starter model; there is {known}")
    folder = starter_folder(name, cache_dir)

    def write(building: Path) -> None:
        starter.write(building)
        _write_card(building, name, starter)

    return ensure_built(folder, starter_source(name), write, durable=False)


def _write_card(folder: Path, name: str, starter: Starter) -> None:
    (folder / "README.md").write_text(
        f"---\npipeline_tag: {starter.pipeline}\nlibrary_name: {starter.library}\n---\n\n"
        f"# {name}\n\n{starter.summary}\n\n"
        f"**The weights are {starter.weights}: nothing was trained, and what this model answers\n"
        "means nothing.** It exists so that a server can be started, tried and tested with no\n"
        "download. Built by Roundhouse; delete the folder and it is built again.\n",
        encoding="utf-8",
    )


def _write(name: str, module: str, folder: Path) -> None:
    """Write a starter by the `WRITERS` of a module of this package, imported now.

    Most of these modules import a native library.
    """
    try:
        writers = importlib.import_module(f"engine.starters.{module}").WRITERS
    except ImportError as error:
        raise LoadFailed(f"cannot build starter:{name}: {error}") from error
    writers[name](folder)


def _starter(
    name: str,
    module: str,
    pipeline: str,
    summary: str,
    library: str = "transformers",
    weights: str = "random numbers",
) -> Starter:
    return Starter(summary, pipeline, partial(_write, name, module), library, weights)


LANGUAGE_STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        name: _starter(name, module, pipeline, summary)
        for name, module, pipeline, summary in (
            (
                "tiny-llama",
                "language",
                "text-generation",
                "A Llama of 2.6 million parameters that calls tools in Llama 3's way.",
            ),
            (
                "tiny-qwen",
                "language",
                "text-generation",
                "A Qwen 2 of 1.2 million parameters that calls tools in Hermes' way.",
            ),
            (
                "tiny-idefics3",
                "language",
                "image-text-to-text",
                "An Idefics 3 of 1.4 million parameters that sees pictures.",
            ),
            (
                "tiny-embed",
                "language",
                "sentence-similarity",
                "A BERT of 1.4 million parameters that turns a text into 128 numbers.",
            ),
            (
                "tiny-rerank",
                "language",
                "text-ranking",
                "A BERT of 0.6 million parameters that scores a query and a document.",
            ),
            (
                "tiny-classify",
                "language",
                "text-classification",
                "A BERT of 0.6 million parameters that gives a text one of five labels.",
            ),
            (
                "tiny-camembert",
                "camembert",
                "fill-mask",
                "A CamemBERT of 0.4 million parameters that reads Thai and fills masks.",
            ),
        )
    }
)
"""The language models, by name, as in `starter:NAME`."""

DIFFUSION_STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        name: _starter(name, "diffusion.writers", pipeline, summary, "diffusers")
        for name, pipeline, summary in (
            ("tiny-sdxl-turbo", "text-to-image", "An SDXL Turbo: one to four steps, no guidance."),
            ("tiny-sdxl", "text-to-image", "An SDXL."),
            ("tiny-sd15", "text-to-image", "A Stable Diffusion 1.5, with no safety checker."),
            ("tiny-flux-schnell", "text-to-image", "A FLUX.1 schnell: one to four steps."),
            ("tiny-flux-dev", "text-to-image", "A FLUX.1 dev, which takes guidance as an input."),
            ("tiny-flux2-klein", "text-to-image", "A FLUX.2 klein: four steps, no guidance."),
            ("tiny-z-image", "text-to-image", "A Z-Image Turbo."),
            ("tiny-svd", "image-to-video", "A Stable Video Diffusion: an image starts to move."),
            ("tiny-animatediff", "text-to-video", "An AnimateDiff on Stable Diffusion 1.5."),
            ("tiny-animatediff-sdxl", "text-to-video", "An AnimateDiff on SDXL."),
            ("tiny-wan", "text-to-video", "A Wan 2.1."),
            (
                "tiny-wan-ti2v",
                "text-to-video",
                "A Wan 2.2 of its kind of 5 B, which may start from an image.",
            ),
            ("tiny-ltx", "text-to-video", "An LTX-Video."),
            ("tiny-cogvideox", "text-to-video", "A CogVideoX."),
            ("tiny-hunyuanvideo", "text-to-video", "A HunyuanVideo."),
            ("tiny-lora-sd15", "text-to-image", "A LoRA for tiny-sd15."),
            (
                "tiny-lora-sd15-b",
                "text-to-image",
                "Another LoRA for tiny-sd15, which changes the text encoder as well.",
            ),
            (
                "tiny-lora-sdxl",
                "text-to-image",
                "A LoRA for tiny-sdxl and tiny-sdxl-turbo.",
            ),
            ("tiny-controlnet-sd15", "image-to-image", "A ControlNet for tiny-sd15."),
            (
                "tiny-controlnet-sdxl",
                "image-to-image",
                "A ControlNet for tiny-sdxl and tiny-sdxl-turbo.",
            ),
            ("tiny-ip-adapter-sd15", "text-to-image", "An IP-Adapter for tiny-sd15."),
        )
    }
)
"""The models that make images and videos, and the adapters of such models, by name."""

SPEECH_STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        name: _starter(name, *about)
        for name, *about in (
            (
                "tiny-kokoro",
                "kokoro",
                "text-to-speech",
                "A Kokoro that speaks as fast as it can be made to, with voices of each language.",
                "kokoro",
            ),
            ("tiny-bark", "bark", "text-to-speech", "A Bark with two voices.", "transformers"),
            (
                "tiny-vits",
                "coqui",
                "text-to-speech",
                "A VITS of one English voice, spelled by its letters.",
                "coqui",
            ),
            (
                "tiny-vits-multi",
                "coqui",
                "text-to-speech",
                "A VITS of three English voices.",
                "coqui",
            ),
            (
                "tiny-xtts",
                "coqui",
                "text-to-speech",
                "An XTTS v2 with two voices, which clones others.",
                "coqui",
            ),
            (
                "tiny-pocket-tts",
                "pocket",
                "text-to-speech",
                "A Pocket TTS with two voices, which clones others.",
                "pocket-tts",
            ),
            (
                "tiny-whisper",
                "whisper",
                "automatic-speech-recognition",
                "A multilingual Whisper of 1.3 million parameters in CTranslate2's format.",
                "ctranslate2",
            ),
            (
                "tiny-parakeet",
                "nemo",
                "automatic-speech-recognition",
                "A Parakeet TDT of NeMo in ONNX, which says when each word was spoken.",
                "onnx",
            ),
            (
                "tiny-canary",
                "nemo",
                "automatic-speech-recognition",
                "A Canary of NeMo in ONNX, which takes a language and translates.",
                "onnx",
            ),
            (
                "tiny-diarization",
                "diarization",
                "voice-activity-detection",
                "Tells a low voice from a high one, in the files of pyannote and WeSpeaker.",
                "onnx",
                "filters of fixed tones",
            ),
        )
    }
)
"""The models that speak and listen, by name."""

STARTERS: Mapping[str, Starter] = MappingProxyType(
    {**LANGUAGE_STARTERS, **DIFFUSION_STARTERS, **SPEECH_STARTERS}
)
"""All of them, by name."""
