"""Real Kokoro models in this process, each beside a bare call of the library."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from kokoro import KModel, KPipeline
from misaki import en
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import ConfigError, InvalidRequest, LoadFailed
from engine.events import Speech, WorkingMemory
from engine.media.sentences import split_sentences
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.requests import SpeechRequest
from engine.runtimes.base import RuntimeContext
from engine.runtimes.kokoro.languages import find_language
from engine.runtimes.kokoro.options import KokoroOptions
from engine.runtimes.kokoro.phonemes import MAX_PHONEMES, Phonemizer
from engine.runtimes.kokoro.runtime import KokoroModel, KokoroRuntime
from engine.runtimes.kokoro.tagger import tag_english
from engine.runtimes.kokoro.voices import OPENAI_VOICES, parse_blend
from engine.starters.registry import ensure_starter

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

TEXT = "It costs $3.50. Dr. Smith left!"
RATE = 24_000


@pytest.fixture(scope="module")
def folder(cache_dir: Path) -> Path:
    return ensure_starter("tiny-kokoro", cache_dir)


@pytest.fixture(scope="module")
def phonemizer() -> Phonemizer:
    return Phonemizer()


@pytest.fixture(scope="module")
def bare(folder: Path) -> Any:
    """The library's own model, as its documentation says to make it."""
    with GATE.exclusive():
        return load_bare(folder)


def load_bare(folder: Path) -> Any:
    model = KModel(
        repo_id="hexgrad/Kokoro-82M",
        config=str(folder / "config.json"),
        model=str(folder / "kokoro-v1_0.pth"),
    )
    return model.eval()


def kokoro(model_id: str, source: str = "starter:tiny-kokoro", **options: Any) -> ModelConfig:
    return ModelConfig(id=model_id, runtime="kokoro", task="speech", source=source, options=options)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    config = EngineConfig(
        device="cpu",
        memory="600MiB",
        cache_dir=cache_dir,
        state_dir=tmp_path_factory.mktemp("state"),
        models=(
            kokoro("tts"),
            kokoro(
                "own",
                voice="both",
                voices={"both": "af_heart+am_adam", "alloy": "bf_emma"},
                max_chars=20,
            ),
        ),
    )
    engine = Engine(config, device=CpuDevice(), runtimes={"kokoro": KokoroRuntime})
    await engine.start()
    yield engine
    await engine.stop()


def speech_request(text: str = TEXT, model: str = "tts", **fields: Any) -> SpeechRequest:
    return SpeechRequest(**{"model": model, "text": text, "request_id": "test", **fields})


async def speeches(engine: Engine, text: str = TEXT, **fields: Any) -> list[Speech]:
    session = await engine.open(speech_request(text, **fields))
    found = [event async for event in session.events()]
    assert all(isinstance(event, Speech) for event in found)
    return [event for event in found if isinstance(event, Speech)]


async def samples(engine: Engine, text: str = TEXT, **fields: Any) -> NDArray[np.float32]:
    return np.concatenate([each.samples for each in await speeches(engine, text, **fields)])


def style(folder: Path, *voices: str) -> Any:
    return KPipeline.load_voice(
        Voices(), ",".join(str(folder / "voices" / f"{voice}.pt") for voice in voices)
    )


class Voices(KPipeline):  # type: ignore[misc]
    """The library's pipeline for its voices alone: its constructor downloads a tagger."""

    def __init__(self) -> None:
        self.voices: dict[str, Any] = {}


def spoken(
    model: Any, phonemes: list[str], pack: Any, *, speed: float = 1.0, seed: int = 0
) -> NDArray[np.float32]:
    """The bare library, one text after the other."""
    torch.manual_seed(seed)
    parts = [model(each, pack[len(each) - 1], speed).numpy() for each in phonemes]
    return np.concatenate(parts)


def phonemes_of(phonemizer: Phonemizer, text: str, language: str = "en-us") -> list[str]:
    return [
        chunk.phonemes
        for sentence in split_sentences(text, language, max_chars=400)
        for chunk in phonemizer.chunks(sentence, language)
    ]


