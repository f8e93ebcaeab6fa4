"""Real onnx-asr in this process, beside bare calls of the library."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import weakref
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
from engine.errors import InvalidRequest, LoadFailed
from engine.events import Event, Heard, Progress, Segment
from engine.files.hub.listing import Listing
from engine.files.hub.repository import Repository
from engine.files.hub.selection import choose
from engine.memory.device import CpuDevice
from engine.requests import SpeechRequest, TranscriptionOperation, TranscriptionRequest
from engine.runtimes.base import RuntimeContext
from engine.runtimes.onnx_asr.runtime import LoadedOnnxAsr, OnnxAsrRuntime
from engine.starters.registry import ensure_starter
from tests.engine.recordings import RATE, encode, silence, voice

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

TRANSLATION = TranscriptionOperation.TRANSLATION


def model_of(model_id: str = "parakeet", **options: Any) -> ModelConfig:
    return ModelConfig(
        id=model_id,
        runtime="onnx_asr",
        task="transcribe",
        source=options.pop("source", f"starter:tiny-{model_id}"),
        options={"cpu_threads": 1, "window_s": 6, "max_seconds": 60, **options},
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
        models=(model_of(), model_of("canary")),
    )
    engine = Engine(config, device=CpuDevice())
    await engine.start()
    yield engine
    await engine.stop()


def library(cache_dir: Path, name: str) -> Any:
    """The library alone, as its documentation says to use it."""
    import onnx_asr

    folder = ensure_starter(f"tiny-{name}", cache_dir)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    found = onnx_asr.load_model(kind, folder, providers=["CPUExecutionProvider"])
    return found.with_timestamps()


def request_of(audio: bytes, model: str = "parakeet", **fields: Any) -> TranscriptionRequest:
    return TranscriptionRequest(model=model, audio=audio, request_id="test", **fields)


async def transcribed(
    engine: Engine, audio: bytes, model: str = "parakeet", **fields: Any
) -> tuple[Heard, list[Segment]]:
    session = await engine.open(request_of(audio, model, **fields))
    found = [event async for event in session.events()]
    assert isinstance(found[0], Heard)
    assert all(isinstance(event, Segment | Progress) for event in found[1:])
    return found[0], [event for event in found if isinstance(event, Segment)]


def as_sent(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """The samples after they were written with 16 bits."""
    whole: NDArray[np.float32] = (samples * 32767).astype(np.int16).astype(np.float32) / np.float32(
        2**15
    )
    return whole


def close(segment: Segment, expected: Any) -> None:
    """The segment is what the library alone says of the whole recording."""
    assert segment.text == f" {expected.text}"
    assert segment.avg_logprob == pytest.approx(np.mean(expected.logprobs), abs=1e-4)
    assert len(segment.tokens) == len(expected.tokens)


async def test_a_transcript_is_that_of_the_library_alone(engine: Engine, cache_dir: Path) -> None:
    """Also after an unload and a load, which take and give back the same bytes."""
    samples = voice(4, seed=3)
    parakeet, canary = (library(cache_dir, name) for name in ("parakeet", "canary"))
    for _ in range(2):
        heard, (segment,) = await transcribed(engine, encode(samples))
        assert heard == Heard("und", 4.0)
        close(segment, parakeet.recognize(as_sent(samples)))
        assert 0 <= segment.start_s < segment.end_s <= 4 and segment.words == ()
        entries = [each for each in engine.status().ledger.entries if each.owner == "parakeet"]
        graphs = ensure_starter("tiny-parakeet", cache_dir).glob("*.onnx")
        assert sum(each.nbytes for each in entries) == sum(path.stat().st_size for path in graphs)
        await engine.unload("parakeet")
        owners = {each.owner for each in engine.status().ledger.entries}
        assert "parakeet" not in owners
    heard, (segment,) = await transcribed(engine, encode(samples), "canary")
    assert heard == Heard("en", 4.0) and (segment.start_s, segment.end_s) == (0.0, 4.0)
    close(segment, canary.recognize(as_sent(samples)))


async def test_canary_takes_a_language_and_translates_into_english(
    engine: Engine, cache_dir: Path
) -> None:
    samples = voice(3)
    data, canary = encode(samples), library(cache_dir, "canary")
    english = await transcribed(engine, data, "canary")
    heard, (segment,) = await transcribed(engine, data, "canary", language="DE")
    assert heard.language == "de" and segment.text != english[1][0].text
    close(segment, canary.recognize(as_sent(samples), language="de"))
    fields = {"language": "de", "operation": TRANSLATION}
    _, (translated,) = await transcribed(engine, data, "canary", **fields)
    close(translated, canary.recognize(as_sent(samples), language="de", target_language="en"))
    assert translated.text != segment.text
    with pytest.raises(InvalidRequest, match="does not know the language") as raised:
        await engine.open(request_of(data, "canary", language="th"))
    assert raised.value.param == "language"


async def test_words_have_times_and_make_up_the_text(engine: Engine, cache_dir: Path) -> None:
    samples = voice(4, seed=1)
    _, (segment,) = await transcribed(engine, encode(samples), word_times=True)
    expected = library(cache_dir, "parakeet").recognize(as_sent(samples))
    words = segment.words
    assert "".join(word.text for word in words) == segment.text
    assert len(words) < len(expected.tokens)  # some are of several tokens
    firsts = [
        time
        for token, time in zip(expected.tokens, expected.timestamps, strict=True)
        if token.startswith(" ")
    ]
    assert [word.start_s for word in words] == pytest.approx(firsts)
    assert all(word.start_s <= word.end_s <= 4 for word in words)
    assert [word.start_s for word in words] == sorted(word.start_s for word in words)
    assert all(0 < word.probability <= 1 for word in words if word.probability is not None)
    assert (segment.start_s, segment.end_s) == (words[0].start_s, words[-1].end_s)


async def test_a_long_recording_is_cut_at_pauses_and_silence_is_left_out(
    engine: Engine, cache_dir: Path
) -> None:
    parts = [silence(2), voice(5), silence(3), voice(4, 50), silence(1)]
    data = encode(np.concatenate(parts))
    heard, segments = await transcribed(engine, data)
    assert heard.duration_s == 15 and [each.id for each in segments] == [0, 1]
    first, second = segments
    assert 1.5 < first.start_s < first.end_s < 7.6
    assert 9.4 < second.start_s < second.end_s < 14.6
    assert second.seek > 900
    _, (only,) = await transcribed(engine, encode(np.concatenate(parts[1:3])[: 6 * RATE]), vad=True)
    assert only.end_s < 5.6
    for seconds in (0.001, 1, 15):
        heard, segments = await transcribed(engine, encode(silence(seconds)), vad=True)
        assert heard.duration_s == pytest.approx(seconds, abs=1e-4) and segments == []
    heard, _ = await transcribed(engine, encode(voice(0.001)))
    assert heard.duration_s == pytest.approx(0.001)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("parakeet", {"audio": b""}, "file"),
    ("parakeet", {"temperature": 1.1}, "temperature"),
    ("parakeet", {"temperature": 0.5}, "temperature"),
    ("parakeet", {"temperature": float("nan")}, "temperature"),
    ("parakeet", {"prompt": "trains"}, "prompt"),
    ("parakeet", {"hotwords": "trains"}, "hotwords"),
    ("parakeet", {"language": "de"}, "language"),
    ("parakeet", {"operation": TRANSLATION}, "model"),
    ("canary", {"word_times": True}, "timestamp_granularities"),
    ("canary", {"prompt": "trains"}, "prompt"),
]


async def test_what_a_model_cannot_do_is_refused_by_name_before_it_is_loaded(
    engine: Engine,
) -> None:
    for model, fields, param in BAD:
        request = request_of(**{"audio": encode(silence(1)), "model": model, **fields})
        with pytest.raises(InvalidRequest) as raised:
            engine.prepare(request)
        assert raised.value.param == param, fields
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(SpeechRequest(model="canary", text="hello", request_id="test"))
    assert raised.value.param == "model"


async def test_a_language_of_the_configuration_may_be_named(cache_dir: Path) -> None:
    runtime = OnnxAsrRuntime(RuntimeContext(CpuDevice(), cache_dir))
    model, request = model_of(language="de"), request_of(encode(silence(1)), language="DE")
    assert runtime.prepare(model, request).working_bytes > 10_000_000
    absent = model_of(source="someone/not-here")  # its kind is not known yet
    runtime.prepare(absent, request_of(encode(silence(1)), language="de", word_times=True))
    await runtime.stop()


async def test_bad_files_are_refused_before_the_first_event(engine: Engine) -> None:
    for audio in (b"no audio " * 100, encode(silence(61), "flac"), encode(silence(1))[:44]):
        with pytest.raises(InvalidRequest) as raised:
            await engine.open(request_of(audio))
        assert raised.value.param == "file"
    assert (await transcribed(engine, encode(voice(3))))[1]
    assert engine.model_status("parakeet").leases == 0


async def test_a_run_stops_within_a_window(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transducer runs a graph for each token, and each asks first."""
    from engine.runtimes.onnx_asr.model import Session

    data = encode(voice(5))
    expected = await transcribed(engine, data)
    reached, go_on, runs, run_graph = threading.Event(), threading.Event(), [0], Session.run

    def held(self: Session, *arguments: Any) -> Any:
        runs[0] += 1
        if runs[0] == 3:
            reached.set()
            assert go_on.wait(10)
        return run_graph(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "run", held)
        session = await engine.open(request_of(data))
        async with aclosing(session.events()) as events:
            assert isinstance(await anext(events), Heard)
            waiting = asyncio.ensure_future(anext(events))
            assert await asyncio.to_thread(reached.wait, 10)
            waiting.cancel()
            # The cancellation waits for the thread, the thread for us.
            asyncio.get_running_loop().call_soon(go_on.set)
            with pytest.raises(asyncio.CancelledError):
                await waiting
    assert runs[0] == 3 and engine.model_status("parakeet").leases == 0
    assert await transcribed(engine, data) == expected


