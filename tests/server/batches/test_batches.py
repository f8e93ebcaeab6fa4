"""The Batch API, with the official client over real sockets; records and files are the real ones.

The models are fake. A test that needs time has a clock of its own.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import openai
import pytest
from openai.types import Batch
from pydantic import SecretStr

from engine.engine import Engine
from engine.errors import (
    BudgetExceeded,
    InvalidRequest,
    LoadFailed,
    NoSpaceLeft,
    Overloaded,
    RuntimeFailed,
)
from engine.events import Document, Event, Heard, Segment, Speech
from engine.requests import Priority, SpeechRequest, TextRequest, TranscriptionRequest
from server.app import create_app
from server.batches.input import MAX_ERRORS
from server.batches.line_runner import MAX_ATTEMPTS
from server.batches.record import Batch as Record
from server.batches.record import BatchState, Line, Outcome, Tokens
from server.batches.store import BatchStore
from server.settings import ServerSettings
from server.start import Start
from server.stored_files.record import FileLimits, Purpose, Viewer
from server.stored_files.store import FileStore
from tests.contract.openai import conforms
from tests.server.fake import FakeRuntime, echo, fake_engine, listening

CHAT: Final = "/v1/chat/completions"
SETTINGS = ServerSettings(
    api_keys=(SecretStr("one"), SecretStr("two")),
    admin_keys=(SecretStr("admin"),),
    batch_idle=0.0,
    batch_evict_idle=0.0,
)
LIMIT_S = 30.0


class Gate:
    """An answer of a model that waits until it may go on."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        self.began.set()
        await self.may_end.wait()
        async for event in chat(request):
            yield event


async def chat(request: TextRequest) -> AsyncGenerator[Event, None]:
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    yield Document(json.dumps({"model": request.model, "usage": usage}).encode())


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = FakeRuntime()
    runtime.answer = chat
    return runtime


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return engine_of(runtime, tmp_path)


def engine_of(runtime: FakeRuntime, folder: Path, **more: Any) -> Engine:
    """Four models of 4000 bytes in room for two, one that is broken, and others."""
    models: list[dict[str, Any]] = [
        {"id": f"m{number}", "source": "none", "options": {"nbytes": 4000}} for number in range(4)
    ]
    models[0]["aliases"] = ["gpt-4o"]
    models += [
        {"id": "broken", "source": "none", "options": {"error": "the file is torn"}},
        {"id": "voice", "source": "none", "task": "speech"},
        {"id": "ear", "source": "none", "task": "transcribe"},
    ]
    given = {"models": [{"runtime": "fake", **model} for model in models], **more}
    return fake_engine(runtime, folder, **given)


@asynccontextmanager
async def served(engine: Engine, settings: ServerSettings = SETTINGS) -> AsyncIterator[str]:
    start = Start(engine)
    async with listening(create_app(engine, settings, start)) as url:
        await asyncio.wait_for(start.done.wait(), LIMIT_S)
        yield url


@pytest.fixture
async def url(engine: Engine) -> AsyncIterator[str]:
    async with served(engine) as url:
        yield url


def client_of(url: str, key: str = "one") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(url) as client:
        yield client


def line(custom_id: str, model: str = "m0", url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **body}}


def jsonl(*lines: Any) -> bytes:
    return b"".join(
        (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines
    )


async def submit(sdk: openai.AsyncOpenAI, *lines: Any, endpoint: Any = CHAT, **more: Any) -> Batch:
    file = await sdk.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    batch = await sdk.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        **{"completion_window": "24h", **more},
    )
    assert conforms(batch.to_dict(mode="json"), "Batch")
    return batch


async def begun(sdk: openai.AsyncOpenAI, batch: Batch) -> None:
    """Wait until its lines are validated."""
    async with asyncio.timeout(LIMIT_S):
        while (await sdk.batches.retrieve(batch.id)).status == "validating":
            await sdk.models.list()