async def test_speech_equals_that_of_the_library_alone(
    engine: Engine, folder: Path, bare: Any
) -> None:
    sentences = ["ˌɪt kˈɔsts θɹˈi dˈɑləɹz ænd fˈɪfti sˈɛnts.", "dˈɑktəɹ smˈɪθ lˈɛft!"]
    expected = spoken(bare, sentences, style(folder, "af_heart"))
    assert expected.std() > 0.01
    found = await speeches(engine)
    assert len(found) == 2 and {each.sample_rate for each in found} == {RATE}
    assert found[0].samples.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([each.samples for each in found]), expected)
    # Nobody's draws change it, nor does it change what others draw.
    torch.manual_seed(5)
    undisturbed = torch.get_rng_state()
    np.testing.assert_array_equal(await samples(engine), expected)
    assert torch.equal(torch.get_rng_state(), undisturbed)
    await engine.unload("tts")
    np.testing.assert_array_equal(await samples(engine), expected)
    noise = await samples(engine, seed=1)
    assert (noise != expected).any()
    other = spoken(bare, sentences, style(folder, "af_heart"), seed=1)
    np.testing.assert_array_equal(noise, other)


async def test_another_language_equals_the_pipeline_of_the_library(
    engine: Engine, folder: Path, bare: Any
) -> None:
    text = ["Hola Sr. García.", "¿Cómo estás?"]
    pipeline = KPipeline(lang_code="e", repo_id="hexgrad/Kokoro-82M", model=bare)
    torch.manual_seed(0)
    voice = str(folder / "voices" / "ef_dora.pt")
    expected = [result.audio.numpy() for result in pipeline(text, voice=voice)]
    found = await samples(engine, " ".join(text), voice="ef_dora")
    np.testing.assert_array_equal(found, np.concatenate(expected))
    # A language that the voice does not have by itself.
    asked = await samples(engine, " ".join(text), voice="af_heart", language="es")
    other = [result.audio.numpy() for result in pipeline(text, voice=voice)]
    assert len(asked) and (len(asked) != len(other) or (asked != np.concatenate(other)).any())


async def test_blends_are_means_of_styles(engine: Engine, folder: Path, bare: Any) -> None:
    words = "hˈI ðˈɛɹ."
    one, other = style(folder, "af_heart"), style(folder, "af_bella")
    expected = spoken(bare, [words], style(folder, "af_heart", "af_bella"))
    text = "Hi there."
    np.testing.assert_array_equal(await samples(engine, text, voice="af_heart+af_bella"), expected)
    weighted = await samples(engine, text, voice="af_heart(2)+af_bella(1)")
    wanted = spoken(bare, [words], (2 * one + other) / 3)
    assert len(weighted) == len(wanted)
    np.testing.assert_allclose(weighted, wanted, atol=1e-3)
    assert len(weighted) != len(expected) or np.abs(weighted - expected).max() > 1e-2


async def test_names_of_voices(engine: Engine) -> None:
    text = "Hi there."
    np.testing.assert_array_equal(
        await samples(engine, text, voice="nova"), await samples(engine, text, voice="af_nova")
    )
    own = await samples(engine, text, model="own")
    both = await samples(engine, text, voice="af_heart+am_adam")
    np.testing.assert_array_equal(own, both)
    emma = await samples(engine, text, voice="bf_emma")
    np.testing.assert_array_equal(await samples(engine, text, model="own", voice="alloy"), emma)
    assert len(emma) != len(both) or (emma != both).any()


async def test_voices_are_listed(cache_dir: Path, folder: Path, tmp_path: Path) -> None:
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), cache_dir))
    model = kokoro("tts", voices={"both": "af_heart+am_adam", "gone": "af_nobody"})
    found = {voice.id: voice for voice in runtime.voices(model)}
    assert found["af_heart"].name == "Heart" and found["af_heart"].language == "en-us"
    assert found["bf_emma"].language == "en-gb" and found["ff_siwis"].language == "fr-fr"
    assert found["both"].name == "Both (af_heart+am_adam)" and "gone" not in found
    assert set(OPENAI_VOICES) <= found.keys()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadFailed, match="no voice"):
        runtime.voices(kokoro("tts", source=str(tmp_path)))
    await runtime.stop()


async def test_speed_changes_the_duration(engine: Engine) -> None:
    text = "One two three four."
    normal, slow, fast = [
        len(await samples(engine, text, speed=speed)) for speed in (1.0, 0.5, 2.0)
    ]
    assert slow / normal == pytest.approx(2, rel=0.25)
    assert fast / normal == pytest.approx(0.5, rel=0.25)


