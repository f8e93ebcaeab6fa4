"""Real Bark in this process, beside a bare call of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from engine.errors import InvalidRequest, LoadFailed
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.process.heap import freeze_heap
from engine.process.torch_state import share_torch_state
from engine.runtimes.bark.runtime import BarkRuntime
from engine.runtimes.base import RuntimeContext, Voice
from engine.starters.registry import ensure_starter
from tests.engine.runtimes.common.speaking import (
    SEED,
    Stop,
    cancel_within,
    loaded,
    speech_model,
    speech_request,
    spoken,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.slow,
    pytest.mark.usefixtures("frozen_heap"),
]

BARK = speech_model("bark", "tiny-bark", voices={"alloy": "v2/en_speaker_0"})
SENTENCES = ("Hello world, how are you?", "This is the second sentence.")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runtime(cache_dir: Path) -> BarkRuntime:
    made = BarkRuntime(RuntimeContext(CpuDevice(), cache_dir))
    made.start()
    share_torch_state()
    freeze_heap()
    ensure_starter("tiny-bark", cache_dir)
    return made


@pytest.fixture
def folder(cache_dir: Path, tmp_path: Path) -> Path:
    """A copy of the starter that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-bark", cache_dir), copy)
    return copy


async def test_speech_equals_that_of_the_library_alone(
    runtime: BarkRuntime, cache_dir: Path
) -> None:
    from transformers import BarkModel, BarkProcessor

    folder = ensure_starter("tiny-bark", cache_dir)
    processor = BarkProcessor.from_pretrained(folder)
    with GATE.exclusive():
        model = BarkModel.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(SEED)
    expected = []
    for sentence in SENTENCES:
        inputs = processor(sentence, voice_preset="v2/en_speaker_0")
        expected.append(model.generate(**inputs).numpy().reshape(-1))
    state = torch.get_rng_state()
    for _ in range(2):
        async with loaded(runtime, BARK) as bark:
            pieces = await spoken(runtime, BARK, bark, " ".join(SENTENCES))
            assert len(pieces) == 2, "a sentence each"
            for piece, audio in zip(pieces, expected, strict=True):
                assert audio.std() > 0.005
                np.testing.assert_array_equal(piece, audio)
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator"


async def test_seed_and_voice_matter(runtime: BarkRuntime) -> None:
    async with loaded(runtime, BARK) as bark:
        usual, seed, voice, alias = [
            (await spoken(runtime, BARK, bark, SENTENCES[0], **fields))[0]
            for fields in (
                {},
                {"seed": SEED + 1},
                {"voice": "v2/de_speaker_0"},
                {"voice": "alloy"},
            )
        ]
    np.testing.assert_array_equal(alias, usual)
    for other in (seed, voice):
        assert other.shape != usual.shape or (other != usual).any()


async def test_a_run_is_stopped_within_a_sentence(runtime: BarkRuntime) -> None:
    async with loaded(runtime, BARK) as bark:
        expected = (await spoken(runtime, BARK, bark, SENTENCES[0]))[0]
        held = await cancel_within(
            runtime, BARK, bark, lambda module: Stop(module.semantic, module.coarse_acoustics)
        )
        assert not held.later
        again = (await spoken(runtime, BARK, bark, SENTENCES[0]))[0]
        np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": ""}, "input"),
        ({"text": "x" * 5000}, "input"),
        ({"voice": "nobody"}, "voice"),
        ({"voice_sample": Path(__file__)}, "voice"),
        ({"language": "sw"}, "language"),
        ({"speed": 0.0}, "speed"),
        ({"speed": 1.5}, "speed"),
        ({"text": "สวัสดี"}, "input"),
        ({"text": "Hello שלום"}, "input"),
    ],
)
async def test_what_is_refused_before_anything_is_loaded(
    runtime: BarkRuntime, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        runtime.prepare(BARK, speech_request(**fields))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("language", "voice"), [("de", "v2/de_speaker_0"), ("en-US", "v2/en_speaker_0")]
)
async def test_a_language_chooses_a_voice(runtime: BarkRuntime, language: str, voice: str) -> None:
    assert runtime.prepare(BARK, speech_request(language=language)).payload.voice == voice


async def test_voices_are_those_whose_files_are_there(runtime: BarkRuntime, folder: Path) -> None:
    english = Voice("v2/en_speaker_0", "v2/en_speaker_0", "en")
    assert runtime.voices(BARK) == (english, Voice("v2/de_speaker_0", "v2/de_speaker_0", "de"))
    model = BARK.model_copy(update={"source": str(folder), "id": "fewer"})
    (folder / "speaker_embeddings/v2/de_speaker_0_fine_prompt.npy").unlink()
    assert runtime.voices(model) == (english,)
    (folder / "speaker_embeddings_path.json").unlink()
    assert [voice.id for voice in runtime.voices(model)] == ["default"]
    async with loaded(runtime, model) as bark:
        assert len(await spoken(runtime, model, bark, SENTENCES[0])) == 1
    (folder / "speaker_embeddings_path.json").write_text("[]")
    with pytest.raises(LoadFailed):
        runtime.voices(model)


async def test_a_pickled_checkpoint(runtime: BarkRuntime, folder: Path) -> None:
    """As suno/bark-small has it; and the estimates of both are what is measured."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = BARK.model_copy(update={"source": str(folder), "id": "pickled"})
    async with loaded(runtime, BARK) as bark:
        expected = (await spoken(runtime, BARK, bark, SENTENCES[0]))[0]
    async with loaded(runtime, model) as bark:
        found = (await spoken(runtime, model, bark, SENTENCES[0]))[0]
        np.testing.assert_array_equal(found, expected)
        measured = {block.name: block.nbytes for block in bark.blocks()}
    for each in (BARK, model):
        estimate = {block.name: block.nbytes for block in runtime.estimate(each).blocks}
        assert estimate.keys() == measured.keys()
        stored = sum(path.stat().st_size for path in runtime.weight_files(each))
        assert stored >= sum(estimate.values())
        assert sum(estimate.values()) == pytest.approx(sum(measured.values()), rel=0.05)


@pytest.mark.parametrize("damage", ["truncated", "a weight less", "no config"])
async def test_a_damaged_folder_says_so(runtime: BarkRuntime, folder: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:10_000])
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        tensors = load_file(path)
        del tensors["semantic.lm_head.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    model = BARK.model_copy(update={"source": str(folder), "id": "damaged"})
    with pytest.raises(LoadFailed):
        await runtime.load(model, pytest.fail)


async def test_the_starter_is_written_the_same_twice(cache_dir: Path, tmp_path: Path) -> None:
    first, second = (ensure_starter("tiny-bark", each) for each in (cache_dir, tmp_path))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert json.loads((first / "config.json").read_text())["model_type"] == "bark"
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
