"""Real VITS and XTTS in this process, each beside a bare call of the library."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.process.heap import freeze_heap
from engine.process.torch_state import share_torch_state
from engine.requests import ImageOperation, ImageRequest
from engine.runtimes.base import RuntimeContext, Voice
from engine.runtimes.coqui.runtime import CoquiRuntime
from engine.starters.registry import ensure_starter
from tests.engine.runtimes.common.speaking import (
    SEED,
    TEXT,
    Stop,
    cancel_within,
    loaded,
    speech_model,
    speech_request,
    spoken,
    write_recording,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.slow,
    pytest.mark.usefixtures("frozen_heap"),
]

VITS = speech_model("coqui", "tiny-vits")
MULTI = speech_model("coqui", "tiny-vits-multi", voice="p226", voices={"alloy": "p225"})
XTTS = speech_model("coqui", "tiny-xtts", voices={"alloy": "Damien Black"}, language="en")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runtime(cache_dir: Path) -> CoquiRuntime:
    made = CoquiRuntime(RuntimeContext(CpuDevice(), cache_dir))
    made.start()
    share_torch_state()
    freeze_heap()
    for model in (VITS, MULTI, XTTS):
        ensure_starter(model.id, cache_dir)
    return made


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("voices") / "sample.wav"
    write_recording(path)
    return path


def bare_vits(cache_dir: Path, name: str) -> Any:
    """The library alone, as its documentation says to use it."""
    from TTS.utils.synthesizer import Synthesizer

    folder = ensure_starter(name, cache_dir)
    before = Path.cwd()
    os.chdir(folder)  # the starter's configuration names its speakers' file without a folder
    try:
        with GATE.exclusive():
            return Synthesizer(
                tts_checkpoint=folder / "model_file.pth", tts_config_path=folder / "config.json"
            )
    finally:
        os.chdir(before)


def bare_xtts(cache_dir: Path) -> Any:
    from TTS.config import load_config
    from TTS.tts.models.xtts import Xtts

    folder = ensure_starter("tiny-xtts", cache_dir)
    config = load_config(folder / "config.json")
    with GATE.exclusive():
        model = Xtts(config)
        model.load_checkpoint(config, checkpoint_dir=folder)
    return model


def bare_stream(model: Any, text: str, latents: Any, embedding: Any) -> list[Any]:
    config = model.config
    return [
        chunk.cpu().numpy().copy()
        for chunk in model.inference_stream(
            text,
            "en",
            latents,
            embedding,
            temperature=config.temperature,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            top_k=config.top_k,
            top_p=config.top_p,
        )
    ]


def whole(pieces: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(pieces)


@pytest.mark.parametrize(("model", "speaker"), [(VITS, None), (MULTI, "p226")])
async def test_vits_equals_the_library_alone(
    runtime: CoquiRuntime, cache_dir: Path, model: ModelConfig, speaker: str | None
) -> None:
    synthesizer = bare_vits(cache_dir, model.id)
    torch.manual_seed(SEED)
    expected = np.asarray(synthesizer.tts(TEXT, speaker_name=speaker or ""), dtype=np.float32)
    assert expected.std() > 0.005
    async with loaded(runtime, model) as vits:
        pieces = await spoken(runtime, model, vits)
        assert len(pieces) == 3, "a sentence each"
        np.testing.assert_array_equal(whole(pieces), expected)
        np.testing.assert_array_equal(whole(await spoken(runtime, model, vits)), expected)
        other = whole(await spoken(runtime, model, vits, seed=SEED + 1))
        assert other.shape != expected.shape or (other != expected).any()
    async with loaded(runtime, model) as vits:
        np.testing.assert_array_equal(whole(await spoken(runtime, model, vits)), expected)


async def test_speakers_and_their_aliases(runtime: CoquiRuntime) -> None:
    async with loaded(runtime, MULTI) as vits:
        by_name = whole(await spoken(runtime, MULTI, vits, voice="p225"))
        alias = whole(await spoken(runtime, MULTI, vits, voice="alloy"))
        usual = whole(await spoken(runtime, MULTI, vits))
        np.testing.assert_array_equal(alias, by_name)
        assert usual.shape != by_name.shape or (usual != by_name).any()


async def test_speed_shortens_and_stays_with_its_request(runtime: CoquiRuntime) -> None:
    async with loaded(runtime, VITS) as vits:
        usual = whole(await spoken(runtime, VITS, vits))
        fast = whole(await spoken(runtime, VITS, vits, speed=2.0))
        assert len(fast) < len(usual)
        np.testing.assert_array_equal(whole(await spoken(runtime, VITS, vits)), usual)
    async with loaded(runtime, XTTS) as xtts:
        slow = whole(await spoken(runtime, XTTS, xtts, "Hello there.", speed=0.5))
        usual = whole(await spoken(runtime, XTTS, xtts, "Hello there."))
        assert len(slow) > 1.5 * len(usual)


async def test_xtts_equals_the_stream_of_the_library_alone(
    runtime: CoquiRuntime, cache_dir: Path
) -> None:
    model = bare_xtts(cache_dir)
    speaker = model.speaker_manager.speakers["Claribel Dervla"]
    torch.manual_seed(SEED)
    expected = bare_stream(model, "Hello world, how are you?", **{
        "latents": speaker["gpt_cond_latent"], "embedding": speaker["speaker_embedding"]
    })  # fmt: skip
    assert len(expected) > 1, "audio comes before the sentence ends"
    assert whole(expected).std() > 0.005
    for _ in range(2):
        async with loaded(runtime, XTTS) as xtts:
            pieces = await spoken(runtime, XTTS, xtts, "Hello world, how are you?")
            assert [len(piece) for piece in pieces] == [len(chunk) for chunk in expected]
            np.testing.assert_array_equal(whole(pieces), whole(expected))
            other = await spoken(runtime, XTTS, xtts, "Hello world, how are you?", voice="alloy")
            assert (
                len(whole(other)) != len(whole(expected)) or (whole(other) != whole(expected)).any()
            )


async def test_a_clone_equals_that_of_the_library_alone(
    runtime: CoquiRuntime, cache_dir: Path, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchaudio
    from TTS.tts.models import xtts as xtts_module

    def load_audio(path: str, sample_rate: int) -> torch.Tensor:
        """By PyAV, so that what the runtime reads is checked too."""
        with av.open(path) as container:
            pcm = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        audio = torch.from_numpy(pcm.astype(np.float32) / 32768)[None]
        return torchaudio.functional.resample(audio, 24_000, sample_rate)

    model = bare_xtts(cache_dir)
    config = model.config
    with monkeypatch.context() as patched:
        patched.setattr(xtts_module, "load_audio", load_audio)
        latents, embedding = model.get_conditioning_latents(
            audio_path=str(recording),
            max_ref_length=config.max_ref_len,
            gpt_cond_len=config.gpt_cond_len,
            gpt_cond_chunk_len=config.gpt_cond_chunk_len,
            sound_norm_refs=config.sound_norm_refs,
        )
    torch.manual_seed(SEED)
    expected = whole(bare_stream(model, "Hello there.", latents, embedding))
    read = []

    def counted(path: str, sample_rate: int) -> torch.Tensor:
        read.append(path)
        return load_audio(path, sample_rate)

    async with loaded(runtime, XTTS) as xtts:
        found = await spoken(runtime, XTTS, xtts, "Hello there.", voice_sample=recording)
        np.testing.assert_array_equal(whole(found), expected)
        monkeypatch.setattr(xtts_module, "load_audio", counted)
        found = await spoken(runtime, XTTS, xtts, "Hello there.", voice_sample=recording)
        np.testing.assert_array_equal(whole(found), expected)
        assert not read, "its latents were kept"
        os.utime(recording, (1, 1))
        await spoken(runtime, XTTS, xtts, "Hello there.", voice_sample=recording)
        assert read, "another file under the same name is another voice"


async def test_models_side_by_side_keep_their_numbers(runtime: CoquiRuntime) -> None:
    """Also when they draw at once, and without a change to the process's own generator."""
    async with loaded(runtime, VITS) as vits, loaded(runtime, XTTS) as xtts:
        alone = [
            whole(await spoken(runtime, VITS, vits)),
            whole(await spoken(runtime, XTTS, xtts, "Hello there.")),
        ]
        state = torch.get_rng_state()
        together = await asyncio.gather(
            spoken(runtime, VITS, vits, TEXT),
            spoken(runtime, XTTS, xtts, "Hello there."),
        )
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole(found), expected)
        assert torch.equal(torch.get_rng_state(), state)