async def test_words_are_timed_from_the_beginning(engine: Engine) -> None:
    text = "Good morning, dear friends. Dr. Smith has $3.50."
    found = await speeches(engine, text, word_times=True)
    words = [word for each in found for word in each.words]
    spelled = ["Good", "morning", "dear", "friends", "Dr.", "Smith", "has", "3.50"]
    assert [word.text for word in words] == spelled
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times) and times[0] >= 0 and len(set(times)) > len(words)
    first_s = len(found[0].samples) / RATE
    total_s = sum(len(each.samples) for each in found) / RATE
    assert words[3].end_s <= first_s <= words[4].start_s
    assert words[-1].end_s <= total_s
    assert [each.words for each in await speeches(engine, text)] == [(), ()]


@pytest.mark.parametrize(
    ("text", "phonemes"),
    [
        ("It costs $3.50.", "ˌɪt kˈɔsts θɹˈi dˈɑləɹz ænd fˈɪfti sˈɛnts."),
        ("Dr. Smith", "dˈɑktəɹ smˈɪθ"),
        ("In 1999", "ɪn nˌIntˈin nˈIndi nˈIn"),
        ("£5 million", "fˈIv mˈɪljᵊn pˈWndz"),
        ("the 3rd of 12,345", "ðə θˈɜɹd ʌv twˈɛlv θˈWzᵊnd θɹˈi hˈʌndɹəd fˈɔɹTi fˈIv"),
        ("25% off", "twˈɛnti fˈIv pəɹsˈɛnt ˈɔf"),
        ("Mr. & Mrs. Lee vs. Kim", "mˈɪstəɹ ænd mˈɪsɪz lˈi vˈɜɹsəs kˈɪm"),
        ("The US told us", "ðə jˌuˈɛs tˈOld ˌʌs"),
        ("well-known", "wˌɛlnˈOn"),
        ("[Kokoro](/kˈOkəɹO/) speaks", "kˈOkəɹO spˈiks"),
        ("Oh, *well*", "ˈO, wˈɛl"),
        ("1" * 20, " ".join(["wˈʌn"] * 20)),
    ],
)
async def test_english_phonemes(phonemizer: Phonemizer, text: str, phonemes: str) -> None:
    assert phonemes_of(phonemizer, text) == [phonemes]


@pytest.mark.parametrize("british", [False, True])
async def test_the_lexicon_is_the_librarys(phonemizer: Phonemizer, british: bool) -> None:
    ours = phonemizer._english["en-gb" if british else "en-us"].lexicon
    assert vars(ours) == vars(en.Lexicon(british))


async def test_words_of_two_pronunciations(phonemizer: Phonemizer) -> None:
    assert phonemes_of(phonemizer, "to use the use") == ["tə jˈuz ðə jˈus"]
    assert phonemes_of(phonemizer, "They record a record") == ["ðˌA ɹəkˈɔɹd ɐ ɹˈɛkəɹd"]
    assert phonemes_of(phonemizer, "I have never read it") == ["ˌI hæv nˈɛvəɹ ɹˈɛd ɪt"]
    assert phonemes_of(phonemizer, "He wants to read") == ["hˌi wˈɑnts tə ɹˈid"]
    assert phonemes_of(phonemizer, "We live for live music") == ["wˌi lˈɪv fɔɹ lˈIv mjˈuzɪk"]


async def test_british_and_other_languages(phonemizer: Phonemizer) -> None:
    text = "the schedule"
    american, british = (phonemes_of(phonemizer, text, each)[0] for each in ("en-us", "en-gb"))
    assert british == "ðə ʃˈɛdjuːl" and american == "ðə skˈɛʤˌul"
    assert phonemes_of(phonemizer, "Bonjour, 1999.", "fr-fr")[0].startswith("bɔ̃ʒˈuʁ, mil")
    for language, word in (("es", "hola"), ("hi", "नमस्ते"), ("it", "ciao"), ("pt-br", "olá")):
        assert len(phonemes_of(phonemizer, word, language)[0]) >= 4