async def ended(sdk: openai.AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(LIMIT_S):
        while True:
            batch = await sdk.batches.retrieve(batch.id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                assert conforms(batch.to_dict(mode="json"), "Batch")
                return batch
            await asyncio.sleep(0.005)


async def read(sdk: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file of results by their custom ids, each of which is there once."""
    if file_id is None:
        return {}
    lines = [json.loads(each) for each in (await sdk.files.content(file_id)).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


async def test_a_batch_over_four_models(
    sdk: openai.AsyncOpenAI, url: str, runtime: FakeRuntime
) -> None:
    lines = [line(f"l{n}", f"m{n % 4}") for n in range(40)]
    kept = {"anchor": "created_at", "seconds": 3600}
    batch = await submit(sdk, *lines, metadata={"of": "me"}, output_expires_after=kept)
    assert batch.status == "validating" and batch.metadata == {"of": "me"}
    batch = await ended(sdk, batch)
    assert batch.status == "completed" and batch.errors is None
    assert batch.request_counts is not None and batch.usage is not None
    assert batch.request_counts.to_dict() == {"total": 40, "completed": 40, "failed": 0}
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (120, 80)
    assert batch.usage.input_tokens_details.cached_tokens == 40
    assert batch.usage.total_tokens == 200
    assert batch.completed_at and batch.in_progress_at and batch.finalizing_at
    assert batch.error_file_id is None
    results = await read(sdk, batch.output_file_id)
    assert [*results] == [each["custom_id"] for each in lines]
    for each in lines:
        response = results[each["custom_id"]]["response"]
        assert (response["status_code"], results[each["custom_id"]]["error"]) == (200, None)
        assert response["body"]["model"] == each["body"]["model"]
        assert response["request_id"] == results[each["custom_id"]]["id"]
    # Each model came once: the requests lie in four runs.
    models = [request.model for request in runtime.requests]
    assert sum(a != b for a, b in pairwise(models)) == 3
    assert {request.scheduling.priority for request in runtime.requests} == {Priority.BATCH}
    output = await sdk.files.retrieve(batch.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.expires_at == output.created_at + 3600
    async with httpx.AsyncClient(base_url=url, headers={"x-api-key": "admin"}) as plain:
        metrics = (await plain.get("/metrics")).text
    assert 'roundhouse_batch_lines_done_total{result="completed"} 40.0' in metrics
    assert 'roundhouse_batches{state="running"} 0.0' in metrics


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        ({**line("x"), "custom_id": ""}, "missing_required_parameter", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        ({**line("x"), "method": "GET"}, "invalid_method", "method"),
        (line("x", url="/v1/embeddings"), "invalid_url", "url"),
        ({**line("x"), "body": []}, "invalid_request", "body"),
        ({**line("x"), "more": 1}, "invalid_request", "more"),
        (line("x", "none"), "model_not_found", "body.model"),
        ({**line("x"), "body": {}}, "invalid_request", "body.model"),
        (line("x", stream=True), "invalid_request", "body.stream"),
        (line("x", background=True), "invalid_request", "body.background"),
        (line("x", priority="interactive"), "invalid_request", "body.priority"),
    ],
)
async def test_a_wrong_line_fails_the_batch(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, bad: Any, code: str, param: str | None
) -> None:
    batch = await ended(sdk, await submit(sdk, line("first"), b"", bad, line("last")))
    assert batch.status == "failed" and batch.failed_at
    assert batch.errors is not None and batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.param, error.line) == (code, param, 3)
    assert not runtime.requests
    await sdk.files.delete(batch.input_file_id)


async def test_files_that_are_no_batches(sdk: openai.AsyncOpenAI) -> None:
    for data, code in ((b"\n\n", "empty_file"), (b"x" * 33 * 2**20, "line_too_long")):
        batch = await ended(sdk, await submit(sdk, data))
        assert batch.errors is not None and batch.errors.data is not None
        assert [error.code for error in batch.errors.data] == [code]
    many = await ended(sdk, await submit(sdk, *[b"{}"] * (MAX_ERRORS + 5)))
    assert many.errors is not None and len(many.errors.data or ()) == MAX_ERRORS


async def test_wrong_requests(sdk: openai.AsyncOpenAI) -> None:
    good = (await sdk.files.create(file=("a", jsonl(line("a"))), purpose="batch")).id
    other = (await sdk.files.create(file=("a", b"x"), purpose="user_data")).id
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"input_file_id": other}, 400, "input_file_id"),
        ({"endpoint": "/v1/models"}, 400, "endpoint"),
        ({"completion_window": "1s"}, 400, "completion_window"),
        ({"metadata": {"a": "x" * 600}}, 400, "metadata"),
    ]
    for wrong, status, param in cases:
        given: Any = {
            "input_file_id": good,
            "endpoint": CHAT,
            "completion_window": "24h",
            **wrong,
        }
        with pytest.raises(openai.APIStatusError) as raised:
            await sdk.batches.create(**given)
        assert (raised.value.status_code, raised.value.param) == (status, param)


async def test_lines_that_fail_are_in_the_error_file(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime
) -> None:
    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.body.get("bad"):
            raise InvalidRequest("bad: it cannot be.", param="bad")
        async for event in chat(request):
            yield event

    runtime.answer = answer
    batch = await ended(sdk, await submit(sdk, line("good"), line("bad", bad=True)))
    assert batch.status == "completed" and batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    assert [*await read(sdk, batch.output_file_id)] == ["good"]
    failed = (await read(sdk, batch.error_file_id))["bad"]
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["param"] == "bad"


async def test_what_is_busy_is_tried_again(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    calls = 0

    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Overloaded("Not now.", retry_after_s=1.0)
        async for event in chat(request):
            yield event

    runtime.answer = answer
    batch = await ended(sdk, await submit(sdk, line("a"), line("b")))
    assert batch.request_counts is not None and batch.request_counts.completed == 2
    assert calls == 3


async def test_a_model_that_cannot_be_loaded_is_not_tried_for_each_line(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.batches.line_runner.BACKOFF_S", 0.01)
    tries = 0
    load = runtime.load

    async def counted(model: Any, on_failure: Any) -> Any:
        nonlocal tries
        tries += 1
        return await load(model, on_failure)

    monkeypatch.setattr(runtime, "load", counted)
    batch = await ended(sdk, await submit(sdk, *(line(f"{n}", "broken") for n in range(20))))
    assert batch.request_counts is not None and batch.request_counts.failed == 20
    errors = await read(sdk, batch.error_file_id)
    codes = {each["response"]["body"]["error"]["code"] for each in errors.values()}
    assert codes == {LoadFailed.code}
    assert tries <= 3


async def test_cancel_keeps_what_is_done(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, url: str
) -> None:
    gate = Gate()
    runtime.answer = gate
    batch = await submit(sdk, *(line(f"{n}") for n in range(20)))
    await asyncio.wait_for(gate.began.wait(), LIMIT_S)
    with pytest.raises(openai.ConflictError):
        await sdk.files.delete(batch.input_file_id)
    batch = await sdk.batches.cancel(batch.id)
    assert batch.status == "cancelling" and batch.cancelling_at
    assert (await sdk.batches.cancel(batch.id)).status == "cancelling"
    gate.may_end.set()
    batch = await ended(sdk, batch)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.error_file_id is None
    assert batch.request_counts is not None and 1 <= batch.request_counts.completed < 20
    assert len(await read(sdk, batch.output_file_id)) == batch.request_counts.completed
    await sdk.files.delete(batch.input_file_id)


async def test_a_finished_batch_cannot_be_cancelled(sdk: openai.AsyncOpenAI) -> None:
    batch = await ended(sdk, await submit(sdk, line("a")))
    with pytest.raises(openai.ConflictError):
        await sdk.batches.cancel(batch.id)


async def test_a_key_sees_its_own_batches(url: str, sdk: openai.AsyncOpenAI) -> None:
    batches = [await submit(sdk, line("a")) for _ in range(3)]
    async with client_of(url, "two") as other, client_of(url, "admin") as admin:
        assert (await other.batches.list()).data == []
        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await call(batches[0].id)
        with pytest.raises(openai.NotFoundError):
            await other.batches.create(
                input_file_id=batches[0].input_file_id, endpoint=CHAT, completion_window="24h"
            )
        assert len((await admin.batches.list()).data) == 3
    page = await sdk.batches.list(limit=2)
    assert conforms(page.to_dict(mode="json"), "ListBatchesResponse") and page.has_more
    assert [each.id async for each in sdk.batches.list(limit=2)] == [
        each.id for each in reversed(batches)
    ]


async def test_lines_wait_while_others_wait_or_have_just_run(
    runtime: FakeRuntime, engine: Engine
) -> None:
    settings = SETTINGS.model_copy(update={"batch_idle": 0.3})
    gate = Gate()
    runtime.answer = gate
    async with served(engine, settings) as url, client_of(url) as sdk:
        answering = asyncio.create_task(
            sdk.chat.completions.create(model="m0", messages=[{"role": "user", "content": "x"}])
        )
        await asyncio.wait_for(gate.began.wait(), LIMIT_S)
        batch = await submit(sdk, line("a", "m1"))
        await begun(sdk, batch)
        runtime.answer = chat
        await asyncio.sleep(0.1)  # a line that does not wait would have run
        assert [request.model for request in runtime.requests] == ["m0"]
        gate.may_end.set()
        await answering
        assert engine.activity.unused_s("m0") < 0.3
        assert [request.model for request in runtime.requests] == ["m0"]
        await ended(sdk, batch)
        assert engine.activity.unused_s("m0") >= 0.3


async def test_a_batch_evicts_no_model_that_others_use(
    runtime: FakeRuntime, engine: Engine
) -> None:
    """m0 and m1 fill the device, and m1 is the only one that nobody asked for lately."""
    settings = SETTINGS.model_copy(update={"batch_evict_idle": 60.0})
    async with served(engine, settings) as url, client_of(url) as sdk:
        await ended(sdk, await submit(sdk, line("a", "m1")))
        await sdk.chat.completions.create(model="m0", messages=[])
        await ended(sdk, await submit(sdk, line("a", "m2"), line("b", "m3"), line("c", "m1")))
        assert engine.model_status("m0").tier == "device"
        # Now both are in use by others.
        await sdk.chat.completions.create(model="m1", messages=[])
        batch = await submit(sdk, line("a", "m3"))
        served_before = len(runtime.requests)
        await begun(sdk, batch)
        await asyncio.sleep(0.1)  # a line that does not wait would have run
        assert len(runtime.requests) == served_before
        assert (await sdk.batches.cancel(batch.id)).status in ("cancelling", "cancelled")


async def test_a_batch_goes_on_after_a_restart(tmp_path: Path) -> None:
    runtime, gate = FakeRuntime(), Gate()
    runtime.answer = chat
    first = engine_of(runtime, tmp_path)
    done = 0

    async def some(request: TextRequest) -> AsyncGenerator[Event, None]:
        nonlocal done
        done += 1
        async for event in (chat if done <= 10 else gate)(request):
            yield event

    runtime.answer = some
    async with served(first) as url, client_of(url) as sdk:
        batch = await submit(sdk, *(line(f"{n}", f"m{n % 2}") for n in range(30)))
        await asyncio.wait_for(gate.began.wait(), LIMIT_S)
    later = FakeRuntime()
    later.answer = chat
    async with served(engine_of(later, tmp_path)) as url, client_of(url) as sdk:
        batch = await ended(sdk, batch)
        assert batch.status == "completed"
        results = await read(sdk, batch.output_file_id)
        assert sorted(results, key=int) == [str(n) for n in range(30)]
        assert batch.request_counts is not None and batch.request_counts.completed == 30
    assert len(later.requests) == 20


async def test_expiry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs when the window ends still counts; the rest is in the error file."""
    monkeypatch.setattr("server.batches.batches.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("server.schemas.batches.MIN_WINDOW_S", 0)
    runtime, gate = FakeRuntime(), Gate()
    runtime.answer = gate
    async with served(engine_of(runtime, tmp_path)) as url, client_of(url) as sdk:
        batch = await submit(sdk, *(line(f"{n}") for n in range(20)), completion_window="1s")
        await asyncio.wait_for(gate.began.wait(), LIMIT_S)
        async with asyncio.timeout(LIMIT_S):
            while time.time() < (batch.expires_at or 0) + 0.1:
                await sdk.batches.retrieve(batch.id)
        assert len(runtime.requests) == 1
        gate.may_end.set()
        batch = await ended(sdk, batch)
        assert batch.status == "expired" and batch.expired_at
        output = await read(sdk, batch.output_file_id)
        errors = await read(sdk, batch.error_file_id)
        assert len(output) >= 1 and len(output) + len(errors) == 20
        codes = {each["error"]["code"] for each in errors.values()}
        assert codes == {"batch_expired"}
        assert all(each["response"] is None for each in errors.values())


async def speak(request: SpeechRequest) -> AsyncGenerator[Event, None]:
    yield Speech(np.zeros(2400, np.float32), 24_000, ())


async def test_speech_is_base64(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    runtime.answer = speak
    path = "/v1/audio/speech"
    batch = await submit(
        sdk, line("a", "voice", path, input="Hi", response_format="wav"), endpoint=path
    )
    batch = await ended(sdk, batch)
    body = (await read(sdk, batch.output_file_id))["a"]["response"]["body"]
    assert body["content_type"] == "audio/wav"
    assert base64.b64decode(body["b64"]).startswith(b"RIFF")


async def test_recordings_are_files_or_data_urls(
    url: str, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
) -> None:
    heard: list[TranscriptionRequest] = []

    async def listen(request: TranscriptionRequest) -> AsyncGenerator[Event, None]:
        heard.append(request)
        yield Heard("en", 1.5)
        yield Segment(0, 0.0, 1.5, " Hello.", 0, (1, 2), 0.0, -0.1, 1.0, 0.2)

    runtime.answer = listen
    path = "/v1/audio/transcriptions"
    recording = (await sdk.files.create(file=("a.wav", b"from a file"), purpose="user_data")).id
    data = f"data:audio/wav;base64,{base64.b64encode(b'from a URL').decode()}"
    lines = (
        line("file", "ear", path, file=recording, language="en", temperature=0.5),
        line("url", "ear", path, file=data, response_format="text"),
        line("wrong", "ear", path, file="no file"),
        line("none", "ear", path, file=recording, **{'x"; y': 1}),
    )
    batch = await ended(sdk, await submit(sdk, *lines, endpoint=path))
    results = await read(sdk, batch.output_file_id)
    assert results["file"]["response"]["body"]["text"] == "Hello."
    assert results["url"]["response"]["body"] == "Hello.\n"
    assert sorted(each.audio for each in heard) == [b"from a URL", b"from a file"]
    assert {(each.language, each.temperature) for each in heard} == {("en", 0.5), (None, 0.0)}
    errors = await read(sdk, batch.error_file_id)
    assert errors["wrong"]["response"]["body"]["error"]["param"] == "file"
    assert errors["none"]["response"]["status_code"] == 400

    async with client_of(url, "two") as other:
        wrong = await ended(other, await submit(other, lines[0], endpoint=path))
        assert wrong.errors is not None and wrong.errors.data is not None
        assert (wrong.errors.data[0].code, wrong.errors.data[0].param) == ("not_found", "body.file")


async def test_an_alias_is_the_model(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    runtime.answer = echo
    batch = await ended(sdk, await submit(sdk, line("a", "gpt-4o"), line("b", "m0")))
    assert batch.request_counts is not None and batch.request_counts.completed == 2


async def test_a_model_that_is_there_goes_first(
    url: str, sdk: openai.AsyncOpenAI, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But no batch waits for ever for that."""
    for late_s, expected in ((3600.0, ["m1", "m1", "m0"]), (-10.0, ["m2", "m0", "m2"])):
        monkeypatch.setattr("server.batches.lanes.LATE_S", late_s)
        runtime.requests.clear()
        loaded, other = expected[0], "m0"
        await sdk.chat.completions.create(model=loaded, messages=[])
        async with client_of(url, "admin") as admin:
            await admin.post(f"/engine/models/{other}/unload", cast_to=httpx.Response)
        await ended(sdk, await submit(sdk, line("a", other), line("b", loaded)))
        assert [request.model for request in runtime.requests] == expected


async def test_lines_that_a_death_interrupted_run_alone(tmp_path: Path) -> None:
    runtime, gate = FakeRuntime(), Gate()
    runtime.answer = gate
    folder = tmp_path / "data"
    async with served(engine_of(runtime, tmp_path)) as url, client_of(url) as sdk:
        batch = await submit(sdk, *(line(f"{n}", user=f"{n}") for n in range(6)))
        await asyncio.wait_for(gate.began.wait(), LIMIT_S)
        assert attempts_of(folder)[0] == 1, "noted before it runs"
    assert attempts_of(folder) == [0] * 6, "a stop costs no attempt"
    store = BatchStore(folder)
    lines = store.waiting("m0", [1])
    store.begin(lines[:2])
    for _ in range(MAX_ATTEMPTS):
        store.begin(lines[5:])
    store.close()

    later, running, beside = FakeRuntime(), 0, dict[str, int]()

    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        nonlocal running
        running += 1
        await asyncio.sleep(0.02)
        beside[request.body["user"]] = running
        running -= 1
        async for event in chat(request):
            yield event

    later.answer = answer
    async with served(engine_of(later, tmp_path)) as url, client_of(url) as sdk:
        batch = await ended(sdk, batch)
        errors = await read(sdk, batch.error_file_id)
    assert len(later.requests) == 5
    assert [*errors] == ["5"] and errors["5"]["error"]["code"] == "runtime_failed"
    assert [beside["0"], beside["1"]] == [1, 1]


def attempts_of(folder: Path) -> list[int]:
    store = BatchStore(folder)
    try:
        return [each.attempts for each in store.waiting("m0", [1])]
    finally:
        store.close()


async def test_what_fails_is_tried_again_a_few_times(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.batches.line_runner.BACKOFF_S", 0.01)
    tries: Counter[str] = Counter()

    async def answer(request: TextRequest) -> AsyncGenerator[Event, None]:
        kind = request.body["user"]
        tries[kind] += 1
        if kind == "always" or (kind == "once" and tries[kind] == 1):
            raise RuntimeFailed("It broke.")
        if kind == "spent":
            raise BudgetExceeded("Nothing is left.", retry_after_s=1.0)
        async for event in chat(request):
            yield event

    runtime.answer = answer
    lines = [line(kind, user=kind) for kind in ("always", "once", "spent", "good")]
    batch = await ended(sdk, await submit(sdk, *lines))
    assert tries == {"always": MAX_ATTEMPTS, "once": 2, "spent": 1, "good": 1}
    errors = await read(sdk, batch.error_file_id)
    statuses = {name: each["response"]["status_code"] for name, each in errors.items()}
    assert statuses == {"always": 500, "spent": 429}


def test_a_line_has_one_result(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    made = store.insert(
        Record(
            id="batch_1", owner="me", endpoint=CHAT, input_file_id="file-1",
            completion_window="24h", metadata=None, state=BatchState.VALIDATING,
            created_at=1, expires_at=2, output_expires_s=None,
        )
    )  # fmt: skip
    first = Line(made.sequence, 1, "a", "m0", 0, 1)
    assert store.begin_lines(made, [first], 1).total == 1
    tokens = Tokens(4, 3, 2, 1)
    for ok in (True, False):
        found = store.finish(first, Outcome(ok, b"one\n", tokens))
        assert (found.completed, found.failed, found.tokens) == (1, 0, tokens)
    assert b"".join(store.results(found, ok=True)) == b"one\n"
    store.close()


async def test_a_start_goes_on_with_every_state(tmp_path: Path) -> None:
    """Also with what only a kill leaves. Its key may be gone by then."""
    runtime, gate = FakeRuntime(), Gate()
    runtime.answer = gate
    folder = tmp_path / "data"
    async with served(engine_of(runtime, tmp_path)) as url, client_of(url) as sdk:
        cancelling, running = [await submit(sdk, line(name)) for name in "ab"]
        for batch in (cancelling, running):
            await begun(sdk, batch)
        file = (await sdk.files.create(file=("a", jsonl(line("c"))), purpose="batch")).id
        left = (await sdk.files.create(file=("a", b"x"), purpose="batch")).id
    store, files = BatchStore(folder), FileStore(folder, FileLimits())
    files.open()
    files.hold(left, "batch_gone")
    viewer = Viewer("", sees_all=True)
    record = store.get(viewer, cancelling.id)
    new = dataclasses.replace(
        record, id="batch_new", state=BatchState.VALIDATING, input_file_id=file, total=0
    )
    store.insert(new)
    states = (BatchState.IN_PROGRESS,)
    store.move(record, BatchState.CANCELLING, record.created_at, only_from=states)
    store.close()
    files.close()
    later = FakeRuntime()
    later.answer = chat
    nobody = SETTINGS.model_copy(update={"api_keys": ()})
    async with (
        served(engine_of(later, tmp_path), nobody) as url,
        client_of(url, "admin") as admin,
    ):
        assert (await ended(admin, cancelling)).status == "cancelled"
        running = await ended(admin, running)
        error = (await read(admin, running.error_file_id))["b"]["response"]
        assert error["status_code"] == 401
        made = await ended(admin, await admin.batches.retrieve("batch_new"))
        assert made.status == "failed", "a key that is gone may use no model"
        await admin.files.delete(left)
    assert not later.requests


async def test_a_full_disk_is_waited_for(
    sdk: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.batches.batches.RETRY_S", 0.01)
    create, tries = FileStore.create, 0

    def full_once(self: FileStore, owner: str, purpose: Purpose, *args: Any, **more: Any) -> Any:
        nonlocal tries
        if purpose is Purpose.BATCH_OUTPUT:
            tries += 1
            if tries == 1:
                raise NoSpaceLeft("Nothing is left.")
        return create(self, owner, purpose, *args, **more)

    monkeypatch.setattr(FileStore, "create", full_once)
    batch = await ended(sdk, await submit(sdk, line("a")))
    assert (batch.status, tries) == ("completed", 2)


async def test_the_bounds(
    engine: Engine, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are worth more than the bound of files."""
    monkeypatch.setattr("server.batches.batches.MAX_UNFINISHED", 1)
    settings = SETTINGS.model_copy(update={"max_file_bytes": 150})
    gate = Gate()
    runtime.answer = gate
    async with served(engine, settings) as url, client_of(url) as sdk:
        first = await submit(sdk, line("a"))
        with pytest.raises(openai.RateLimitError, match="unfinished"):
            await submit(sdk, line("a"))
        async with client_of(url, "two") as other:
            await submit(other, line("a"))
        gate.may_end.set()
        first = await ended(sdk, first)
        assert first.status == "completed"
        assert (await sdk.files.retrieve(first.output_file_id or "")).bytes > 150
        await submit(sdk, line("a"))
