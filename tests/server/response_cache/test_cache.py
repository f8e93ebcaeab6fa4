"""What is kept and given again, through the whole server."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from PIL import Image
from pydantic import SecretStr

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Event, Frame
from engine.requests import TextRequest
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine, listening
from tests.server.response_cache.conftest import Caller, Fresh, serving, until
from tests.server.test_connection import Stuck, wait_for
from tests.server.test_pictures import file_of, host, response

CHAT = "/v1/chat/completions"
CACHE = "x-roundhouse-cache"
HELLO = [{"role": "user", "content": "hello"}]
ASK = {"model": "small", "messages": HELLO, "temperature": 0}
FILE = {"file": ("a.wav", b"RIFF")}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def files_below(folder: Path, pattern: str) -> list[Path]:
    return list(folder.rglob(pattern))


def content_of(path: Path) -> bytes:
    """The bytes of a file, and of its journal."""
    return b"".join(each.read_bytes() for each in path.parent.iterdir())


Call = tuple[str, dict[str, Any]]


def of_json(path: str, **body: Any) -> Call:
    return path, {"json": {"model": "small", **body}}


def of_form(path: str, **fields: str) -> Call:
    return path, {"data": {"model": "small", **fields}, "files": FILE}


KEPT = {
    "chat": of_json(CHAT, messages=HELLO, temperature=0),
    "chat with a seed": of_json(CHAT, messages=HELLO, temperature=1, seed=7),
    "streamed chat": of_json(CHAT, messages=HELLO, temperature=0.0, stream=True),
    "completion": of_json("/v1/completions", prompt="once", temperature=0),
    "response": of_json("/v1/responses", input="hello", temperature=0),
    "streamed response": of_json("/v1/responses", input="hello", temperature=0, stream=True),
    "message": of_json("/v1/messages", messages=HELLO, max_tokens=4, temperature=0),
    "embedding": of_json("/v1/embeddings", input="hello"),
    "tokens": of_json("/v1/embeddings", input=[[1, 2], [3]]),
    "rerank": of_json("/v1/rerank", query="hello", documents=["a", "b"]),
    "image": of_json("/v1/images/generations", prompt="a train", seed=3),
    "streamed image": of_json("/v1/images/generations", prompt="a train", seed=3, stream=True),
    "speech": of_json("/v1/audio/speech", input="All aboard!", seed=3),
    "events of speech": of_json(
        "/v1/audio/speech", input="All aboard!", seed=3, stream_format="sse"
    ),
    "transcription": of_form("/v1/audio/transcriptions"),
    "streamed transcription": of_form("/v1/audio/transcriptions", stream="true"),
    "subtitles": of_form("/v1/audio/translations", response_format="vtt", temperature="0"),
}

NOT_KEPT = {
    "chat at the model's own temperature": of_json(CHAT, messages=HELLO),
    "warm chat": of_json(CHAT, messages=HELLO, temperature=0.1),
    "chat with a wrong temperature": of_json(CHAT, messages=HELLO, temperature=False),
    "hosted tool": of_json(
        CHAT, messages=HELLO, temperature=0, tools=[{"type": "web_search_preview"}]
    ),
    "tokenize": of_json("/tokenize", prompt="hello", temperature=0),
    "image without a seed": of_json("/v1/images/generations", prompt="a train"),
    "image behind a URL": of_json(
        "/v1/images/generations", prompt="a train", seed=3, response_format="url"
    ),
    "speech without a seed": of_json("/v1/audio/speech", input="All aboard!"),
    "warm transcription": of_form("/v1/audio/transcriptions", temperature="0.2"),
}


@pytest.mark.parametrize("name", KEPT)
async def test_an_equal_request_gets_the_same_answer(
    caller: Caller, fresh: Fresh, name: str
) -> None:
    path, request = KEPT[name]
    first = await caller.post(path, **request)
    assert first.headers[CACHE] == "miss"
    await caller.until(1)
    second = await caller.post(path, **request)
    assert second.headers[CACHE] == "hit"
    assert second.content == first.content
    assert second.headers["content-type"] == first.headers["content-type"]
    assert ("content-length" in second.headers) is ("content-length" in first.headers)
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert "x-roundhouse-run-ms" not in second.headers
    assert fresh.runs == 1


@pytest.mark.parametrize("name", NOT_KEPT)
async def test_what_has_many_answers_is_not_kept(caller: Caller, fresh: Fresh, name: str) -> None:
    path, request = NOT_KEPT[name]
    for _ in range(2):
        assert CACHE not in (await caller.post(path, **request)).headers
    assert fresh.runs == 2
    # One thread writes in order: what came before would be there now.
    await caller.post(CHAT, json=ASK)
    await caller.until(1)
    requests = (await caller.status())["requests"]
    assert requests == {"hit": 0, "miss": 1, "refresh": 0, "off": 0, "uncacheable": 2}


async def test_a_stream_is_replayed_in_its_pieces(engine: Engine, settings: ServerSettings) -> None:
    app = create_app(engine, settings)
    body = b'{"model": "small", "messages": [], "seed": 1, "stream": true}'

    async def messages() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(dict(message))

        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
            "query_string": b"", "headers": [(b"host", b"localhost")], "state": {},
        }  # fmt: skip
        await app(scope, receive, send)
        return sent

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000"
        ) as client,
    ):
        first = await messages()
        await Caller(client).until(1)
        second = await messages()
    assert second[1:] == first[1:]
    assert len(second) == 6  # the head, four events, the end
    kept = {b"content-type", b"cache-control", b"x-accel-buffering"}
    assert kept <= {name for name, _ in second[0]["headers"]}


async def test_options_of_scheduling_are_no_part_of_the_request(
    caller: Caller, fresh: Fresh
) -> None:
    await caller.post(CHAT, json={**ASK, "priority": "batch", "timeout": "9s"})
    await caller.until(1)
    headers = {"x-roundhouse-priority": "interactive", "x-roundhouse-if-loaded-only": "true"}
    turned = dict(reversed(ASK.items()))
    answer = await caller.post(CHAT, json={**turned, "keep_alive": 0}, headers=headers)
    assert answer.headers[CACHE] == "hit"
    assert fresh.runs == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2}, {"seed": 1}, {"model": "other"}, {"model": "gpt-4o"}, {"stream": True},
        {"messages": [{"role": "user", "content": "Hello"}]}, {"user": "anna"},
        {"temperature": 0, "top_p": 0.5},
    ],
)  # fmt: skip
async def test_any_other_field_makes_another_request(
    caller: Caller, fresh: Fresh, change: dict[str, Any]
) -> None:
    await caller.post(CHAT, json=ASK)
    await caller.until(1)
    assert (await caller.post(CHAT, json={**ASK, **change})).headers[CACHE] == "miss"
    assert fresh.runs == 2


async def test_another_endpoint_makes_another_request(caller: Caller, fresh: Fresh) -> None:
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages"):
        assert (await caller.post(path, json=ASK)).headers[CACHE] == "miss"
    await caller.until(4)


async def test_another_file_makes_another_request(caller: Caller, fresh: Fresh) -> None:
    path, request = KEPT["transcription"]
    await caller.post(path, **request)
    await caller.until(1)
    other = {**request, "files": {"file": ("a.wav", b"RIFX")}}
    assert (await caller.post(path, **other)).headers[CACHE] == "miss"
    renamed = {**request, "files": {"file": ("b.wav", b"RIFF")}}
    assert (await caller.post(path, **renamed)).headers[CACHE] == "hit"


async def test_a_large_upload_is_not_kept(
    caller: Caller, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.response_cache.cache.MAX_UPLOAD_BYTES", 3)
    path, request = KEPT["transcription"]
    assert CACHE not in (await caller.post(path, **request)).headers


async def test_an_image_behind_a_url_counts_by_its_content(
    engine: Engine, cache_file: Path, fresh: Fresh
) -> None:
    pictures = [file_of(Image.new("RGB", (4, 4), each)) for each in ("red", "red", "blue")]

    async def show(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(response(pictures.pop(0)))

    async with host(show) as (address, _):
        settings = ServerSettings(
            response_cache=str(cache_file),
            allowed_media_hosts=(address,),
            private_media_hosts=(address,),
        )
        part = {"type": "image_url", "image_url": {"url": f"http://{address}/a.png"}}
        ask = {**ASK, "messages": [{"role": "user", "content": [part]}]}
        async with serving(engine, settings) as caller:
            assert (await caller.post(CHAT, json=ask)).headers[CACHE] == "miss"
            await caller.until(1)
            for state in ("hit", "miss"):
                assert (await caller.post(CHAT, json=ask)).headers[CACHE] == state


class TestTheHeader:
    async def test_off(self, caller: Caller, fresh: Fresh) -> None:
        await caller.post(CHAT, json=ASK)
        await caller.until(1)
        answer = await caller.post(CHAT, json=ASK, headers={CACHE: "Off"})
        assert CACHE not in answer.headers
        assert answer.json() == {"run": 2}
        assert (await caller.post(CHAT, json=ASK)).json() == {"run": 1}

    async def test_refresh(self, caller: Caller, fresh: Fresh) -> None:
        await caller.post(CHAT, json=ASK)
        await caller.until(1)
        answer = await caller.post(CHAT, json=ASK, headers={CACHE: "refresh"})
        assert answer.headers[CACHE] == "refresh"
        assert answer.json() == {"run": 2}

        async def replaced() -> bool:
            return bool((await caller.post(CHAT, json=ASK)).json() == {"run": 2})

        await until(replaced)
        assert (await caller.status())["entries"] == 1

    @pytest.mark.parametrize("value", ["on", "", "no-store"])
    async def test_another_value_is_refused(self, caller: Caller, fresh: Fresh, value: str) -> None:
        for path, request in (KEPT["chat"], NOT_KEPT["image behind a URL"]):
            answer = await caller.client.post(path, **request, headers={CACHE: value})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == CACHE
        assert fresh.runs == 0


class TestWhatFailsIsNotKept:
    async def test_error_before_the_answer(self, caller: Caller, runtime: FakeRuntime) -> None:
        ask = {**ASK, "model": "broken"}
        for _ in range(2):
            answer = await caller.client.post(CHAT, json=ask)
            assert answer.status_code == 500
            assert CACHE not in answer.headers
        missing = await caller.client.post(CHAT, json={**ASK, "model": "nothing"})
        assert missing.json()["error"]["code"] == "model_not_found"

    async def test_error_in_a_stream(
        self, caller: Caller, runtime: FakeRuntime, fresh: Fresh
    ) -> None:
        async def torn(request: TextRequest) -> AsyncGenerator[Event, None]:
            yield Frame("data: one\n\n")
            raise RuntimeFailed("it broke")

        runtime.answer = torn
        ask = {**ASK, "stream": True}
        broken = await caller.post(CHAT, json=ask)
        assert "it broke" in broken.text
        runtime.answer = fresh
        answer = await caller.post(CHAT, json=ask)
        assert answer.headers[CACHE] == "miss"
        assert "it broke" not in answer.text
        await caller.until(1)

    async def test_client_leaves_half_way(
        self, app: Any, url: str, runtime: FakeRuntime, fresh: Fresh
    ) -> None:
        stuck = runtime.answer = Stuck("data: one\n\n")
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            async with client.stream("POST", CHAT, json={**ASK, "stream": True}) as answer:
                assert answer.headers[CACHE] == "miss"
                await anext(answer.aiter_bytes())
            await wait_for(stuck.ended)
            runtime.answer = fresh
            caller = Caller(client)
            again = await caller.post(CHAT, json={**ASK, "stream": True})
            assert again.headers[CACHE] == "miss"
            assert "[DONE]" in again.text
            await caller.until(1)

    async def test_answer_that_is_too_long(self, engine: Engine, cache_file: Path) -> None:
        settings = ServerSettings(response_cache=str(cache_file), response_cache_size=1000)
        async with serving(engine, settings) as caller:
            path, request = KEPT["speech"]
            await caller.post(path, **request)
            await caller.post(CHAT, json=ASK)
            await caller.until(1)
            assert (await caller.post(CHAT, json=ASK)).headers[CACHE] == "hit"


class TestWhose:
    KEYS = (SecretStr("first"), SecretStr("second"))

    async def ask(self, caller: Caller, key: str) -> str:
        headers = {"authorization": f"Bearer {key}"}
        return (await caller.post(CHAT, json=ASK, headers=headers)).headers[CACHE]

    @pytest.mark.parametrize(("shared", "second"), [(False, "miss"), (True, "hit")])
    async def test_a_key_gets_its_own_answers(
        self, engine: Engine, cache_file: Path, shared: bool, second: str
    ) -> None:
        settings = ServerSettings(
            api_keys=self.KEYS, response_cache=str(cache_file), response_cache_shared=shared
        )
        async with serving(engine, settings, **{"x-api-key": "first"}) as caller:
            headers = caller.client.headers
            assert await self.ask(caller, "first") == "miss"
            await caller.until(1)
            assert await self.ask(caller, "first") == "hit"
            headers["x-api-key"] = "second"
            assert await self.ask(caller, "second") == second
        assert not any(word in content_of(cache_file) for word in (b"first", b"second", b"hello"))


class TestForgetting:
    async def hits(self, engine: Engine, settings: ServerSettings, ask: Any = ASK) -> str:
        async with serving(engine, settings) as caller:
            entries = (await caller.status())["entries"]
            answer = await caller.post(CHAT, json=ask)
            if answer.headers[CACHE] == "miss":
                await caller.until(entries + 1)
            return answer.headers[CACHE]

    async def test_a_restart_forgets_nothing(
        self, runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh
    ) -> None:
        for expected in ("miss", "hit"):
            assert await self.hits(fake_engine(runtime, tmp_path), settings) == expected

    async def test_changed_options_of_the_model(
        self, runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh
    ) -> None:
        def engine(**model: object) -> Engine:
            own = {"id": "small", "runtime": "fake", "source": "none", **model}
            return fake_engine(runtime, tmp_path, models=[own])

        assert await self.hits(engine(), settings) == "miss"
        assert await self.hits(engine(options={"nbytes": 1001}), settings) == "miss"
        assert await self.hits(engine(source="other"), settings) == "miss"
        assert await self.hits(engine(pin=True, keep_alive=1, aliases=["b"]), settings) == "hit"

    async def test_newer_files(
        self, runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh
    ) -> None:
        folder = tmp_path / "weights"
        write(folder / "config.json", "{}")
        model = {"id": "small", "runtime": "fake", "source": str(folder)}
        engine = fake_engine(runtime, tmp_path, models=[model])
        async with serving(engine, settings) as caller:
            await caller.post(CHAT, json=ASK)
            await caller.until(1)
            write(folder / "config.json", '{"newer": 1}')
            # The loaded model is the old one: nobody may get its answers for those of the new one.
            answer = await caller.post(CHAT, json=ASK)
            assert answer.json() == {"run": 2}
            assert CACHE not in answer.headers
            await caller.post("/v1/engine/models/small/unload")
            assert (await caller.post(CHAT, json=ASK)).headers[CACHE] == "miss"
            await caller.until(2)
            assert (await caller.post(CHAT, json=ASK)).json() == {"run": 3}

    async def test_files_that_change_during_a_run(
        self, runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh
    ) -> None:
        folder = tmp_path / "weights"
        write(folder / "config.json", "{}")
        models = [
            {"id": "small", "runtime": "fake", "source": str(folder)},
            {"id": "other", "runtime": "fake", "source": "none"},
        ]

        async def changing(request: TextRequest) -> AsyncGenerator[Event, None]:
            write(folder / "config.json", '{"newer": 1}')
            async for event in fresh(request):
                yield event

        runtime.answer = changing
        async with serving(fake_engine(runtime, tmp_path, models=models), settings) as caller:
            await caller.post(CHAT, json=ASK)
            await caller.post(CHAT, json={**ASK, "model": "other"})
            await caller.until(1)

    async def test_an_admin_empties_it(self, caller: Caller, fresh: Fresh) -> None:
        await caller.post(CHAT, json=ASK)
        await caller.until(1)
        answer = await caller.client.delete("/v1/engine/cache")
        assert answer.json() == {"removed_entries": 1}
        await caller.until(0)
        assert (await caller.post(CHAT, json=ASK)).headers[CACHE] == "miss"

    async def test_what_ran_before_it_was_emptied_is_not_kept(
        self, url: str, runtime: FakeRuntime, fresh: Fresh
    ) -> None:
        began, go_on = asyncio.Event(), asyncio.Event()

        async def slow(request: TextRequest) -> AsyncGenerator[Event, None]:
            began.set()
            await go_on.wait()
            async for event in fresh(request):
                yield event

        runtime.answer = slow
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            caller = Caller(client)
            call = asyncio.create_task(caller.post(CHAT, json=ASK))
            await wait_for(began)
            await client.delete("/v1/engine/cache")
            go_on.set()
            await call
            await caller.post(CHAT, json={**ASK, "n": 2})
            await caller.until(1)

    async def test_only_an_admin_empties_it(self, engine: Engine, cache_file: Path) -> None:
        settings = ServerSettings(api_keys=(SecretStr("user"),), response_cache=str(cache_file))
        async with serving(engine, settings, **{"x-api-key": "user"}) as caller:
            assert (await caller.status())["store"] == "sqlite"
            assert (await caller.client.delete("/v1/engine/cache")).status_code == 403


class TestOff:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings()

    async def test_nothing_is_kept(self, caller: Caller, fresh: Fresh, tmp_path: Path) -> None:
        for _ in range(2):
            answer = await caller.post(CHAT, json=ASK, headers={CACHE: "refresh"})
            assert CACHE not in answer.headers
        assert fresh.runs == 2
        assert await caller.status() == {"store": "off"}
        assert (await caller.client.delete("/v1/engine/cache")).json() == {"removed_entries": 0}
        assert "response_cache" not in (await caller.client.get("/metrics")).text
        assert not files_below(tmp_path, "response-cache*")


async def test_metrics(caller: Caller) -> None:
    await caller.post(CHAT, json=ASK)
    await caller.until(1)
    await caller.post(CHAT, json=ASK)
    text = (await caller.client.get("/metrics")).text
    assert 'roundhouse_response_cache_requests_total{result="hit"} 1.0' in text
    assert 'roundhouse_response_cache_requests_total{result="miss"} 1.0' in text
    assert "roundhouse_response_cache_entries 1.0" in text
    status = await caller.status()
    assert f"roundhouse_response_cache_bytes {status['bytes']:.1f}" in text
    assert status["requests"]["hit"] == 1


async def test_a_starter_says_of_a_kept_answer_too_that_it_means_nothing(
    runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh
) -> None:
    model = {"id": "small", "runtime": "fake", "source": "starter:tiny-llama"}
    async with serving(fake_engine(runtime, tmp_path, models=[model]), settings) as caller:
        await caller.post(CHAT, json=ASK)
        await caller.until(1)
        answer = await caller.post(CHAT, json=ASK)
        assert answer.headers[CACHE] == "hit"
        assert answer.headers["x-roundhouse-weights"] == "random"


async def test_a_stream_that_waited_is_replayed_without_its_wait(
    runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("server.answer.GRACE_S", 0.0)
    runtime.may_start.clear()
    model = {"id": "small", "runtime": "fake", "source": "starter:tiny-llama"}
    app = create_app(fake_engine(runtime, tmp_path, models=[model]), settings)
    ask = {**ASK, "stream": True}
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        try:
            async with client.stream("POST", CHAT, json=ask) as answer:
                pieces = answer.aiter_text()
                assert (await anext(pieces)).startswith(": starting")
                runtime.may_start.set()
                text = "".join([piece async for piece in pieces])
        finally:
            runtime.may_start.set()
        assert "x-roundhouse-weights" not in answer.headers
        caller = Caller(client)
        await caller.until(1)
        again = await caller.post(CHAT, json=ask)
    assert again.headers[CACHE] == "hit"
    assert again.headers["x-roundhouse-weights"] == "random"
    assert again.text.startswith("data: ")
    assert text.endswith(again.text)


class TestBadFiles:
    async def test_a_broken_file_turns_it_off(
        self, engine: Engine, settings: ServerSettings, cache_file: Path, fresh: Fresh,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        write(cache_file, "not a database " * 1000)
        with caplog.at_level(logging.WARNING):
            async with serving(engine, settings) as caller:
                for _ in range(2):
                    assert CACHE not in (await caller.post(CHAT, json=ASK)).headers
                assert (await caller.status())["off_reason"] == "file is not a database"
                assert (await caller.client.delete("/v1/engine/cache")).status_code == 409
        assert fresh.runs == 2
        assert len([each for each in caplog.messages if "response cache" in each]) == 1

    async def test_a_folder_that_cannot_be_made(
        self, engine: Engine, tmp_path: Path, fresh: Fresh
    ) -> None:
        write(tmp_path / "file", "")
        settings = ServerSettings(response_cache=str(tmp_path / "file" / "response-cache.sqlite3"))
        async with serving(engine, settings) as caller:
            assert CACHE not in (await caller.post(CHAT, json=ASK)).headers

    async def test_a_damaged_answer_is_never_served(
        self, runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, cache_file: Path,
        fresh: Fresh,
    ) -> None:  # fmt: skip
        async with serving(fake_engine(runtime, tmp_path), settings) as caller:
            await caller.post(CHAT, json=ASK)
            await caller.until(1)
        with sqlite3.connect(cache_file) as connection:
            (content,) = connection.execute("SELECT content FROM entries").fetchone()
            damaged = content.replace(b'"run": 1', b'"run": 7')
            assert damaged != content
            connection.execute("UPDATE entries SET content = ?", (damaged,))
        connection.close()
        async with serving(fake_engine(runtime, tmp_path), settings) as caller:
            answer = await caller.post(CHAT, json=ASK)
            assert answer.headers[CACHE] == "miss"
            assert answer.json() == {"run": 2}

            async def replaced() -> bool:
                return (await caller.post(CHAT, json=ASK)).headers[CACHE] == "hit"

            await until(replaced)


class TestSdks:
    @pytest.fixture
    async def sdk(self, url: str) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            yield client

    async def test_openai(self, url: str, sdk: openai.AsyncOpenAI, fresh: Fresh) -> None:
        texts, outcomes = [], []
        async with httpx.AsyncClient(base_url=url) as client:
            for _ in range(2):
                streamed = await sdk.chat.completions.with_raw_response.create(
                    model="small", messages=HELLO, temperature=0, stream=True,  # type: ignore[arg-type]
                )  # fmt: skip
                outcomes.append(streamed.headers[CACHE])
                chunks: Any = streamed.parse()
                texts.append([chunk.to_dict() async for chunk in chunks])
                await Caller(client).until(1)
        assert outcomes == ["miss", "hit"]
        assert texts[0] == texts[1]
        assert [chunk["word"] for chunk in texts[0]] == ["one", "two", "1"]
        speech = [
            await sdk.audio.speech.create(
                model="small", voice="alloy", input="Hello", extra_body={"seed": 1}
            )
        ]
        assert speech[0].content
        assert fresh.runs == 2

    async def test_anthropic(self, url: str, fresh: Fresh) -> None:
        outcomes = []
        async with (
            httpx.AsyncClient(base_url=url) as client,
            anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as claude,
        ):
            for _ in range(2):
                answer = await claude.messages.with_raw_response.create(
                    model="small", max_tokens=8, messages=HELLO,  # type: ignore[arg-type]
                    extra_body={"temperature": 0},
                )  # fmt: skip
                outcomes.append(answer.headers[CACHE])
                assert answer.headers["request-id"] == answer.headers["x-request-id"]
                await Caller(client).until(1)
        assert outcomes == ["miss", "hit"]


async def test_a_hit_needs_no_engine(
    engine: Engine, runtime: FakeRuntime, tmp_path: Path, settings: ServerSettings, fresh: Fresh
) -> None:
    async with serving(engine, settings) as caller:
        await caller.post(CHAT, json=ASK)
        await caller.until(1)
    runtime.may_start.clear()
    app = create_app(fake_engine(runtime, tmp_path), settings)
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        try:
            assert (await client.post(CHAT, json=ASK)).json() == {"run": 1}
            engine_status = (await client.get("/v1/engine")).json()
            assert engine_status["state"] == "starting"
        finally:
            runtime.may_start.set()