@pytest.mark.parametrize("language", ["en-us", "en-gb", "es"])
@pytest.mark.parametrize("text", ["9" * 400, "word " * 300, "77,777 " * 50, "1.5" * 130])
async def test_nothing_is_cut_off(phonemizer: Phonemizer, text: str, language: str) -> None:
    found = phonemes_of(phonemizer, text, language)
    assert all(0 < len(phonemes) <= MAX_PHONEMES for phonemes in found)
    alone = phonemes_of(phonemizer, text[:40], language)
    assert sum(map(len, found)) > 0.8 * len(alone[0]) * len(text) / 40


async def test_tags() -> None:
    def tags(text: str) -> list[str]:
        return tag_english(text.split(), [True] * len(text.split()))

    assert tags('" Go " , he said') == ["``", "NN", "''", ",", "PRP", "VBP"]
    assert tags("GIVE IT TO US") == ["VB", "PRP", "TO", "PRP"]
    assert tags("Give it to US now") == ["VB", "PRP", "TO", "NNP", "RB"]
    assert tags("It was closed by www.example.com in Paris") == [
        *("PRP", "VBD", "VBN", "IN", "ADD", "IN", "NNP")
    ]
    assert tag_english(["well", "-", "known"], [False, False, False])[1] == "HYPH"
    assert tag_english(["yes", "-", "no"], [True, True, False])[1] == ":"


