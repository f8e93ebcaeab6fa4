"""Real Pocket TTS in this process, beside bare calls of the library."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import yaml
from numpy.typing import NDArray

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.events import WorkingMemory
from engine.files.hub.listing import Listing
from engine.files.hub.repository import Repository
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.process.heap import freeze_heap
from engine.process.torch_state import share_torch_state
from engine.runtimes.base import RuntimeContext, Voice
from engine.runtimes.pocket_tts import files as pocket_files
from engine.runtimes.pocket_tts.files import config_names, hub_sources, library_config, named_places
from engine.runtimes.pocket_tts.options import PocketOptions
from engine.runtimes.pocket_tts.runtime import PocketRuntime
from engine.runtimes.pocket_tts.working_memory import CHUNK_TOKENS, speech_bytes
from engine.starters.registry import ensure_starter
from tests.engine.runtimes.common.speaking import (
    SEED,
    TEXT,
    Stop,
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

POCKET = speech_model("pocket_tts", "tiny-pocket-tts", voices={"alloy": "alba"}, language="en")
FRAME = 1920
"""Samples of 80 ms."""

KYUTAI = "kyutai/pocket-tts"


def changed(model_id: str, source: str | Path = POCKET.source, **options: Any) -> ModelConfig:
    """The same model with other options, or from another folder."""
    return POCKET.model_copy(
        update={"id": model_id, "source": str(source), "options": {**POCKET.options, **options}}
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runtime(cache_dir: Path) -> PocketRuntime:
    threads = torch.get_num_threads()
    made = PocketRuntime(RuntimeContext(CpuDevice(), cache_dir))
    made.start()
    assert torch.get_num_threads() == threads
    share_torch_state()
    freeze_heap()
    ensure_starter("tiny-pocket-tts", cache_dir)
    return made


@pytest.fixture
def folder(cache_dir: Path, tmp_path: Path) -> Path:
    """A copy of the starter that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-pocket-tts", cache_dir), copy)
    return copy


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("voices") / "sample.wav"
    write_recording(path)
    return path


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Any:
    """The library alone, as its documentation says to use it, but one frame at a time."""
    from pocket_tts import TTSModel

    before = Path.cwd()
    os.chdir(ensure_starter("tiny-pocket-tts", cache_dir))  # the paths in it are relative
    try:
        with GATE.exclusive():
            model = TTSModel.load_model(config="config.yaml")
    finally:
        os.chdir(before)
    model.max_decoder_frames_per_call = 1
    return model


def said_by(library: Any, voice: Path, text: str) -> NDArray[np.float32]:
    torch.manual_seed(SEED)
    found: NDArray[np.float32] = library.generate_audio(
        library.get_state_for_audio_prompt(voice), text
    ).numpy()
    return found