async def test_a_run_is_stopped_within_a_sentence(runtime: CoquiRuntime) -> None:
    async with loaded(runtime, VITS) as vits:
        expected = whole(await spoken(runtime, VITS, vits))
        held = await cancel_within(
            runtime, VITS, vits, lambda module: Stop(module.text_encoder, module.waveform_decoder)
        )
        assert not held.later
        np.testing.assert_array_equal(whole(await spoken(runtime, VITS, vits)), expected)
    async with loaded(runtime, XTTS) as xtts:
        expected = whole(await spoken(runtime, XTTS, xtts, "Hello there."))
        held = await cancel_within(
            runtime, XTTS, xtts, lambda module: Stop(module.gpt.gpt.h[0], module.hifigan_decoder)
        )
        assert not held.later
        found = whole(await spoken(runtime, XTTS, xtts, "Hello there."))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (VITS, {"text": ""}, "input"),
        (VITS, {"text": " \n… ?!"}, "input"),
        (VITS, {"text": "long " * 1000}, "input"),
        (VITS, {"speed": 0.0}, "speed"),
        (VITS, {"speed": 4.5}, "speed"),
        (VITS, {"speed": float("nan")}, "speed"),
        (VITS, {"seed": -1}, "seed"),
        (VITS, {"voice": "p226"}, "voice"),
        (VITS, {"voice_sample": Path(__file__)}, "voice"),
        (VITS, {"language": "de"}, "language"),
        (MULTI, {"voice": "p999"}, "voice"),
        (MULTI, {"voice": "p225+p226"}, "voice"),
        (XTTS, {"voice": "nobody"}, "voice"),
        (XTTS, {"voice_sample": Path("/nowhere/sample.wav")}, "voice"),
        (XTTS, {"language": "sw"}, "language"),
        (XTTS, {"text": "สวัสดี"}, "input"),
        (XTTS, {"text": "Hello 你好"}, "input"),
        (XTTS, {"text": "Привет, мир!"}, "input"),
    ],
)
async def test_what_is_refused_before_anything_is_loaded(
    runtime: CoquiRuntime, model: ModelConfig, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        runtime.prepare(model, speech_request(**{"text": TEXT, **fields}))
    assert refused.value.param == param


UNSPEAKABLE = ["สวัสดีครับ", "مرحبا", "你好世界。", "Привет", "日", "½ §", "Hi สวัสดี", "A. Hello. 你好"]


@pytest.mark.parametrize("text", UNSPEAKABLE)
async def test_words_without_a_known_character_are_refused(
    runtime: CoquiRuntime, text: str
) -> None:
    """Before the first sentence: the library would drop them, fail or make noise of nothing."""
    async with loaded(runtime, VITS) as vits:
        with pytest.raises(InvalidRequest) as refused:
            await spoken(runtime, VITS, vits, text)
        assert refused.value.param == "input"


@pytest.mark.parametrize("text", ["Hi!", "x", "café", "naïve, 12 ñandús", "It costs 5 € – really"])
async def test_a_character_that_is_missing_within_a_word_is_left_out(
    runtime: CoquiRuntime, text: str
) -> None:
    async with loaded(runtime, VITS) as vits:
        assert len(whole(await spoken(runtime, VITS, vits, text))) > 10_000


async def test_xtts_refuses_a_sentence_without_a_known_token(runtime: CoquiRuntime) -> None:
    async with loaded(runtime, XTTS) as xtts:
        with pytest.raises(InvalidRequest) as refused:
            await spoken(runtime, XTTS, xtts, "Hello. ω²")
        assert refused.value.param == "input"


async def test_other_requests_are_refused(runtime: CoquiRuntime) -> None:
    request = ImageRequest(model="m", operation=ImageOperation.GENERATION, request_id="test")
    with pytest.raises(InvalidRequest) as refused:
        runtime.prepare(VITS, request)
    assert refused.value.param == "model"


@pytest.mark.parametrize(
    ("language", "spoken_as"), [("en-GB", "en"), ("de", "de"), (None, "en"), ("pt_BR", "pt")]
)
async def test_regions_of_a_language(
    runtime: CoquiRuntime, language: str | None, spoken_as: str
) -> None:
    prepared = runtime.prepare(XTTS, speech_request(language=language))
    assert prepared.payload.language == spoken_as


async def test_a_recording_that_is_none(runtime: CoquiRuntime, tmp_path: Path) -> None:
    path = tmp_path / "sample.wav"
    path.write_bytes(b"no sound")
    async with loaded(runtime, XTTS) as xtts:
        with pytest.raises(InvalidRequest) as refused:
            await spoken(runtime, XTTS, xtts, voice_sample=path)
        assert refused.value.param == "voice"


async def test_voices(runtime: CoquiRuntime) -> None:
    assert runtime.voices(VITS) == (Voice("default", "default", "en"),)
    assert [voice.id for voice in runtime.voices(MULTI)] == ["p225", "p226", "p227"]
    assert [voice.id for voice in runtime.voices(XTTS)] == ["Claribel Dervla", "Damien Black"]
    assert {voice.language for voice in runtime.voices(XTTS)} == {None}


@pytest.mark.parametrize("model", [VITS, MULTI, XTTS], ids=lambda model: model.id)
async def test_the_estimate_is_what_is_measured(runtime: CoquiRuntime, model: ModelConfig) -> None:
    estimated = {block.name: block.nbytes for block in runtime.estimate(model).blocks}
    async with loaded(runtime, model) as made:
        measured = {block.name: block.nbytes for block in made.blocks()}
    assert sum(measured.values()) == pytest.approx(sum(estimated.values()), rel=0.05)
    assert max(measured, key=lambda name: measured[name]) in estimated
    (file,) = runtime.weight_files(model)
    assert file.name in ("model_file.pth", "model.pth")


async def test_a_folder_trained_elsewhere(
    runtime: CoquiRuntime, cache_dir: Path, tmp_path: Path
) -> None:
    """Absolute paths of another machine in `config.json` are names in the folder."""
    folder = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-vits-multi", cache_dir), folder)
    config = json.loads((folder / "config.json").read_text())
    for section in (config, config["model_args"]):
        section["speakers_file"] = "/home/trainer/run-1/speakers.json"
        section["speaker_encoder_model_path"] = "/home/trainer/encoder.pth"
    (folder / "config.json").write_text(json.dumps(config))

    def digests() -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
        }

    before = digests()
    model = MULTI.model_copy(update={"source": str(folder), "id": "elsewhere"})
    async with loaded(runtime, MULTI) as vits:
        expected = whole(await spoken(runtime, MULTI, vits))
    async with loaded(runtime, model) as vits:
        np.testing.assert_array_equal(whole(await spoken(runtime, model, vits)), expected)
    assert digests() == before

    (folder / "speakers.json").unlink()
    with pytest.raises(LoadFailed, match=r"speakers\.json"):
        runtime.estimate(model)


