"""Real faster-whisper in this process, beside bare calls of the library."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, LoadFailed, RuntimeFailed
from engine.events import Cut, Event, Heard, Progress, Segment, Word
from engine.files.ctranslate2_file import read_variables, weight_bytes, write_variables
from engine.memory.device import CpuDevice
from engine.memory.host_memory import HostMemory
from engine.requests import SpeechRequest, TranscriptionOperation, TranscriptionRequest
from engine.runtimes.base import LoadedModel, RuntimeContext
from engine.runtimes.whisper.options import WhisperOptions
from engine.runtimes.whisper.runtime import LoadedWhisper, WhisperRuntime
from engine.runtimes.whisper.window_batcher import Pace, Step
from engine.starters.registry import ensure_starter
from tests.engine.recordings import FILES, encode, silence, voice

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

LONG_S = 70


def model_of(model_id: str = "ears", **options: Any) -> ModelConfig:
    return ModelConfig(
        id=model_id,
        runtime="whisper",
        task="transcribe",
        source=options.pop("source", "starter:tiny-whisper"),
        options={"compute_type": "float32", "cpu_threads": 1, **options},
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    config = EngineConfig(
        device="cpu",
        memory="2GiB",
        cache_dir=cache_dir,
        state_dir=tmp_path_factory.mktemp("state"),
        models=(
            model_of(max_seconds=5 * 60),
            model_of("batched", batch_after=60, batch_size=2),
            model_of("auto", compute_type="auto", language="de"),
        ),
    )
    engine = Engine(config, device=CpuDevice())
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Any:
    """The library alone, as its documentation says to use it."""
    import faster_whisper

    folder = str(ensure_starter("tiny-whisper", cache_dir))
    return faster_whisper.WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=1)


def request_of(audio: bytes, model: str = "ears", **fields: Any) -> TranscriptionRequest:
    return TranscriptionRequest(model=model, audio=audio, request_id="test", **fields)


async def events(engine: Engine, request: TranscriptionRequest) -> list[Event]:
    session = await engine.open(request)
    return [event async for event in session.events()]


async def transcribed(
    engine: Engine, audio: bytes, model: str = "ears", **fields: Any
) -> tuple[Heard, list[Segment]]:
    found = await events(engine, request_of(audio, model, **fields))
    assert isinstance(found[0], Heard)
    assert all(isinstance(event, Segment | Progress) for event in found[1:])
    return found[0], [event for event in found if isinstance(event, Segment)]


def expected_of(found: tuple[Any, Any], *, bounded: bool = True) -> tuple[Heard, list[Segment]]:
    """What the library gave, in the engine's words; ids count from 0 as OpenAI's do.

    Times beyond the end of the recording are its end, if `bounded`.
    """
    segments, info = found

    def time(value: float) -> float:
        return min(float(value), info.duration) if bounded else float(value)

    return Heard(info.language, info.duration), [
        Segment(
            id=index,
            start_s=segment.start,
            end_s=time(segment.end),
            text=segment.text,
            seek=segment.seek,
            tokens=tuple(segment.tokens),
            temperature=segment.temperature,
            avg_logprob=segment.avg_logprob,
            compression_ratio=segment.compression_ratio,
            no_speech_prob=segment.no_speech_prob,
            words=tuple(
                Word(word.word, time(word.start), time(word.end), word.probability)
                for word in segment.words or ()
            ),
        )
        for index, segment in enumerate(segments)
    ]


def two_talks(seed: int = 0) -> NDArray[np.float32]:
    """Talk, a silence, other talk."""
    parts = [silence(2), voice(5, seed), silence(4), voice(4, seed + 50), silence(1)]
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", FILES)
async def test_every_field_equals_that_of_the_library_alone(
    engine: Engine, library: Any, kind: str
) -> None:
    data = encode(voice(4, seed=3), kind)
    expected = expected_of(library.transcribe(io.BytesIO(data)))
    assert len(expected[1]) == 2 and expected[1][0].text.startswith(" ")
    assert await transcribed(engine, data) == expected


async def test_it_is_the_same_after_unloading_and_loading_again(
    engine: Engine, library: Any
) -> None:
    data = encode(voice(45, seed=4))
    expected = expected_of(library.transcribe(io.BytesIO(data)))
    assert len(expected[1]) == 4
    for _ in range(2):
        assert await transcribed(engine, data) == expected
        await engine.unload("ears")
    assert await transcribed(engine, data) == expected
    other = await transcribed(engine, encode(voice(45, seed=5)))
    assert [each.text for each in other[1]] != [each.text for each in expected[1]]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "translation": (
        {"operation": TranscriptionOperation.TRANSLATION},
        {"task": "translate"},
    ),
    "language": ({"language": "de"}, {"language": "de"}),
    "upper case": ({"language": "FR"}, {"language": "fr"}),
    "prompt": ({"prompt": "the red river"}, {"initial_prompt": "the red river"}),
    "hot words": ({"hotwords": "a tunnel, a tower"}, {"hotwords": "a tunnel, a tower"}),
    "words": ({"word_times": True}, {"word_timestamps": True}),
    "voice only": ({"vad": True}, {"vad_filter": True}),
    "voice and words": (
        {"vad": True, "word_times": True},
        {"vad_filter": True, "word_timestamps": True},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
async def test_every_option_does_what_it_does_in_the_library(
    engine: Engine, library: Any, name: str
) -> None:
    fields, arguments = OPTIONS[name]
    data = encode(two_talks())
    expected = expected_of(library.transcribe(io.BytesIO(data), **arguments))
    assert await transcribed(engine, data, **fields) == expected
    plain = await transcribed(engine, data)
    assert plain != expected  # so the option has an effect that can be seen


ROOM = 223
"""Tokens before a window: half of Whisper's 448 positions, less one."""

