"""The Whisper models of the configurations, in the form in which they are published."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.files.ctranslate2_file import read_variables
from engine.memory.device import CpuDevice
from engine.runtimes.base import RuntimeContext
from engine.runtimes.whisper.runtime import WhisperRuntime
from tests.conftest import StarterDir
from tests.layouts.configured import configured
from tests.layouts.layout import TOLERANCE, Layout, layouts
from tests.layouts.sparse import write_ctranslate2

MODELS = [pytest.param(model, id=model.source) for model in configured("whisper")]


def context(tmp_path: Path) -> RuntimeContext:
    return RuntimeContext(CpuDevice(), tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_the_estimate_is_what_is_published(model: ModelConfig, tmp_path: Path) -> None:
    layout = layouts()[model.source]
    folder = layout.build(tmp_path / "repo")
    # To the byte: so every name, shape and type of the description is that of the file.
    assert (folder / "model.bin").stat().st_size == layout.published["file"]
    local = model.model_copy(update={"source": str(folder), "options": {"compute_type": "float16"}})
    (block,) = WhisperRuntime(context(tmp_path)).estimate(local).blocks
    assert block.nbytes == pytest.approx(layout.published["bytes"], rel=TOLERANCE)
    smaller = local.model_copy(update={"options": {"compute_type": "int8"}})
    (block,) = WhisperRuntime(context(tmp_path)).estimate(smaller).blocks
    assert block.nbytes == pytest.approx(layout.published["bytes"] / 2, rel=3 * TOLERANCE)


def narrow(layout: Layout, folder: Path, starter: Path, *, without: str = "") -> Path:
    """The repository with all its layers, each of 4 numbers a head. It loads in a moment."""
    (weights,) = layout.sets
    heads = layout.beside["values"]["encoder/num_heads"]
    factor = weights.tensors["encoder/conv1/bias"].count // (4 * heads)
    kept = {"model.bin", "tokenizer.json", "vocabulary.txt", "vocabulary.json"}
    layout.build(folder, only=layout.sizes.keys() - kept)
    widths = {factor * 4 * heads * times for times in range(1, 5)}
    tensors = {
        name: replace(
            each, shape=tuple(size // factor if size in widths else size for size in each.shape)
        )
        for name, each in weights.tensors.items()
        if name != without
    }
    write_ctranslate2(folder / "model.bin", tensors, **layout.beside)
    words = vocabulary(weights.tensors["decoder/embeddings/weight"].shape[0])
    if "vocabulary.txt" in layout.sizes:
        (folder / "vocabulary.txt").write_text("\n".join(words), encoding="utf-8")
    else:
        (folder / "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
    shutil.copy(starter / "tokenizer.json", folder)
    return folder


def vocabulary(size: int) -> list[str]:
    """Tokens in Whisper's order, made up where only their number matters."""
    after = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    times = [f"<|{number / 50:.2f}|>" for number in range(1501)]
    text = [*(f"word{number}" for number in range(50256)), ""]  # the empty one: many languages
    begin = ["<|endoftext|>", "<|startoftranscript|>"]
    languages = size - len(text) - len(begin) - len(after) - len(times)
    return [
        *text,
        *begin,
        *(f"<|l{number}|>" for number in range(languages)),
        *(f"<|{name}|>" for name in after),
        *times,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_published_names_fill_the_model(
    model: ModelConfig, starter_dir: StarterDir, tmp_path: Path
) -> None:
    from engine.runtimes.whisper.run import CancellableWhisper

    layout = layouts()[model.source]
    folder = narrow(layout, tmp_path / "repo", starter_dir("tiny-whisper"))
    whisper = CancellableWhisper(str(folder), device="cpu", compute_type="int8", cpu_threads=1)
    bands = layout.sets[0].tensors["encoder/conv1/weight"].shape[1]
    assert whisper.model.n_mels == bands
    assert whisper.feature_extractor.mel_filters.shape[0] == bands
    assert whisper.model.is_multilingual
    whisper.model.unload_model()


@pytest.mark.slow
def test_a_name_that_is_missing_is_refused(starter_dir: StarterDir, tmp_path: Path) -> None:
    from engine.runtimes.whisper.run import CancellableWhisper

    layout = layouts()["mobiuslabsgmbh/faster-whisper-large-v3-turbo"]
    lacking = "decoder/layer_3/attention/linear_2/weight"
    folder = narrow(layout, tmp_path / "repo", starter_dir("tiny-whisper"), without=lacking)
    with pytest.raises(IndexError, match=lacking):
        CancellableWhisper(str(folder), device="cpu", compute_type="int8", cpu_threads=1)


@pytest.mark.parametrize("model", MODELS)
def test_the_description_is_that_of_the_library(model: ModelConfig, tmp_path: Path) -> None:
    """`read_variables` reads at full size what the description says."""
    layout = layouts()[model.source]
    variables: dict[str, Any] = dict(read_variables(layout.build(tmp_path) / "model.bin"))
    assert {name: each.shape for name, each in variables.items()} == {
        name: each.shape for name, each in layout.tensors()
    }