BAD = [
    ({"text": ""}, "input"),
    ({"text": " \n..."}, "input"),
    ({"text": "a" * 5000}, "input"),
    ({"speed": 0.0}, "speed"),
    ({"speed": 4.5}, "speed"),
    ({"speed": float("nan")}, "speed"),
    ({"voice": "af_nobody"}, "voice"),
    ({"voice": "../af_heart"}, "voice"),
    ({"voice": "af_heart(0)"}, "voice"),
    ({"voice": "af_heart+"}, "voice"),
    ({"voice": "+".join(["af_heart"] * 9)}, "voice"),
    ({"voice_sample": Path("/tmp/none.wav")}, "voice"),
    ({"language": "ja"}, "language"),
    ({"language": "zh-cn"}, "language"),
    ({"language": "tlh"}, "language"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
async def test_bad_requests(engine: Engine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await engine.open(speech_request(**fields))
    assert caught.value.param == param
    if param == "voice" and "nobody" in str(fields):
        assert "af_bella" in caught.value.message


FOREIGN = [
    ({"text": "你好世界。"}, "misaki\\[zh\\]"),
    ({"text": "Hello 日本 there"}, "voices of ja and zh"),
    ({"text": "こんにちは"}, "voices of ja speak it"),
    ({"text": "Привет, мир!"}, "No voice"),
    ({"text": "สวัสดี"}, "No voice"),
    ({"text": "hola 你好", "language": "es"}, "speaks es"),
]


@pytest.mark.parametrize(("fields", "said"), FOREIGN)
async def test_a_script_that_the_voice_would_spell_is_refused(
    engine: Engine, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        engine.prepare(speech_request(**fields))
    assert caught.value.param == "input"


@pytest.mark.parametrize("text", ["안녕", "The word नमस्ते is Hindi", "π and Ω", "café №5 x²"])
async def test_marks_of_another_language_are_not_spoken(
    engine: Engine, phonemizer: Phonemizer, text: str
) -> None:
    engine.prepare(speech_request(text))
    for language in ("en-us", "en-gb"):
        [phonemes] = phonemes_of(phonemizer, text, language)
        assert len(phonemes) >= 4 and not set("()") & set(phonemes)


async def test_limits_of_configuration(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="at most 20"):
        await engine.open(speech_request("a" * 21, model="own"))
    for options in ({"language": "ja"}, {"voices": {"a": "b c"}}, {"dtype": "float16"}):
        with pytest.raises((ConfigError, ValueError)):
            kokoro("tts", **options).options_as(KokoroOptions)


async def test_blends_and_languages_are_read() -> None:
    assert parse_blend("a") == (("a", 1.0),)
    assert parse_blend("a(2) + b(0.5)") == (("a", 2.0), ("b", 0.5))
    assert [parse_blend(bad) for bad in ("", "a+", "a(-1)", "a(x)", "a b", "a(0)")] == [None] * 6
    assert find_language("en", "en-gb") == "en-gb"
    assert find_language("en", "es") == find_language("en_US", "en-gb") == "en-us"
    assert find_language("pt", "en-us") == find_language("pt-PT", "en-us") == "pt-br"
    assert find_language("de", "en-us") is None


async def test_an_unspeakable_text_is_refused(engine: Engine) -> None:
    """Markup that says how to say a word can say: not at all."""
    with pytest.raises(InvalidRequest) as caught:
        await engine.open(speech_request("[word](//)"))
    assert caught.value.param == "input"


async def test_closing_stops_within_a_sentence(cache_dir: Path) -> None:
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    model = kokoro("tts")
    loaded = await runtime.load(model, pytest.fail)
    assert isinstance(loaded, KokoroModel) and loaded.model is not None
    entered, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            loop.call_soon_threadsafe(entered.set)
            assert go_on.wait(30)

    hook = loaded.model.module.decoder.register_forward_pre_hook(count)
    # A run looks for a cancel before each module that is made of others.
    composed = [each for each in loaded.model.module.modules() if each._modules]
    hooks = [each.register_forward_pre_hook(count) for each in composed]
    prepared = runtime.prepare(model, speech_request("One. Two."))
    run = loaded.run(prepared)
    first = asyncio.ensure_future(anext(run))
    await entered.wait()
    first.cancel()
    loop.call_soon(go_on.set)  # after the cancelled generator has told the thread to stop
    with pytest.raises(asyncio.CancelledError):
        await first
    assert calls <= 21
    for each in (hook, *hooks):
        each.remove()
    # Closed between two sentences, and then whole: the same samples, and the memory told once.
    async with aclosing(loaded.run(prepared)) as cut:
        begun = await anext(cut)
    whole = [event async for event in loaded.run(prepared)]
    assert isinstance(begun, Speech) and isinstance(whole[0], Speech)
    np.testing.assert_array_equal(begun.samples, whole[0].samples)
    measured = [event for event in whole if isinstance(event, WorkingMemory)]
    assert len(measured) == 1 and 2**20 < measured[0].nbytes < 2**30
    assert len([event async for event in loaded.run(prepared)]) == 2
    await runtime.unload(loaded)
    await runtime.stop()


async def test_blocks_are_what_was_estimated(cache_dir: Path, bare: Any) -> None:
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    model = kokoro("tts")
    estimate = runtime.estimate(model)
    loaded = await runtime.load(model, pytest.fail)
    sizes = {block.name: block.nbytes for block in loaded.blocks()}
    assert list(sizes) == ["bert", "bert_encoder", "predictor", "text_encoder", "decoder"]
    tensors = (*bare.named_parameters(), *bare.named_buffers())
    wanted = sum(tensor.nbytes for name, tensor in tensors if not name.endswith(".weight_g"))
    assert wanted <= sum(sizes.values()) <= wanted * 1.0005, "aligned"
    assert estimate.nbytes == pytest.approx(wanted, rel=0.0005)
    assert [path.suffix for path in runtime.weight_files(model)] == [".pth"]
    await runtime.unload(loaded)
    await runtime.stop()


async def test_a_checkpoint_without_the_norms_of_adain(
    cache_dir: Path, folder: Path, bare: Any, tmp_path: Path
) -> None:
    """Kokoro-82M holds none of them. Other checkpoints may, and come to the same bytes."""
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    parts = torch.load(folder / "kokoro-v1_0.pth", weights_only=True)
    keys = {part: child.state_dict().keys() for part, child in bare.named_children()}
    norms = {
        part: {f"module.{name}" for name in names} - parts[part].keys()
        for part, names in keys.items()
    }
    assert len(norms["predictor"]) > 0 and len(norms["decoder"]) > 0
    assert all(
        name.endswith((".norm.weight", ".norm.bias")) for names in norms.values() for name in names
    )
    shutil.copytree(folder, tmp_path / "whole")
    whole = {
        part: {f"module.{name}": each for name, each in child.state_dict().items()}
        for part, child in bare.named_children()
    }
    torch.save(whole, tmp_path / "whole" / "kokoro-v1_0.pth")
    without, with_norms = kokoro("tts"), kokoro("whole", source=str(tmp_path / "whole"))
    assert runtime.estimate(without).blocks == runtime.estimate(with_norms).blocks

    loaded = await runtime.load(without, pytest.fail)
    assert isinstance(loaded, KokoroModel) and loaded.model is not None
    weights = dict(loaded.model.module.named_parameters())
    for part, names in norms.items():
        for name in names:
            value = 1.0 if name.endswith("weight") else 0.0
            assert (weights[f"{part}.{name.removeprefix('module.')}"] == value).all()
    await runtime.unload(loaded)
    await runtime.stop()


@pytest.mark.parametrize("fault", ["no file", "two files", "lacks", "pickle", "truncated"])
async def test_what_cannot_be_loaded(
    cache_dir: Path, folder: Path, tmp_path: Path, fault: str
) -> None:
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    shutil.copytree(folder, tmp_path / "bad")
    weights = tmp_path / "bad" / "kokoro-v1_0.pth"
    wanted = fault
    if fault == "no file":
        weights.unlink()
        wanted = "no .pth"
    elif fault == "two files":
        shutil.copy(weights, weights.with_name("other.pth"))
        wanted = "2 .pth"
    elif fault == "lacks":
        parts = torch.load(weights, weights_only=True)
        del parts["decoder"]["module.generator.conv_post.weight_v"]
        torch.save(parts, weights)
        wanted = "lacks decoder.generator.conv_post.weight_v"
    elif fault == "pickle":
        torch.save({"bert": Evil(str(tmp_path / "executed"))}, weights)
        wanted = "cannot read"
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
        wanted = "cannot read"
    with pytest.raises(LoadFailed, match=wanted):
        await runtime.load(kokoro("bad", source=str(tmp_path / "bad")), pytest.fail)
    assert not (tmp_path / "executed").exists()
    await runtime.stop()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


async def test_a_damaged_voice_is_refused(cache_dir: Path, folder: Path, tmp_path: Path) -> None:
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    shutil.copytree(folder, tmp_path / "bad")
    torch.save(torch.zeros(3, 1, 256), tmp_path / "bad" / "voices" / "af_heart.pt")
    torch.save(Evil(str(tmp_path / "executed")), tmp_path / "bad" / "voices" / "af_bella.pt")
    model = kokoro("bad", source=str(tmp_path / "bad"))
    loaded = await runtime.load(model, pytest.fail)
    for voice in ("af_heart", "af_bella", "af_heart+am_adam"):
        prepared = runtime.prepare(model, speech_request("Hi.", voice=voice))
        with pytest.raises(InvalidRequest) as caught:
            await anext(loaded.run(prepared))
        assert caught.value.param == "voice"
    assert not (tmp_path / "executed").exists()
    await runtime.unload(loaded)
    await runtime.stop()


ALONE = """
import asyncio, os, random, socket, sys, warnings
from pathlib import Path
import torch, transformers
from engine.config import ModelConfig
from engine.memory.device import CpuDevice
from engine.process.torch_state import share_torch_state
from engine.requests import SpeechRequest
from engine.runtimes.base import RuntimeContext
from engine.runtimes.kokoro.runtime import KokoroRuntime

def refuse(*arguments, **_):
    raise SystemExit(f"asked the network: {arguments}")

socket.socket.connect = socket.getaddrinfo = refuse
share_torch_state()

def state():
    return (dict(os.environ), list(warnings.filters), random.getstate(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.get_rng_state().tolist())

async def main():
    runtime = KokoroRuntime(RuntimeContext(CpuDevice(), Path(sys.argv[1])))
    before = state()
    runtime.start()
    model = ModelConfig(id="m", runtime="kokoro", task="speech", source="starter:tiny-kokoro")
    loaded = await runtime.load(model, print)
    request = SpeechRequest(model="m", text="Zorblax!", request_id="r", voice="bf_emma")
    spoken = [event async for event in loaded.run(runtime.prepare(model, request))]
    for name, was, now in zip("env filters random threads dtype rng".split(), before, state()):
        assert was == now, name
    assert len(spoken) == 2
    await runtime.stop()

asyncio.run(main())
print("well")
"""


async def test_the_process_is_left_as_it_was_and_nobody_is_asked(
    cache_dir: Path, folder: Path
) -> None:
    # What the libraries set in this process would be inherited.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "ignore", "-c", ALONE, str(cache_dir)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "well", done.stderr[-2000:]


async def test_the_starter_is_always_the_same(folder: Path, tmp_path: Path) -> None:
    first, again = contents(folder), contents(ensure_starter("tiny-kokoro", tmp_path))
    assert first == again
    assert sum(map(len, first.values())) < 2_000_000


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