LONG_TEXTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "a prompt": ((250, 223), (0, 0)),
    "hot words": ((0, 0), (250, 223)),
    "both": ((250, 112), (250, 111)),
    "both, which fit alone": ((200, 112), (200, 111)),
    "many hot words": ((40, 40), (250, 183)),
    "a long prompt": ((250, 193), (30, 30)),
    "both, which fit": ((100, 100), (100, 100)),
    "both, far beyond all positions": ((3000, 112), (3000, 111)),
}
"""Tokens given and kept, of the prompt and of the hot words."""


@pytest.mark.parametrize("model", ["ears", "batched"])
@pytest.mark.parametrize("name", LONG_TEXTS)
async def test_a_text_beyond_the_decoders_positions_acts_like_a_shorter_one_that_fits(
    engine: Engine, library: Any, name: str, model: str
) -> None:
    def words(count: int, seed: int) -> list[str]:
        """Words of one token each."""
        known = ["tree", "house", "river", "tower", "bridge", "tunnel", "signal", "station"]
        return [str(word) for word in np.random.default_rng(seed).choice(known, count)]

    def text(words: list[str]) -> str | None:
        return " ".join(words) or None

    (prompt_given, prompt_kept), (hot_given, hot_kept) = LONG_TEXTS[name]
    prompt, hot = words(prompt_given, 1), words(hot_given, 2)
    data = encode(voice(LONG_S if model == "batched" else 3))
    session = await engine.open(request_of(data, model, prompt=text(prompt), hotwords=text(hot)))
    found = [event async for event in session.events()]
    cuts = [
        Cut("hotwords", hot_kept, hot_given),
        Cut("prompt", prompt_kept, prompt_given),
    ]
    assert session.notes.cuts == [cut for cut in cuts if cut.kept < cut.given]
    short_prompt, short_hot = prompt[prompt_given - prompt_kept :], hot[:hot_kept]
    short = {"prompt": text(short_prompt), "hotwords": text(short_hot)}
    expected = await transcribed(engine, data, model, **short)
    assert [event for event in found if isinstance(event, Segment)] == expected[1]
    if model == "ears":  # the library alone, whose own bounds the short texts keep
        arguments = {"initial_prompt": text(short_prompt), "hotwords": text(short_hot)}
        assert expected == expected_of(library.transcribe(io.BytesIO(data), **arguments))