async def test_a_graph_that_runs_is_stopped(cache_dir: Path) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    from engine.runtimes.onnx_asr.model import OnnxModel

    folder = ensure_starter("tiny-parakeet", cache_dir)
    model = OnnxModel(folder, "nemo-conformer-tdt", None, "cpu", 1)
    model.control.stop()
    with pytest.raises(Fail, match="terminate"):
        model.hear(voice(1))
    checks: list[None] = []
    model.control.begin(lambda: checks.append(None))
    heard = model.hear(voice(1))
    # The encoder, then a token or a blank at a time: what the watchdog sees of a window.
    assert heard.tokens is not None and len(checks) > len(heard.tokens) > 0


async def test_unloading_frees_the_sessions(cache_dir: Path) -> None:
    runtime = OnnxAsrRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    model = model_of()
    loaded = await runtime.load(model, pytest.fail)
    assert isinstance(loaded, LoadedOnnxAsr) and loaded.model is not None
    assert loaded.blocks() == runtime.estimate(model).blocks and loaded.host_bytes == 0
    events: list[Event] = []
    async with aclosing(loaded.run(runtime.prepare(model, request_of(encode(voice(2)))))) as run:
        events += [event async for event in run]
    assert events
    held = [weakref.ref(loaded.model), weakref.ref(loaded.model._asr._encoder._session)]
    threads = loaded.threads
    await runtime.unload(loaded)
    assert [each() for each in held] == [None, None]
    assert threads._shutdown
    await runtime.stop()


