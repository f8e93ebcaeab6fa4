"""Real sherpa-onnx in this process, beside bare calls of the library."""

from __future__ import annotations

import asyncio
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import ConfigError, InvalidRequest, LoadFailed
from engine.events import Progress, Speakers
from engine.files.hub.selection import choose
from engine.memory.device import CpuDevice
from engine.requests import DiarizationRequest, KnownSpeaker, SpeechRequest
from engine.runtimes.base import RuntimeContext
from engine.runtimes.sherpa_diarization.files import check_embedding
from engine.runtimes.sherpa_diarization.options import SherpaDiarizationOptions
from engine.runtimes.sherpa_diarization.runtime import LoadedDiarization, SherpaDiarizationRuntime
from engine.runtimes.sherpa_diarization.turns import Shape
from engine.starters.registry import ensure_starter
from tests.engine.recordings import RATE, encode, silence

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

Audio = NDArray[np.float32]


def tone(pitch: float, seconds: float) -> Audio:
    """A voice of that pitch, in hertz: its harmonics, louder and softer like syllables."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.03 * np.sin(19 * time))) / RATE
    wave = sum(np.sin(order * phase) / order for order in range(1, 20))
    samples: Audio = (0.1 * wave * (0.6 + 0.4 * np.sin(25 * time))).astype(np.float32)
    return samples


LOW, HIGH = 110, 215
PARTS = ((LOW, 3.0), (HIGH, 4.0), (LOW, 5.0), (HIGH, 2.0), (LOW, 3.0))


def dialogue(parts: Any = PARTS, pause_s: float = 0.6) -> Audio:
    pieces = [(tone(pitch, seconds), silence(pause_s)) for pitch, seconds in parts]
    return np.concatenate([piece for pair in pieces for piece in pair])


def model_of(**options: Any) -> ModelConfig:
    return ModelConfig(
        id="speakers",
        runtime="sherpa_diarization",
        task="diarize",
        source=options.pop("source", "starter:tiny-diarization"),
        options={"cpu_threads": 1, "max_seconds": 90, **options},
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
        models=(model_of(),),
    )
    engine = Engine(config, device=CpuDevice())
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(scope="module")
def library(cache_dir: Path) -> Any:
    """The library alone, as its documentation says to use it."""
    import sherpa_onnx

    folder = ensure_starter("tiny-diarization", cache_dir)
    return sherpa_onnx.OfflineSpeakerDiarization(
        sherpa_onnx.OfflineSpeakerDiarizationConfig(
            segmentation=sherpa_onnx.OfflineSpeakerSegmentationModelConfig(
                pyannote=sherpa_onnx.OfflineSpeakerSegmentationPyannoteModelConfig(
                    model=str(folder / "model.onnx")
                )
            ),
            embedding=sherpa_onnx.SpeakerEmbeddingExtractorConfig(
                model=str(folder / "embedding.onnx")
            ),
            clustering=sherpa_onnx.FastClusteringConfig(num_clusters=-1, threshold=0.5),
        )
    )


def request_of(audio: bytes, known: Mapping[str, Audio] | None = None) -> DiarizationRequest:
    speakers = tuple(KnownSpeaker(name, samples) for name, samples in (known or {}).items())
    return DiarizationRequest(
        model="speakers", audio=audio, request_id="test", known_speakers=speakers
    )


async def told_apart(
    engine: Engine, samples: Audio, known: Mapping[str, Audio] | None = None
) -> list[tuple[float, float, str]]:
    session = await engine.open(request_of(encode(samples), known))
    events = [event async for event in session.events()]
    assert all(isinstance(each, Progress) for each in events[:-1])
    done = [each.done for each in events[:-1] if isinstance(each, Progress)]
    assert done == sorted(done) and all(0 < each <= 1 for each in done)
    last = events[-1]
    assert isinstance(last, Speakers)
    assert last.duration_s == pytest.approx(len(samples) / RATE)
    return [(turn.start_s, turn.end_s, turn.speaker) for turn in last.turns]


RECORDINGS: dict[str, Audio] = {
    "dialogue": dialogue(),
    "one window": dialogue()[: 8 * RATE],
    "one window and a sample": dialogue()[: 10 * RATE + 1],
    "whole windows": dialogue()[: 13 * RATE],
    "no pauses": dialogue(pause_s=0.0),
    "one speaker": tone(LOW, 12),
    "three pitches": dialogue(((95, 4.0), (300, 4.0), (190, 4.0), (95, 4.0))),
    "nobody": silence(12),
}


async def test_turns_are_those_of_the_library_alone(engine: Engine, library: Any) -> None:
    for name, samples in RECORDINGS.items():
        heard = (samples * 32767).astype(np.int16).astype(np.float32) / 32768  # as it is sent
        alone = library.process(heard).sort_by_start_time()
        letters: dict[int, str] = {}
        for turn in alone:
            letters.setdefault(turn.speaker, "ABCDEF"[len(letters)])
        found = await told_apart(engine, samples)
        assert [each[2] for each in found] == [letters[turn.speaker] for turn in alone], name
        times = [time for each in found for time in each[:2]]
        expected = [time for turn in alone for time in (turn.start, turn.end)]
        assert times == pytest.approx(expected, abs=1e-4), name


async def test_two_voices_in_turns_are_two_speakers(engine: Engine) -> None:
    """Also after an unload and a load, which take and give back the same bytes."""
    starts = np.cumsum([0.0, *(seconds + 0.6 for _, seconds in PARTS)])
    for _ in range(2):
        found = await told_apart(engine, dialogue())
        assert [each[2] for each in found] == ["A", "B", "A", "B", "A"]
        for (start_s, end_s, _), (_, seconds), begun_s in zip(found, PARTS, starts, strict=False):
            assert start_s == pytest.approx(begun_s, abs=0.25)
            assert end_s == pytest.approx(begun_s + seconds, abs=0.25)
        entries = [each for each in engine.status().ledger.entries if each.owner == "speakers"]
        files = {"segmentation": "model.onnx", "embedding": "embedding.onnx"}
        folder = ensure_starter("tiny-diarization", engine.config.cache_dir)
        assert {each.name: each.nbytes for each in entries} == {
            name: (folder / file).stat().st_size for name, file in files.items()
        }
        await engine.unload("speakers")
        assert "speakers" not in {each.owner for each in engine.status().ledger.entries}


async def test_known_speakers_have_their_names(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.runtimes.sherpa_diarization.model import DiarizationModel

    known = {"Anna": tone(220, 3), "Ben": tone(112, 3)}
    found = await told_apart(engine, dialogue(), known)
    assert [each[2] for each in found] == ["Ben", "Anna", "Ben", "Anna", "Ben"]
    # A single window also works: the model itself tells its speakers apart.
    short = dialogue()[: 8 * RATE]
    with monkeypatch.context() as patched:
        patched.setattr(DiarizationModel, "cluster", None)
        assert [each[2] for each in await told_apart(engine, short, known)] == ["Ben", "Anna"]
    # Nobody else is named so, not even by a letter.
    others = await told_apart(engine, dialogue(), {"A": tone(220, 3)})
    assert [each[2] for each in others] == ["B", "A", "B", "A", "B"]
    # And whoever is not there is nobody.
    alone = await told_apart(engine, tone(LOW, 11), {"Anna": tone(220, 3)})
    assert [each[2] for each in alone] == ["A"]


async def test_bad_files_are_refused_before_the_first_event(engine: Engine) -> None:
    for audio in (b"no audio " * 100, encode(silence(91), "flac"), b""):
        with pytest.raises(InvalidRequest) as raised:
            await engine.open(request_of(audio))
        assert raised.value.param == "file"
    with pytest.raises(InvalidRequest) as raised:
        engine.prepare(SpeechRequest(model="speakers", text="hello", request_id="test"))
    assert raised.value.param == "model"
    assert await told_apart(engine, silence(0.01)) == []
    assert engine.model_status("speakers").leases == 0


async def test_working_memory_grows_with_the_recording(engine: Engine) -> None:
    """The distances between voices take its square, up to the longest that is taken."""
    working = [
        engine.prepare(request_of(bytes(8000 * seconds))).working_bytes
        for seconds in (30, 60, 90, 900)
    ]
    assert working[0] < working[1] < working[2] == working[3]
    assert working[2] > 90 * 250_000 + (3 * 90) ** 2 * 4


async def test_a_run_stops_between_windows_and_the_next_is_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.runtimes.sherpa_diarization.model import DiarizationModel

    expected = await told_apart(engine, dialogue())
    reached, go_on, embed = threading.Event(), threading.Event(), DiarizationModel.embed
    calls = [0]

    def held(self: DiarizationModel, pieces: Any) -> Any:
        calls[0] += 1
        reached.set()
        assert go_on.wait(10)
        return embed(self, pieces)

    with monkeypatch.context() as patched:
        patched.setattr(DiarizationModel, "embed", held)
        session = await engine.open(request_of(encode(dialogue())))
        async with aclosing(session.events()) as events:
            await anext(events)
            assert await asyncio.to_thread(reached.wait, 10)
            closing = asyncio.ensure_future(session.close())
            # The end waits for the thread, the thread for us.
            asyncio.get_running_loop().call_soon(go_on.set)
            await closing
    assert calls[0] == 1 and engine.model_status("speakers").leases == 0
    assert await told_apart(engine, dialogue()) == expected


async def test_a_window_that_runs_is_stopped(cache_dir: Path) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    from engine.runtimes.sherpa_diarization.model import DiarizationModel

    folder = ensure_starter("tiny-diarization", cache_dir)
    model = DiarizationModel(folder / "model.onnx", folder / "embedding.onnx", 1)
    model.stop()
    with pytest.raises(Fail, match="terminate"):
        model.segment(tone(LOW, 1))
    model.run_options.terminate = False
    assert model.segment(tone(LOW, 10)).shape == (589, 3)


async def test_unloading_frees_both_models(cache_dir: Path) -> None:
    runtime = SherpaDiarizationRuntime(RuntimeContext(CpuDevice(), cache_dir))
    runtime.start()
    loaded = await runtime.load(model_of(), pytest.fail)
    assert isinstance(loaded, LoadedDiarization) and loaded.model is not None
    assert loaded.blocks() == runtime.estimate(model_of()).blocks and loaded.host_bytes == 0
    held = [weakref.ref(loaded.model), weakref.ref(loaded.model._session)]
    thread = loaded.thread
    await runtime.unload(loaded)
    assert [each() for each in held] == [None, None]
    assert thread._shutdown
    await runtime.stop()


async def test_beside_a_gpu_nothing_of_it_is_on_the_gpu(cache_dir: Path) -> None:
    class Card(CpuDevice):
        kind = "cuda"

    runtime = SherpaDiarizationRuntime(RuntimeContext(Card(), cache_dir))
    assert runtime.estimate(model_of()).blocks == ()
    assert runtime.prepare(model_of(), request_of(encode(silence(1)))).working_bytes == 0
    await runtime.stop()


HARMS = {
    "missing": "no model.onnx",
    "no embedding": "no embedding.onnx",
    "noise": "Protobuf|INVALID_PROTOBUF",
    "no number": "model.onnx: its metadata has no number window_size",
    "other classes": "do not fit each other",
    "no framework": "no framework that is served; there is wespeaker",
    "swapped": "no number num_speakers",
}


async def test_a_damaged_folder_fails_with_the_reason(cache_dir: Path, tmp_path: Path) -> None:
    """The library would end the process where its metadata are not there."""
    import onnx

    runtime = SherpaDiarizationRuntime(RuntimeContext(CpuDevice(), cache_dir))

    def without(path: Path, key: str, value: str | None = None) -> None:
        model = onnx.load(path)
        kept = {each.key: each.value for each in model.metadata_props if each.key != key}
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, kept if value is None else {**kept, key: value})
        onnx.save(model, path)

    for harm, message in HARMS.items():
        folder = tmp_path / harm
        shutil.copytree(ensure_starter("tiny-diarization", cache_dir), folder)
        turns, voices = folder / "model.onnx", folder / "embedding.onnx"
        if harm == "missing":
            turns.unlink()
        elif harm == "no embedding":
            voices.unlink()
        elif harm == "noise":
            turns.write_bytes(np.random.default_rng(0).bytes(5000))
        elif harm == "no number":
            without(turns, "window_size")
        elif harm == "other classes":
            without(turns, "num_classes", "8")
        elif harm == "no framework":
            without(voices, "framework")
        elif harm == "swapped":
            shutil.copy(voices, turns)
        with pytest.raises(LoadFailed, match=message):
            await runtime.load(model_of(source=str(folder)), pytest.fail)
    await runtime.stop()


GOOD = {
    "framework": "3d-speaker",
    "language": "English",
    "output_dim": "192",
    "sample_rate": "16000",
    "normalize_samples": "1",
    "feature_normalize_type": "global-mean",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dim": ""},
        {"output_dim": "-1"},
        {"output_dim": "many"},
        {"sample_rate": "8000"},
        {"language": ""},
        {"feature_normalize_type": "per_feature"},
        {"framework": "nemo"},
        {"framework": "other"},
    ],
)
async def test_metadata_that_would_end_the_process_are_refused(changes: dict[str, str]) -> None:
    check_embedding(GOOD, "voices.onnx")
    with pytest.raises(LoadFailed, match=r"voices\.onnx: "):
        check_embedding({**GOOD, **changes}, "voices.onnx")


async def test_the_shape_of_a_model_of_two_speakers() -> None:
    numbers = {
        "num_speakers": 2,
        "powerset_max_classes": 2,
        "num_classes": 4,
        "sample_rate": RATE,
        "window_size": 1000,
        "receptive_field_size": 100,
        "receptive_field_shift": 50,
    }
    shape = Shape.of(numbers, "a")
    assert shape.powerset.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert list(shape.starts(900)) == [0] and list(shape.starts(1000)) == [0]
    assert list(shape.starts(1001)) == [0, 100] and list(shape.starts(1200)) == [0, 100, 200]


FILES = {
    "someone/turns": {"model.onnx", "model.int8.onnx", "README.md", "export-onnx.py"},
    "someone/voices": {"3dspeaker_en.onnx", "wespeaker_en_CAM++.onnx", "README.md"},
}


async def test_one_file_of_each_repository_is_fetched() -> None:
    model = model_of(
        source="someone/turns",
        segmentation="model.int8.onnx",
        embedding_source="someone/voices",
        embedding="wespeaker_en_CAM++.onnx",
    )
    sources = SherpaDiarizationRuntime.hub_sources(model)
    chosen = {each.repo: choose(FILES[each.repo], each.patterns) for each in sources}
    assert chosen == {
        "someone/turns": ["model.int8.onnx"],
        "someone/voices": ["wespeaker_en_CAM++.onnx"],
    }
    (both,) = SherpaDiarizationRuntime.hub_sources(model_of(source="someone/both"))
    assert both.patterns == ("model.onnx", "embedding.onnx")
    for name in ("../model.onnx", "/model.onnx", "model.bin", "a/../b.onnx"):
        with pytest.raises(ConfigError, match="segmentation"):
            model_of(segmentation=name).options_as(SherpaDiarizationOptions)