async def test_the_text_of_earlier_windows_takes_what_hot_words_leave(
    engine: Engine, library: Any
) -> None:
    from faster_whisper.tokenizer import Tokenizer

    await engine.load("ears")
    loaded = engine._residency.loaded["ears"]
    assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
    tokenizer = Tokenizer(library.hf_tokenizer, True, task="transcribe", language="en")
    before = list(range(400))
    for hot, left in ((0, ROOM), (100, ROOM - 100), (ROOM, 0)):
        loaded.model.hotwords = [7] * hot
        told = [tokenizer.sot_prev, *[7] * hot, *before[len(before) - left :]]
        assert loaded.model.get_prompt(tokenizer, before) == [*told, *tokenizer.sot_sequence]
    loaded.model.hotwords = ()


async def test_word_times_are_python_numbers(engine: Engine) -> None:
    _, segments = await transcribed(engine, encode(two_talks()), word_times=True)
    words = [word for segment in segments for word in segment.words]
    assert "".join(word.text for word in words) == "".join(each.text for each in segments)
    numbers = [
        value for word in words for value in (word.start_s, word.end_s, word.probability)
    ] + [value for each in segments for value in (each.start_s, each.end_s, each.avg_logprob)]
    assert {type(value) for value in numbers} == {float}


async def test_a_temperature_is_taken_as_it_is(engine: Engine) -> None:
    _, segments = await transcribed(engine, encode(voice(3)), temperature=0.3)
    assert {segment.temperature for segment in segments} == {0.3}


async def test_a_model_may_have_a_language_and_a_smaller_type(engine: Engine) -> None:
    heard, segments = await transcribed(engine, encode(voice(3)), "auto")
    assert heard.language == "de" and segments
    heard, _ = await transcribed(engine, encode(voice(3)), "auto", language="fr")
    assert heard.language == "fr"
    loaded = engine._residency.loaded["auto"]
    assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
    assert loaded.model.model.compute_type == "int8_float32"
    await engine.unload("auto")


async def test_a_long_recording_goes_through_the_batched_pipeline(
    engine: Engine, library: Any
) -> None:
    import faster_whisper

    talk = np.concatenate([voice(LONG_S / 2, 1), silence(3), voice(LONG_S / 2, 2)])
    data = encode(talk, "flac")
    for fields, arguments in (({}, {}), ({"word_times": True}, {"word_timestamps": True})):
        found = faster_whisper.BatchedInferencePipeline(library).transcribe(
            io.BytesIO(data), batch_size=2, without_timestamps=False, **arguments
        )
        expected = expected_of(found)
        assert len(expected[1]) >= 5
        assert await transcribed(engine, data, "batched", **fields) == expected
    short = encode(voice(50))
    assert await transcribed(engine, short, "batched") == expected_of(
        library.transcribe(io.BytesIO(short))
    )


