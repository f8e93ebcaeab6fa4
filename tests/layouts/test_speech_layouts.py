"""The speech models of the configurations, in the form in which they are published.

The modules are built without memory, and the checkpoints hold one number for each tensor. What is
real is the match of names and shapes, as the runtimes check it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import LoadFailed
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.runtimes.base import RuntimeContext
from engine.runtimes.coqui.files import read_folder
from engine.runtimes.coqui.options import CoquiOptions
from engine.runtimes.coqui.runtime import CoquiRuntime
from engine.runtimes.kokoro.runtime import KokoroRuntime
from tests.layouts.configured import repositories
from tests.layouts.layout import TOLERANCE, Layout, layouts
from tests.layouts.pickles import write_pickle

pytestmark = pytest.mark.slow

KOKORO = layouts()["hexgrad/Kokoro-82M"]
XTTS = layouts()["coqui/XTTS-v2"]


def estimated_bytes(layout: Layout, runtime: Any, folder: Path) -> int:
    return sum(block.nbytes for block in runtime.estimate(layout.model(str(folder))).blocks)


def without(layout: Layout, name: str) -> dict[str, Any]:
    tensors = dict(layout.tensors())
    del tensors[name]
    return tensors


def test_these_are_all() -> None:
    assert repositories("kokoro", "coqui", "bark").keys() == {KOKORO.repository, XTTS.repository}


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules without memory, but for a spectrogram that looks at its own numbers."""
    from TTS.encoder.models.base_encoder import BaseEncoder

    make = BaseEncoder.get_torch_mel_spectrogram_class

    def on_cpu(self: Any, config: Any) -> Any:
        with torch.device("cpu"):
            return make(self, config)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(BaseEncoder, "get_torch_mel_spectrogram_class", on_cpu)
        with GATE.exclusive(), torch.device("meta"):
            yield


def test_kokoro(tmp_path: Path) -> None:
    from engine.runtimes.kokoro.model import NORMS, VoiceModel

    folder = KOKORO.build(tmp_path / "repo")
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), tmp_path))
    nbytes = estimated_bytes(KOKORO, runtime, folder)
    assert nbytes == pytest.approx(KOKORO.published["bytes"], rel=TOLERANCE)
    with without_memory():
        made = VoiceModel(folder / "config.json", folder / "kokoro-v1_0.pth", "cpu")
    kept = [each for each in made.module.parameters()]
    assert sum(each.numel() for each in kept) * 4 == pytest.approx(nbytes, rel=0.001)
    assert not any(name.endswith(NORMS) for name, _ in made.module.named_parameters())
    assert len(runtime.voices(KOKORO.model(str(folder)))) >= 54


@pytest.mark.parametrize(
    "lacking",
    ["predictor:module.F0.2.norm1.fc.weight", "decoder:module.generator.resblocks.5.alpha2.2"],
)
def test_kokoro_lacks_a_name(lacking: str, tmp_path: Path) -> None:
    from engine.runtimes.kokoro.model import VoiceModel

    folder = KOKORO.build(tmp_path, only=["config.json"])
    write_pickle(folder / "kokoro-v1_0.pth", without(KOKORO, lacking))
    part, _, name = lacking.partition(":module.")
    with without_memory(), pytest.raises(LoadFailed, match=f"lacks {part}.{name}"):
        VoiceModel(folder / "config.json", folder / "kokoro-v1_0.pth", "cpu")


def xtts_folder(folder: Path, tensors: dict[str, Any]) -> Path:
    """XTTS v2 with a made-up vocabulary of the published number of tokens, and one speaker."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    XTTS.build(folder, only=["config.json"])
    count = XTTS.documents["config.json"]["model_args"]["gpt_number_text_tokens"]
    specials = ["[STOP]", "[UNK]", "[SPACE]", "[START]"]
    words = [*specials, *(f"word{number}" for number in range(count - len(specials)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.save(str(folder / "vocab.json"))
    speaker = {
        "gpt_cond_latent": torch.zeros(1, 32, 1024),
        "speaker_embedding": torch.zeros(1, 512, 1),
    }
    torch.save({"Claribel Dervla": speaker}, folder / "speakers_xtts.pth")
    write_pickle(folder / "model.pth", tensors)
    return folder


@pytest.mark.parametrize("prefix", ["", "xtts."])
def test_xtts(prefix: str, tmp_path: Path) -> None:
    """With the names of the release, and with those that its trainer writes."""
    from engine.runtimes.coqui.models import build

    tensors = {name.replace("model:", f"model:{prefix}"): each for name, each in XTTS.tensors()}
    folder = xtts_folder(tmp_path / "repo", tensors)
    runtime = CoquiRuntime(RuntimeContext(CpuDevice(), tmp_path))
    nbytes = estimated_bytes(XTTS, runtime, folder)
    assert nbytes == pytest.approx(XTTS.published["bytes"], rel=TOLERANCE)
    with without_memory():
        speaker = build(read_folder(folder), CoquiOptions(), "cpu")
    kept = sum(each.numel() * each.element_size() for each in speaker.module.parameters())
    assert kept == pytest.approx(nbytes, rel=TOLERANCE)


@pytest.mark.parametrize(
    "lacking", ["model:gpt.final_norm.weight", "model:hifigan_decoder.speaker_encoder.fc.bias"]
)
def test_xtts_lacks_a_name(lacking: str, tmp_path: Path) -> None:
    from engine.runtimes.coqui.models import build

    folder = xtts_folder(tmp_path, without(XTTS, lacking))
    with without_memory(), pytest.raises(RuntimeError, match=lacking.removeprefix("model:")):
        build(read_folder(folder), CoquiOptions(), "cpu")


def test_a_shape_of_another_model_is_refused(tmp_path: Path) -> None:
    from engine.runtimes.coqui.models import build

    tensors = dict(XTTS.tensors())
    head = tensors["model:gpt.mel_head.bias"]
    tensors["model:gpt.mel_head.bias"] = replace(head, shape=(1000,))
    folder = xtts_folder(tmp_path, tensors)
    assert json.loads((folder / "config.json").read_text())["model"] == "xtts"
    with without_memory(), pytest.raises(RuntimeError, match="size mismatch"):
        build(read_folder(folder), CoquiOptions(), "cpu")