HARMS = {
    "missing": "no encoder-model.onnx",
    "other quantization": "no encoder-model.int8.onnx",
    "vocabulary": "no vocab.txt",
    "noise": "Protobuf|INVALID_PROTOBUF",
    "no kind": "model_type is wanted",
    "other kind": "'whisper' is not served",
    "no JSON": "cannot read config.json",
}


async def test_a_damaged_folder_fails_with_the_reason(cache_dir: Path, tmp_path: Path) -> None:
    runtime = OnnxAsrRuntime(RuntimeContext(CpuDevice(), cache_dir))
    for harm, message in HARMS.items():
        folder = tmp_path / harm
        shutil.copytree(ensure_starter("tiny-parakeet", cache_dir), folder)
        config = folder / "config.json"
        if harm == "missing":
            (folder / "encoder-model.onnx").unlink()
        elif harm == "vocabulary":
            (folder / "vocab.txt").unlink()
        elif harm == "noise":
            (folder / "encoder-model.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
        elif harm == "no kind":
            config.unlink()
        elif harm == "other kind":
            config.write_text('{"model_type": "whisper"}')
        elif harm == "no JSON":
            config.write_text("{")
        quantization = "int8" if harm == "other quantization" else None
        model = model_of(source=str(folder), quantization=quantization)
        with pytest.raises(LoadFailed, match=message):
            runtime.estimate(model)
            await runtime.load(model, pytest.fail)
    await runtime.stop()


PARAKEET = {
    "config.json", "vocab.txt", "nemo128.onnx", "README.md",
    "encoder-model.onnx", "encoder-model.onnx.data", "decoder_joint-model.onnx",
    "encoder-model.int8.onnx", "decoder_joint-model.int8.onnx",
}  # fmt: skip
"""The files of istupakov/parakeet-tdt-0.6b-v3-onnx."""


async def test_one_quantization_is_fetched() -> None:
    wanted = {
        None: {"encoder-model.onnx", "encoder-model.onnx.data", "decoder_joint-model.onnx"},
        "int8": {"encoder-model.int8.onnx", "decoder_joint-model.int8.onnx"},
    }
    for kind in (None, "nemo-conformer-tdt"):
        for quantization, graphs in wanted.items():
            model = model_of(source="someone/parakeet", quantization=quantization, model_type=kind)
            (source,) = OnnxAsrRuntime.hub_sources(model)
            found = choose(PARAKEET, source.patterns)
            assert set(found) == {"config.json", "vocab.txt", *graphs}


def repository(paths: set[str], kind: str) -> Repository:
    found = Repository(Listing("someone/model", "main", "c0ffee", ()))
    found.__dict__["paths"] = frozenset(paths)
    found._documents["config.json"] = {"model_type": kind}
    return found


async def test_a_repository_is_recognised() -> None:
    found = OnnxAsrRuntime.recognise(repository(PARAKEET, "nemo-conformer-tdt"))
    assert found is not None and (found.runtime, found.task) == ("onnx_asr", "transcribe")
    assert not found.options
    small = {path for path in PARAKEET if "model.onnx" not in path}
    found = OnnxAsrRuntime.recognise(repository(small, "nemo-conformer-tdt"))
    assert found is not None and found.options == {"quantization": "int8"}
    assert OnnxAsrRuntime.recognise(repository(PARAKEET, "llama")) is None
    for paths, message in (
        (PARAKEET - {"vocab.txt"}, "no vocab.txt"),
        (PARAKEET, "lacks decoder-model.int8.onnx"),
    ):
        with pytest.raises(LoadFailed, match=message):
            OnnxAsrRuntime.recognise(repository(paths, "nemo-conformer-aed"))


async def test_a_gpu_wants_the_library_that_computes_on_it(cache_dir: Path) -> None:
    class Card(CpuDevice):
        kind = "cuda"

    runtime = OnnxAsrRuntime(RuntimeContext(Card(), cache_dir))
    with pytest.raises(ImportError, match="onnxruntime-gpu"):
        runtime.start()
    await runtime.stop()