async def test_events_come_in_order_and_with_progress(engine: Engine) -> None:
    found = await events(engine, request_of(encode(voice(LONG_S))))
    assert isinstance(found[0], Heard) and found[0].duration_s == LONG_S
    assert [type(event) for event in found[1:]] == [Progress, Segment] * (len(found) // 2)
    progress = [event.done for event in found if isinstance(event, Progress)]
    assert progress == sorted(progress) and progress[0] > 0 and progress[-1] <= 1
    segments = [event for event in found if isinstance(event, Segment)]
    assert [segment.id for segment in segments] == list(range(6))


@pytest.mark.parametrize("model", ["ears", "batched"])
@pytest.mark.parametrize("seconds", [0.001, 1, LONG_S])
async def test_where_nobody_speaks_there_is_no_text(
    engine: Engine, model: str, seconds: float
) -> None:
    heard, segments = await transcribed(engine, encode(silence(seconds)), model, vad=True)
    assert heard.duration_s == pytest.approx(seconds) and segments == []


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(("seconds", "count"), [(0.02, 1), (1.3, 1), (2, 2), (31, 3)])
async def test_no_segment_ends_after_the_recording(
    engine: Engine, library: Any, seconds: float, count: int, words: bool
) -> None:
    """The model says sentences of 1.2 s each, whatever the length of its window."""
    data = encode(voice(seconds))
    found = library.transcribe(io.BytesIO(data), word_timestamps=words)
    _, said = expected_of(found, bounded=False)
    heard, segments = await transcribed(engine, data, word_times=words)
    assert heard.duration_s == pytest.approx(seconds)
    assert len(segments) == count or words
    assert [each.text for each in segments] == [each.text for each in said][: len(segments)]
    assert words or said[-1].end_s > seconds
    assert [each.id for each in segments] == list(range(len(segments)))
    for each in segments:
        assert 0 <= each.start_s < each.end_s <= heard.duration_s
        assert all(word.start_s <= word.end_s <= heard.duration_s for word in each.words)


@pytest.mark.parametrize(
    ("said", "count"),
    [(" ...", 0), (" …", 0), (" . . .", 0), (" ♪", 1), (" 7.", 1), (" 你好。", 1)],
)
async def test_a_segment_without_a_word_is_not_speech(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, said: str, count: int
) -> None:
    """Whisper hears silence as dots, half a minute of them in five seconds."""
    from faster_whisper.transcribe import Segment as LibrarySegment
    from faster_whisper.transcribe import TranscriptionInfo

    def transcribe(*_: Any, **__: Any) -> Any:
        info = dict.fromkeys(TranscriptionInfo.__dataclass_fields__)
        info |= {"language": "en", "duration": 5.0}
        numbers = {"tokens": [1], "avg_logprob": -1.0, "compression_ratio": 1.0}
        numbers |= {"no_speech_prob": 0.5, "temperature": 0.0, "words": None}
        found = [
            LibrarySegment(id=at, seek=0, start=4.0 * at, end=4.0 * at + 4, text=said, **numbers)
            for at in range(7)
        ]
        return iter(found), TranscriptionInfo(**info)

    await engine.load("ears")
    loaded = engine._residency.loaded["ears"]
    assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
    monkeypatch.setattr(loaded.model, "transcribe", transcribe, raising=False)
    _, segments = await transcribed(engine, encode(silence(5)))
    assert [(each.start_s, each.end_s) for each in segments] == [(0.0, 4.0), (4.0, 5.0)][
        : 2 * count
    ]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"audio": b""}, "file"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"language": "klingon"}, "language"),
    ({"language": "english"}, "language"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
async def test_bad_requests_are_refused_before_anything_is_loaded(
    engine: Engine, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(request_of(**{"audio": encode(silence(1)), **fields}))
    assert raised.value.param == param


async def test_bad_files_are_refused_before_the_first_event_and_do_no_harm(
    engine: Engine,
) -> None:
    for audio in (b"no audio " * 100, encode(silence(301), "flac"), encode(silence(1))[:44]):
        with pytest.raises(InvalidRequest) as raised:
            await engine.open(request_of(audio))
        assert raised.value.param == "file"
    # One of the library's languages that this model does not have.
    with pytest.raises(InvalidRequest) as raised:
        await engine.open(request_of(encode(silence(1)), language="yue"))
    assert raised.value.param == "language"
    assert (await transcribed(engine, encode(voice(3))))[1]
    assert engine.model_status("ears").leases == 0


async def test_speech_is_not_for_a_transcription_model(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(SpeechRequest(model="ears", text="hello", request_id="test"))
    assert raised.value.param == "model"


async def test_a_run_stops_at_the_next_window(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(voice(LONG_S * 3))
    expected = await transcribed(engine, data)
    windows = count_windows(engine, monkeypatch)
    session = await engine.open(request_of(data))
    async with aclosing(session.events()) as run:
        while not isinstance(await anext(run), Segment):
            pass
    assert engine.model_status("ears").leases == 0
    assert windows[0] < 5  # of eight; the first was looked at for the language as well
    assert await transcribed(engine, data) == expected


async def test_a_run_stops_where_the_library_gives_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows without speech are passed over in one call of the library's generator."""
    windows = count_windows(engine, monkeypatch, hold_at=2)
    loaded = engine._residency.loaded["ears"]
    assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
    monkeypatch.setattr(loaded.model, "generate_with_fallback", nothing_said, raising=False)
    session = await engine.open(request_of(encode(voice(LONG_S * 3)), language="en"))
    run = session.events()
    assert isinstance(await anext(run), Heard)
    waiting = asyncio.ensure_future(anext(run))
    assert await asyncio.to_thread(windows.reached.wait, 10)
    waiting.cancel()
    # The cancellation waits for the thread, the thread for us.
    asyncio.get_running_loop().call_soon(windows.go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await run.aclose()
    assert windows[0] == 2
    assert engine.model_status("ears").leases == 0


def nothing_said(*_: Any) -> Any:
    class Nothing:
        no_speech_prob = 1.0

    return Nothing, -10.0, 0.0, 1.0


class Windows(list[int]):
    """How many windows went into the encoder."""

    def __init__(self) -> None:
        super().__init__([0])
        self.reached, self.go_on = threading.Event(), threading.Event()


def count_windows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, hold_at: int | None = None
) -> Windows:
    import faster_whisper

    windows, encode_window = Windows(), faster_whisper.WhisperModel.encode

    def counted(self: Any, features: Any) -> Any:
        windows[0] += 1
        if windows[0] == hold_at:
            windows.reached.set()
            assert windows.go_on.wait(10)
        return encode_window(self, features)

    monkeypatch.setattr(faster_whisper.WhisperModel, "encode", counted)
    return windows


async def test_recordings_at_once_share_calls_and_are_heard_as_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them wants the times of words, and one is cancelled on its way."""
    files = [encode(voice(3 + seed, seed)) for seed in range(4)]
    alone = [await transcribed(engine, data, word_times=data is files[1]) for data in files]
    loaded = engine._residency.loaded["ears"]
    assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
    batcher, sizes = loaded.batcher, []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(batcher, "paces", {step: Pace(1.0, 0.0) for step in Step})
    compute = batcher._together

    def counted(batch: Any) -> None:
        sizes.append((batch[0].step, len(batch)))
        if len(sizes) == 1:
            assert batcher.wait_for(3, 30)  # the other three
            loop.call_soon_threadsafe(leaving.cancel)
        compute(batch)

    monkeypatch.setattr(batcher, "_together", counted)
    leaving = asyncio.ensure_future(transcribed(engine, files[3]))
    running = [transcribed(engine, data, word_times=data is files[1]) for data in files[:3]]
    assert await asyncio.gather(*running) == alone[:3]
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert {step for step, size in sizes if size > 1} == set(Step)
    assert engine.model_status("ears").leases == 0


async def test_nothing_is_left_on_disk(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    written = {path for path in engine.config.cache_dir.rglob("*")}
    for kind in FILES:
        await transcribed(engine, encode(voice(2), kind), vad=True)
    assert not os.listdir(tmp_path)
    assert {path for path in engine.config.cache_dir.rglob("*")} == written


async def test_what_libraries_share_stays_as_it_was(engine: Engine) -> None:
    import random

    import torch

    def shared() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state(legacy=False),
            dict(os.environ),
        )

    await engine.unload("ears")
    before = repr(shared())
    await transcribed(engine, encode(voice(3)), vad=True, temperature=0.5)
    assert repr(shared()) == before
    await engine.unload("ears")
    assert repr(shared()) == before


async def test_unloading_ends_threads_and_frees_the_model(cache_dir: Path) -> None:
    import weakref

    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    model = model_of()
    counts = []
    for _ in range(6):
        loaded = await runtime.load(model, pytest.fail)
        assert isinstance(loaded, LoadedWhisper)
        await drain(loaded, runtime, model)
        library_model = weakref.ref(loaded.model)
        worker = weakref.ref(loaded.model.model)  # type: ignore[union-attr]
        await runtime.unload(loaded)
        assert library_model() is None and worker() is None
        counts.append(len(os.listdir("/proc/self/task")))
    # One that ends may be counted for a moment; one that stayed would be counted every round.
    assert counts[-1] <= counts[0] + 1
    await runtime.stop()


async def drain(loaded: LoadedModel, runtime: WhisperRuntime, model: ModelConfig) -> list[Event]:
    prepared = runtime.prepare(model, request_of(encode(voice(2))))
    events = [event async for event in loaded.run(prepared)]
    assert events
    return events


async def test_the_estimate_is_what_the_weights_take(
    cache_dir: Path, tmp_path: Path, engine: Engine
) -> None:
    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    folder = ensure_starter("tiny-whisper", cache_dir)
    stored = (folder / "model.bin").stat().st_size
    as_stored = runtime.estimate(model_of(compute_type="float16")).nbytes
    assert as_stored == pytest.approx(stored, rel=0.01)
    assert runtime.weight_files(model_of()) == (folder / "model.bin",)
    full = runtime.estimate(model_of()).nbytes
    assert full == 2 * as_stored
    small = runtime.estimate(model_of(compute_type="auto")).nbytes
    assert full / 4 < small < full * 0.6  # convolutions and positions stay as they are
    await transcribed(engine, encode(voice(2)))
    assert [block.nbytes for block in engine._residency.loaded["ears"].blocks()] == [full]
    await engine.unload("ears")
    assert not [entry for entry in engine.status().ledger.entries if entry.owner == "ears"]
    await runtime.stop()


async def test_working_memory_grows_with_the_recording_and_the_model(cache_dir: Path) -> None:
    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    model = model_of()

    def working(seconds: float, **options: Any) -> int:
        request = request_of(b"x" * int(seconds * 8000))
        return runtime.prepare(model.model_copy(update=options), request).working_bytes

    assert working(30) < working(300) < working(590)
    assert working(590) - working(300) == pytest.approx(290 * 1_100_000)
    batched = WhisperOptions(batch_after=10, batch_size=2)
    assert working(300, options=batched) < working(300)
    large = model.model_copy(update={"id": "large", "source": "someone/not-here"})
    request = request_of(b"x")
    assert runtime.prepare(large, request).working_bytes > 10 * working(30)
    await runtime.stop()


HARMS = {
    "missing": "no model.bin",
    "truncated": "truncated",
    "cut in the header": "damaged",
    "noise": "binary version",
    "other": "no Whisper",
    "tokenizer": "no tokenizer.json",
    "vocabulary": "vocabulary",
}


@pytest.mark.parametrize("harm", HARMS)
async def test_a_damaged_folder_fails_with_the_reason(
    cache_dir: Path, tmp_path: Path, harm: str
) -> None:
    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    folder = tmp_path / "model"
    shutil.copytree(ensure_starter("tiny-whisper", cache_dir), folder)
    weights = folder / "model.bin"
    whole = weights.read_bytes()
    if harm == "missing":
        weights.unlink()
    elif harm == "truncated":
        weights.write_bytes(whole[:-100])
    elif harm == "cut in the header":
        weights.write_bytes(whole[:10])
    elif harm == "noise":
        weights.write_bytes(np.random.default_rng(0).bytes(5000))
    elif harm == "other":
        write_variables(weights, "TransformerSpec", 7, {"encoder/num_heads": np.array(1, "int16")})
    elif harm == "tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "vocabulary.json").unlink()
    model = model_of(source=str(folder))
    with pytest.raises(LoadFailed, match=HARMS[harm]):
        runtime.estimate(model)
        await runtime.load(model, pytest.fail)
    await runtime.stop()


async def test_a_type_that_the_processor_cannot_do_fails_with_the_reason(cache_dir: Path) -> None:
    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    with pytest.raises(LoadFailed, match="float16"):
        await runtime.load(model_of(compute_type="float16"), pytest.fail)
    await runtime.stop()


async def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "a/weight": np.zeros((3, 4), np.float32),
        "a/weight_scale": np.zeros(3, np.float32),
        "b/bias": np.zeros(5, np.float16),
        "c": np.array(1, np.int8),
        "conv/weight": np.zeros((2, 2, 3), np.float16),
    }
    write_variables(tmp_path / "model.bin", "Spec", 1, arrays)
    found = read_variables(tmp_path / "model.bin")
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: (array.shape, array.dtype.name) for name, array in arrays.items()
    }
    assert weight_bytes(found, "float32") == 4 * (12 + 5 + 12)
    assert weight_bytes(found, "int8_float16") == 12 + 3 * 4 + 2 * (5 + 12)
    assert weight_bytes(found, "int8") == 12 + 3 * 4 + 4 * (5 + 12)


async def test_weights_are_parkable_where_they_are_on_a_gpu(cache_dir: Path) -> None:
    class Card(CpuDevice):
        kind = "cuda"

    for device, host, parkable in (
        (Card(), HostMemory(2**30, pinned=False), True),
        (Card(), None, False),
        (CpuDevice(), HostMemory(2**30, pinned=False), False),
    ):
        runtime = WhisperRuntime(RuntimeContext(device, cache_dir, host))
        estimate = runtime.estimate(model_of())
        assert [block.parkable for block in estimate.blocks] == [parkable]
    loaded = await runtime.load(model_of(), pytest.fail)
    assert [block.parkable for block in loaded.blocks()] == [False]
    assert loaded.host_bytes == 0
    await runtime.unload(loaded)


async def test_a_park_that_the_library_passes_over_is_no_park(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it always does, as it does on a GPU for a model in use."""
    monkeypatch.setattr("engine.runtimes.whisper.run.BUSY_S", 0.0)
    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    loaded = await runtime.load(model_of(), pytest.fail)
    with pytest.raises(RuntimeFailed):
        await runtime.park(loaded, {"weights"})
    await runtime.unload(loaded)


async def test_a_woken_model_hears_as_before(cache_dir: Path) -> None:
    runtime = WhisperRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    model = model_of()
    loaded = await runtime.load(model, pytest.fail)
    assert isinstance(loaded, LoadedWhisper) and loaded.model is not None
    expected = await drain(loaded, runtime, model)
    for _ in range(2):
        loaded.model.leave_device(to_host=False)  # right after a run, which it may still count
        assert not loaded.model.model.model_is_loaded
        await runtime.wake(loaded, {"weights"})
        assert await drain(loaded, runtime, model) == expected
    loaded.model.leave_device(to_host=False)
    weights = ensure_starter("tiny-whisper", cache_dir) / "model.bin"
    moved = weights.rename(weights.with_suffix(".away"))
    try:
        with pytest.raises(LoadFailed):
            await runtime.wake(loaded, {"weights"})
    finally:
        moved.rename(weights)
    await runtime.wake(loaded, {"weights"})
    assert await drain(loaded, runtime, model) == expected
    await runtime.unload(loaded)