class Trap:
    """Unpickled with code allowed, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.pth", "speakers_xtts.pth"])
async def test_a_checkpoint_with_code_in_it_is_refused(
    runtime: CoquiRuntime, cache_dir: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-xtts", cache_dir), folder)
    torch.save({"model": {}, "trap": Trap(tmp_path / "executed")}, folder / name)
    model = XTTS.model_copy(update={"source": str(folder), "id": "trap"})
    with pytest.raises(LoadFailed, match=name):
        runtime.estimate(model)
    with pytest.raises(LoadFailed, match=name):
        await runtime.load(model, pytest.fail)
    assert not (tmp_path / "executed").exists()


async def test_an_old_xtts_checkpoint_is_read_and_left_alone(
    runtime: CoquiRuntime, cache_dir: Path, tmp_path: Path
) -> None:
    """XTTS v2 as released holds its configuration as objects of a module that they have left."""
    from TTS.config import load_config
    from TTS.tts.configs.xtts_config import XttsArgs, XttsAudioConfig

    folder = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-xtts", cache_dir), folder)
    checkpoint = torch.load(folder / "model.pth", weights_only=True)
    checkpoint["config"] = load_config(folder / "config.json")
    places = {kind: kind.__module__ for kind in (XttsArgs, XttsAudioConfig)}
    try:
        for kind in places:
            kind.__module__ = "TTS.tts.models.xtts"
        torch.save(checkpoint, folder / "model.pth")
    finally:
        for kind, place in places.items():
            kind.__module__ = place
    before = (folder / "model.pth").read_bytes()
    model = XTTS.model_copy(update={"source": str(folder), "id": "old"})
    assert runtime.estimate(model).nbytes == runtime.estimate(XTTS).nbytes
    async with loaded(runtime, XTTS) as xtts:
        expected = whole(await spoken(runtime, XTTS, xtts, "Hello there."))
    async with loaded(runtime, model) as xtts:
        found = whole(await spoken(runtime, model, xtts, "Hello there."))
        np.testing.assert_array_equal(found, expected)
    assert (folder / "model.pth").read_bytes() == before


@pytest.mark.parametrize(
    "damage", ["config.json", "model_file.pth", "no model", "tacotron", "wrong weights"]
)
async def test_a_damaged_folder_says_so(
    runtime: CoquiRuntime, cache_dir: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-vits", cache_dir), folder)
    if damage == "no model":
        (folder / "model_file.pth").unlink()
    elif damage == "tacotron":
        (folder / "config.json").write_text('{"model": "tacotron2"}')
    elif damage == "wrong weights":
        torch.save({"model": {"flow.weight": torch.zeros(2)}}, folder / "model_file.pth")
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:1000])
    model = VITS.model_copy(update={"source": str(folder), "id": "damaged"})
    with pytest.raises(LoadFailed):
        await runtime.load(model, pytest.fail)


async def test_a_request_before_the_files_are_here(tmp_path: Path) -> None:
    """What needs them is checked when they are."""
    runtime = CoquiRuntime(RuntimeContext(CpuDevice(), tmp_path))
    prepared = runtime.prepare(MULTI, speech_request())
    wrong = runtime.prepare(MULTI, speech_request(voice="p999"))
    async with loaded(runtime, MULTI) as vits:
        early = [event async for event in vits.run(prepared)]
        assert len(early) == 3
        with pytest.raises(InvalidRequest) as refused:
            [event async for event in vits.run(wrong)]
        assert refused.value.param == "voice"


async def test_a_sentence_with_too_many_tokens_is_spoken_in_pieces(
    runtime: CoquiRuntime,
) -> None:
    """Digits become words: 50 characters are more tokens than XTTS takes at once."""
    numbers = " ".join(["7777777"] * 6)
    async with loaded(runtime, XTTS) as xtts:
        assert xtts.model is not None
        tokens = xtts.model.module.tokenizer.encode(numbers, lang="en")
        assert len(tokens) >= xtts.model.module.args.gpt_max_text_tokens
        assert await spoken(runtime, XTTS, xtts, numbers)


async def test_the_licence_is_told_and_the_library_is_silent(
    runtime: CoquiRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    async with loaded(runtime, XTTS):
        assert "non-commercial" in caplog.text
    trainer = logging.getLogger("trainer")
    assert not trainer.handlers and trainer.propagate
    assert logging.getLogger("TTS.tts").getEffectiveLevel() == logging.ERROR


@pytest.mark.parametrize("name", ["tiny-vits", "tiny-vits-multi", "tiny-xtts"])
async def test_a_starter_is_written_the_same_twice(
    cache_dir: Path, tmp_path: Path, name: str
) -> None:
    first, second = (ensure_starter(name, each) for each in (cache_dir, tmp_path))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