def whole(pieces: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(pieces)


async def test_speech_equals_that_of_the_library_alone(
    runtime: PocketRuntime, cache_dir: Path, library: Any
) -> None:
    """But for the order of sums, which memory and the number of frames at once decide."""
    states = ensure_starter("tiny-pocket-tts", cache_dir) / "embeddings"
    expected = said_by(library, states / "marius.safetensors", TEXT)
    assert expected.std() > 0.005 and len(expected) % FRAME == 0
    single = changed("single", stream_frames=1)
    state = torch.get_rng_state()
    async with loaded(runtime, single) as pocket:
        pieces = await spoken(runtime, single, pocket, voice="marius")
        assert {len(piece) for piece in pieces} == {FRAME}
        np.testing.assert_allclose(whole(pieces), expected, atol=1e-5)
    async with loaded(runtime, POCKET) as pocket:
        pieces = await spoken(runtime, POCKET, pocket, voice="marius")
        assert [len(piece) // FRAME for piece in pieces[:3]] == [1, 4, 4]
        np.testing.assert_allclose(whole(pieces), expected, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator"


async def test_seed_voice_and_temperature_matter(runtime: PocketRuntime) -> None:
    text = "Hello world."
    async with loaded(runtime, POCKET) as pocket:
        usual, default, alias, seed, voice = [
            whole(await spoken(runtime, POCKET, pocket, text, **fields))
            for fields in (
                {"voice": "alba"},
                {},
                {"voice": "alloy"},
                {"seed": SEED + 1},
                {"voice": "marius"},
            )
        ]
    cold = changed("cold", temperature=0)
    async with loaded(runtime, cold) as pocket:
        first, second = [
            whole(await spoken(runtime, cold, pocket, text, seed=each)) for each in (1, 2)
        ]
    for same, other in ((usual, default), (usual, alias), (first, second)):
        np.testing.assert_array_equal(same, other)
    for other in (seed, voice, first):
        assert other.shape != usual.shape or (other != usual).any()


async def test_a_clone_equals_that_of_the_library_alone(
    runtime: PocketRuntime, library: Any, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocket_tts.data.audio import audio_read
    from pocket_tts.modules.attention import _CAUSAL_MASK_CACHE

    from engine.runtimes.pocket_tts import model as pocket_model

    expected = said_by(library, recording, "Hello there.")
    single = changed("single", stream_frames=1)
    read = []

    def counted(path: Path) -> Any:
        read.append(path)
        return audio_read(path)

    monkeypatch.setattr(pocket_model, "audio_read", counted)
    async with loaded(runtime, single) as pocket:
        for _ in range(2):
            found = await spoken(runtime, single, pocket, "Hello there.", voice_sample=recording)
            np.testing.assert_allclose(whole(found), expected, atol=1e-5)
        assert len(read) == 1, "what it heard was kept"
        assert not _CAUSAL_MASK_CACHE
        os.utime(recording, (1, 1))
        await spoken(runtime, single, pocket, "Hello there.", voice_sample=recording)
        assert len(read) == 2, "another file under the same name is another voice"
        recording.with_name("none.wav").write_bytes(b"no sound")
        with pytest.raises(InvalidRequest) as refused:
            await spoken(runtime, single, pocket, voice_sample=recording.with_name("none.wav"))
        assert refused.value.param == "voice"


async def test_working_memory_is_estimated_and_measured(
    runtime: PocketRuntime, recording: Path
) -> None:
    async with loaded(runtime, POCKET) as pocket:
        for fields in ({}, {"voice_sample": recording}):
            prepared = runtime.prepare(POCKET, speech_request(TEXT, **fields))
            events = [event async for event in pocket.run(prepared)]
            (measured,) = [each.nbytes for each in events if isinstance(each, WorkingMemory)]
            assert measured / 2 <= prepared.working_bytes <= 4 * measured


async def test_weights_that_cannot_clone(
    runtime: PocketRuntime, cache_dir: Path, tmp_path: Path, recording: Path
) -> None:
    """Neither hear recordings nor keep the parts for it. Their name says so, or the options."""
    copy = tmp_path / "tiny-without-voice-cloning"
    shutil.copytree(ensure_starter("tiny-pocket-tts", cache_dir), copy)
    named, told = changed("named", copy), changed("told", voice_cloning=False)
    async with loaded(runtime, POCKET) as pocket:
        usual = await spoken(runtime, POCKET, pocket, "Hi!")
        whole_bytes = sum(block.nbytes for block in pocket.blocks())
    for model in (named, told):
        with pytest.raises(InvalidRequest) as refused:
            runtime.prepare(model, speech_request(voice_sample=recording))
        assert refused.value.param == "voice"
        async with loaded(runtime, model) as pocket:
            np.testing.assert_array_equal(
                whole(await spoken(runtime, model, pocket, "Hi!")), whole(usual)
            )
            measured = {block.name: block.nbytes for block in pocket.blocks()}
            estimated = {block.name: block.nbytes for block in runtime.estimate(model).blocks}
            assert measured.keys() == estimated.keys() == {"flow_lm", "mimi"}
            for name, nbytes in measured.items():
                assert estimated[name] == pytest.approx(nbytes, rel=0.05)
            assert sum(measured.values()) < 0.95 * whole_bytes


async def test_audio_comes_before_the_rest_is_made_and_a_stop_comes_at_once(
    runtime: PocketRuntime,
) -> None:
    async with loaded(runtime, POCKET) as pocket:
        expected = whole(await spoken(runtime, POCKET, pocket))
        assert pocket.model is not None
        module = pocket.model.module
        events = pocket.run(runtime.prepare(POCKET, speech_request()))
        made: list[None] = []
        counting = module.flow_lm.flow_net.register_forward_hook(lambda *_: made.append(None))
        held: list[Stop] = []

        def hold_next(*_: Any) -> None:
            # The second frame is in the making once the first was decoded.
            if not held:
                held.append(Stop(module.flow_lm.transformer, module.mimi.decoder))

        decoded = module.mimi.decoder.register_forward_hook(hold_next)
        first = await anext(events)
        assert len(first.samples) == FRAME  # type: ignore[union-attr]
        while not held[0].reached.is_set():
            await asyncio.to_thread(held[0].reached.wait, 20)
        frames = len(made)
        closing = asyncio.ensure_future(events.aclose())
        await asyncio.sleep(0)  # lets the end arrive, which tells the run to stop
        held[0].release()
        await closing
        assert frames == 2, "the text gives one as well"
        assert len(made) == frames and not held[0].later
        for hook in (counting, decoded, held[0]):
            hook.remove()
        np.testing.assert_array_equal(whole(await spoken(runtime, POCKET, pocket)), expected)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": " \n… ?!"}, "input"),
        ({"text": "x" * 5000}, "input"),
        ({"text": "Hello 你好"}, "input"),
        ({"voice": "nobody"}, "voice"),
        ({"voice_sample": Path("/nowhere/sample.wav")}, "voice"),
        ({"language": "de"}, "language"),
        ({"speed": 1.5}, "speed"),
        ({"seed": -1}, "seed"),
    ],
)
async def test_what_is_refused_before_anything_is_loaded(
    runtime: PocketRuntime, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        runtime.prepare(POCKET, speech_request(**fields))
    assert refused.value.param == param


async def test_what_only_the_loaded_model_can_refuse(runtime: PocketRuntime, folder: Path) -> None:
    model = changed("damaged", folder)
    state = folder / "embeddings" / "alba.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    async with loaded(runtime, model) as pocket:
        for text, param in (("Hello. ω²", "input"), ("Hello.", "voice")):
            with pytest.raises(InvalidRequest) as refused:
                await spoken(runtime, model, pocket, text)
            assert refused.value.param == param
        assert await spoken(runtime, model, pocket, "Hello.", voice="marius")


async def test_text_without_punctuation_is_cut(runtime: PocketRuntime) -> None:
    """The library would leave words out."""
    async with loaded(runtime, POCKET) as pocket:
        assert pocket.model is not None
        words = "one two three four five six seven " * 6
        chunks = list(pocket.model._chunks(words, "en"))  # type: ignore[attr-defined]
        tokenizer = pocket.model.module.flow_lm.conditioner.tokenizer
        assert max(len(tokenizer.encode(chunk)) for chunk in chunks) <= CHUNK_TOKENS
        assert " ".join(chunks).lower().rstrip(".").split() == words.split()


async def test_the_folder_of_a_model(
    runtime: PocketRuntime, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its voices; and nothing is asked of a hub, whatever its configuration says."""
    from pocket_tts.utils import utils

    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["weights_path"] = f"hf://{KYUTAI}/languages/english/model.safetensors@main"
    config["flow_lm"]["lookup_table"]["tokenizer_path"] = f"hf://{KYUTAI}/tokenizer.json@main"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(utils, "hf_hub_download", pytest.fail)
    monkeypatch.setattr(utils.requests, "get", pytest.fail)
    model = changed("elsewhere", folder)
    assert runtime.voices(model) == (Voice("alba", "alba", "en"), Voice("marius", "marius", "en"))
    async with loaded(runtime, model) as pocket:
        assert await spoken(runtime, model, pocket, "Hi!")
    # The layout of Kyutai's repositories, under a name of the library's.
    italian = library_config("italian")
    table = {
        **config["flow_lm"]["lookup_table"],
        "tokenizer_path": italian["flow_lm"]["lookup_table"]["tokenizer_path"],
    }
    tiny = {
        **config,
        "weights_path": italian["weights_path"],
        "flow_lm": {**config["flow_lm"], "lookup_table": table},
    }
    below = folder / "languages" / "italian"
    shutil.copytree(folder / "embeddings", below / "embeddings")
    (below / "embeddings" / "marius.safetensors").rename(below / "embeddings/giovanni.safetensors")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(below / name)
    monkeypatch.setattr(pocket_files, "library_config", lambda _: tiny)
    model = changed("italian", folder, config="italian", language=None)
    assert [voice.id for voice in runtime.voices(model)] == ["giovanni", "alba"]
    assert runtime.prepare(model, speech_request()).payload.language == "it"
    async with loaded(runtime, model) as pocket:
        assert await spoken(runtime, model, pocket, "Hi!")


@pytest.mark.parametrize(
    "damage", ["truncated", "a weight less", "no config", "no tokenizer", "no mapping"]
)
async def test_a_damaged_folder_says_so(runtime: PocketRuntime, folder: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:10_000])
    elif damage == "no mapping":
        (folder / "config.yaml").write_text("[1, 2]")
    elif damage.startswith("no "):
        (folder / {"no config": "config.yaml"}.get(damage, "tokenizer.json")).unlink()
    else:
        tensors = load_file(path)
        del tensors["flow_lm.out_eos.bias"]
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LoadFailed):
        await runtime.load(changed("damaged", folder), pytest.fail)


def of_kyutai(name: str, repo: str = KYUTAI, **options: Any) -> ModelConfig:
    return ModelConfig(
        id=name,
        runtime="pocket_tts",
        task="speech",
        source=repo,
        options={"config": name, **options},
    )


async def test_what_is_fetched_is_what_the_library_names(runtime: PocketRuntime) -> None:
    from pocket_tts.default_parameters import get_default_voice_for_language
    from pocket_tts.utils.utils import get_predefined_voice

    names = config_names()
    assert len(names) >= 24 and "english" in names
    for name in names:
        config = library_config(name)
        places = named_places(KYUTAI, PocketOptions(), name)
        weights, tokenizer = (
            f"hf://{each.source}/{each.path}@{each.revision}"
            for each in (places.weights, places.tokenizer)
        )
        assert weights == config["weights_path"]
        assert tokenizer == config["flow_lm"]["lookup_table"]["tokenizer_path"]
        language, voice = pocket_files.LANGUAGES[pocket_files.config_language(name)]
        assert voice == get_default_voice_for_language(name) and len(language) == 2
        assert get_predefined_voice(name, voice) == (
            f"hf://{places.voices.source}/{places.voices.path}/{voice}.safetensors"
            f"@{places.voices.revision}"
        )
        assert 2**20 < speech_bytes(config, CHUNK_TOKENS, 4) < 2**29
    free = of_kyutai("english", pocket_files.VOICES_REPO)
    both, tokenizer_source = hub_sources(free)
    assert both.repo == tokenizer_source.repo == free.source
    assert both.patterns == (
        "languages/english/model.safetensors",
        "languages/english/embeddings/*.safetensors",
    )
    assert tokenizer_source.patterns == ("languages/english/tokenizer.json",)
    mirror = hub_sources(of_kyutai("english", "someone/copy", revision="v2"))
    assert [(each.repo, each.revision) for each in mirror[:1]] == [("someone/copy", "v2")]
    PocketRuntime.check(free)
    with pytest.raises(ValueError, match=r"options.config: pocket-tts has no model 'klingon'"):
        PocketRuntime.check(of_kyutai("klingon"))
    # Without the files, a request is checked as far as it can be.
    assert runtime.prepare(free, speech_request()).payload is None


async def test_a_repository_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def repository(*paths: str) -> Repository:
        found = Repository(Listing("someone/model", "main", "c0ffee", ()))
        found.__dict__["paths"] = frozenset(paths)
        return found

    found = PocketRuntime.recognise(repository("languages/english/model.safetensors"))
    assert found is not None and found.options == {"config": "english"}
    own = ("config.yaml", "model.safetensors")
    for text, recognised in (("flow_lm:\n", True), ("model:\n", False)):
        monkeypatch.setattr(Repository, "text", lambda *_, text=text: text)
        found = PocketRuntime.recognise(repository(*own))
        assert (found is not None) == recognised
        assert found is None or not found.options
    assert PocketRuntime.recognise(repository("config.json", "model.safetensors")) is None


async def test_the_starter_is_written_the_same_twice(cache_dir: Path, tmp_path: Path) -> None:
    first, second = (ensure_starter("tiny-pocket-tts", each) for each in (cache_dir, tmp_path))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) == 6
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
