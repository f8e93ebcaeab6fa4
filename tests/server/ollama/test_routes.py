"""Ollama's routes over the fake runtime: what reaches the engine, and what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from engine.engine import Engine
from engine.errors import InvalidRequest, RuntimeFailed
from engine.events import Document, Event, Frame
from engine.files.hub.fetch import FetchProgress
from engine.requests import Priority, TextOperation, TextRequest
from server.app import create_app
from server.routes import ollama as routes
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.test_connection import TIMEOUT_S

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
"""One red pixel."""
HELLO = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": "small", "messages": HELLO}
USAGE = {"prompt_tokens": 7, "completion_tokens": 2}


def frame(**document: Any) -> Frame:
    return Frame(f"data: {json.dumps(document)}\n\n")


def chunk(reason: str | None = None, **delta: Any) -> Frame:
    return frame(choices=[{"index": 0, "delta": delta, "finish_reason": reason}])


async def speak(request: TextRequest) -> AsyncGenerator[Event, None]:
    """What vLLM gives: for a chat, a completion, or embeddings."""
    body = request.body
    if request.operation is TextOperation.EMBEDDINGS:
        data = [{"index": i, "embedding": [float(i), 0.5]} for i in range(len(body["input"]))]
        yield Document(json.dumps({"data": data[::-1], "usage": {"prompt_tokens": 4}}).encode())
    elif request.operation is TextOperation.COMPLETION:
        for text, reason in (("On", None), ("ce", "length")):
            yield frame(choices=[{"index": 0, "text": text, "finish_reason": reason}])
        yield frame(choices=[], usage=USAGE)
        yield Frame("data: [DONE]\n\n")
    elif not body.get("stream"):
        message = {"role": "assistant", "content": "Hello", "tool_calls": []}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        yield Document(json.dumps({"choices": [choice], "usage": USAGE}).encode())
    else:
        yield chunk(role="assistant", content="")
        yield chunk(reasoning="Hm.")
        yield chunk(content="Hel")
        yield chunk("stop", content="lo")
        yield frame(choices=[], usage=USAGE)
        yield Frame("data: [DONE]\n\n")


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = FakeRuntime()
    runtime.answer = speak
    return runtime


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return fake_engine(runtime, tmp_path, routes=[{"id": "auto", "choose": ["small", "other"]}])


async def lines(client: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


class TestAnswers:
    async def test_a_chat_is_streamed_by_default(self, client: httpx.AsyncClient) -> None:
        *parts, end = await lines(client, "/api/chat", **CHAT)
        assert [part["message"] for part in parts] == [
            {"role": "assistant", "content": "", "thinking": "Hm."},
            {"role": "assistant", "content": "Hel"},
            {"role": "assistant", "content": "lo"},
        ]
        assert {part["done"] for part in parts} == {False}
        assert end["done"] is True
        assert (end["done_reason"], end["message"]["content"]) == ("stop", "")
        assert (end["prompt_eval_count"], end["eval_count"]) == (7, 2)
        assert end["total_duration"] >= end["load_duration"] + end["eval_duration"] > 0
        for part in (*parts, end):
            assert part["model"] == "small"
            assert datetime.fromisoformat(part["created_at"]).tzinfo is not None

    async def test_a_whole_chat_is_one_document(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        answer = await client.post("/api/chat", json={**CHAT, "stream": False})
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-roundhouse-served-by"] == "small"
        found = answer.json()
        assert found["message"] == {"role": "assistant", "content": "Hello", "thinking": "Hm."}
        assert (found["done"], found["eval_count"]) == (True, 2)
        assert found["prompt_eval_duration"] > 0
        assert runtime.requests[0].body["stream"] is True

    async def test_generate_is_a_chat_unless_it_is_raw(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        *parts, end = await lines(client, "/api/generate", model="small", prompt="Hi", system="Be")
        assert "".join(part["response"] for part in parts) == "Hello"
        assert (end["response"], end["done_reason"]) == ("", "stop")
        raw = {"model": "small", "prompt": "On", "raw": True, "stream": False}
        found = (await client.post("/api/generate", json=raw)).json()
        assert (found["response"], found["done_reason"]) == ("Once", "length")
        chat, completion = runtime.requests
        assert chat.operation is TextOperation.CHAT
        assert chat.body["messages"] == [
            {"role": "system", "content": "Be"},
            {"role": "user", "content": "Hi"},
        ]
        assert completion.operation is TextOperation.COMPLETION
        assert completion.body["prompt"] == "On"
        assert completion.body["max_tokens"] is None

    async def test_calls_of_tools_come_whole_and_their_arguments_are_objects(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def call(request: TextRequest) -> AsyncGenerator[Event, None]:
            calls = [{"id": "a", "function": {"name": "f", "arguments": '{"x": [1]}'}}]
            if not request.body.get("stream"):
                choice = {"message": {"content": None, "tool_calls": calls}}
                document = {"choices": [{**choice, "finish_reason": "tool_calls"}], "usage": USAGE}
                yield Document(json.dumps(document).encode())
                return
            yield chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f"}}])
            for text in ('{"x": ', "[1]}"):
                yield chunk(tool_calls=[{"index": 0, "function": {"arguments": text}}])
            yield chunk("tool_calls")

        runtime.answer = call
        tools = [{"function": {"name": "f", "parameters": {"type": "object"}}}]
        wanted = [{"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": [1]}}}]
        part, end = await lines(client, "/api/chat", **CHAT, tools=tools)
        assert part["message"] == {"role": "assistant", "content": "", "tool_calls": wanted}
        assert "tool_calls" not in end["message"]
        assert (part["done"], end["done_reason"]) == (False, "stop")
        body = {**CHAT, "tools": tools, "stream": False}
        found = (await client.post("/api/chat", json=body)).json()
        assert found["message"]["tool_calls"] == wanted
        assert found["eval_duration"] > 0
        assert runtime.requests[0].body["tools"][0]["type"] == "function"

    async def test_a_call_that_was_cut_is_text(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def call(_: TextRequest) -> AsyncGenerator[Event, None]:
            function = {"name": "f", "arguments": '{"x": '}
            yield chunk("length", tool_calls=[{"index": 0, "id": "a", "function": function}])

        runtime.answer = call
        part, end = await lines(client, "/api/chat", **CHAT)
        assert part["message"] == {"role": "assistant", "content": '{"x": '}
        assert end["done_reason"] == "length"

    async def test_a_frame_may_hold_several_events_and_any_separator(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        text = "a\u2028b\x85c"

        async def answer(_: TextRequest) -> AsyncGenerator[Event, None]:
            document = {"choices": [{"delta": {"content": text}}]}
            data = f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
            yield Frame(f": a comment\n\n{data}{data}data: [DONE]\n\n")

        runtime.answer = answer
        found = (await client.post("/api/chat", json={**CHAT, "stream": False})).json()
        assert found["message"]["content"] == 2 * text

    async def test_logprobs(self, client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
        async def answer(_: TextRequest) -> AsyncGenerator[Event, None]:
            token = {"token": "a", "logprob": -1.0, "bytes": [97]}
            found = {"content": [{**token, "top_logprobs": [token]}]}
            choice = {"delta": {"content": "a"}, "logprobs": found, "finish_reason": "stop"}
            yield frame(choices=[choice])

        runtime.answer = answer
        body = {**CHAT, "logprobs": True, "top_logprobs": 1, "stream": False}
        found = (await client.post("/api/chat", json=body)).json()
        token = {"token": "a", "logprob": -1.0, "bytes": [97]}
        assert found["logprobs"] == [{**token, "top_logprobs": [token]}]
        assert runtime.requests[0].body["top_logprobs"] == 1

    async def test_embeddings(self, client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
        found = (
            await client.post("/api/embed", json={"model": "small", "input": ["a", "b"]})
        ).json()
        assert found["embeddings"] == [[0.0, 0.5], [1.0, 0.5]]
        assert found["prompt_eval_count"] == 4 and found["total_duration"] > 0
        body = {"model": "small", "input": "a", "truncate": False, "dimensions": 2}
        assert len((await client.post("/api/embed", json=body)).json()["embeddings"]) == 1
        former = await client.post("/api/embeddings", json={"model": "small", "prompt": "a"})
        assert former.json() == {"embedding": [0.0, 0.5]}
        first, second, _ = (request.body for request in runtime.requests)
        assert first["truncate_prompt_tokens"] == -1 and "dimensions" not in first
        assert second["dimensions"] == 2 and "truncate_prompt_tokens" not in second
        empty = (await client.post("/api/embed", json={"model": "small", "input": ""})).json()
        assert empty == {"model": "small", "embeddings": []}


class TestDisconnect:
    async def test_the_work_ends_with_the_client(self, url: str, runtime: FakeRuntime) -> None:
        ended = asyncio.Event()

        async def go_on(_: TextRequest) -> AsyncGenerator[Event, None]:
            try:
                yield chunk(content="Hel")
                await asyncio.Event().wait()
            finally:
                ended.set()

        runtime.answer = go_on
        async with (
            httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client,
            client.stream("POST", "/api/chat", json=CHAT) as answer,
        ):
            assert json.loads(await anext(answer.aiter_lines()))["message"]["content"] == "Hel"
            assert not ended.is_set()
        async with asyncio.timeout(TIMEOUT_S):
            await ended.wait()

    async def test_embeddings_end_too(self, url: str, runtime: FakeRuntime) -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def go_on(_: TextRequest) -> AsyncGenerator[Event, None]:
            try:
                began.set()
                await asyncio.Event().wait()
                yield chunk()
            finally:
                ended.set()

        runtime.answer = go_on
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client,
        ):
            body = {"model": "small", "input": "a"}
            call = asyncio.create_task(client.post("/api/embed", json=body))
            await began.wait()
            assert not ended.is_set()
            call.cancel()
            await ended.wait()


class TestErrors:
    async def test_before_the_first_line_it_has_a_status(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def fail(_: TextRequest) -> AsyncGenerator[Event, None]:
            raise InvalidRequest(
                "max_completion_tokens must be small", param="max_completion_tokens"
            )
            yield

        runtime.answer = fail
        answer = await client.post("/api/chat", json=CHAT)
        assert answer.status_code == 400
        assert answer.json() == {"error": "options.num_predict must be small"}

    async def test_an_error_of_embeddings_names_the_clients_field(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def fail(_: TextRequest) -> AsyncGenerator[Event, None]:
            raise InvalidRequest("input is too long", param="input")
            yield

        runtime.answer = fail
        answer = await client.post("/api/embeddings", json={"model": "small", "prompt": "a"})
        assert (answer.status_code, answer.json()) == (400, {"error": "prompt is too long"})

    async def test_later_it_is_the_last_line(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def fail(_: TextRequest) -> AsyncGenerator[Event, None]:
            yield chunk(content="Hel")
            raise RuntimeFailed("The library failed.")

        runtime.answer = fail
        part, end = await lines(client, "/api/chat", **CHAT)
        assert part["message"]["content"] == "Hel"
        assert end == {"error": "The library failed."}
        answer = await client.post("/api/chat", json={**CHAT, "stream": False})
        assert (answer.status_code, answer.json()) == (500, {"error": "The library failed."})

    async def test_an_error_in_a_frame_is_an_error(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def fail(_: TextRequest) -> AsyncGenerator[Event, None]:
            yield frame(error={"message": "It broke."})

        runtime.answer = fail
        answer = await client.post("/api/chat", json=CHAT)
        assert (answer.status_code, answer.json()) == (500, {"error": "It broke."})

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            *(("POST", f"/api/{name}") for name in ("chat", "generate", "show", "pull")),
            ("POST", "/api/embed"),
            ("POST", "/api/embeddings"),
            ("DELETE", "/api/delete"),
        ],
    )
    async def test_an_unknown_model_is_404(
        self, client: httpx.AsyncClient, method: str, path: str
    ) -> None:
        body = {"model": "nobody:7b", **({"input": "a"} if path == "/api/embed" else {})}
        answer = await client.request(method, path, json=body)
        assert answer.status_code == 404
        assert answer.json() == {"error": "model 'nobody:7b' not found"}

    @pytest.mark.parametrize(
        ("path", "body", "field"),
        [
            ("/api/chat", {"options": {"mirostat": 2}}, "options.mirostat"),
            ("/api/chat", {"options": {"tfs_z": 0.5}}, "options.tfs_z"),
            ("/api/chat", {"options": {"typical_p": 0.5}}, "options.typical_p"),
            ("/api/chat", {"options": {"num_predict": 0}}, "options.num_predict"),
            ("/api/chat", {"options": {"num_predict": True}}, "options.num_predict"),
            (
                "/api/chat",
                {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}},
                "options.repeat_last_n",
            ),
            ("/api/chat", {"options": {"speed": 1}}, "options.speed"),
            ("/api/chat", {"format": "xml"}, "format"),
            ("/api/chat", {"think": "much"}, "'think'"),  # not a branch of its type
            ("/api/chat", {"format": 5}, "'format'"),
            ("/api/chat", {"truncate": True}, "truncate"),
            ("/api/chat", {"anything": 1}, "anything"),
            ("/api/chat", {"keep_alive": "soon"}, "keep_alive"),
            ("/api/chat", {"messages": [{"role": "nobody"}]}, "messages[0].role"),
            (
                "/api/chat",
                {"messages": [{"role": "user", "images": ["?"]}]},
                "messages[0].images[0]",
            ),
            ("/api/chat", {"messages": [{"role": "user", "images": ["AAAA"]}]}, "images[0]"),
            (
                "/api/chat",
                {"messages": [{"role": "user", "images": ["data:http://x"], "content": 1}]},
                "content",
            ),
            ("/api/generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template"),
            ("/api/generate", {"prompt": "a", "context": [1]}, "context"),
            ("/api/generate", {"prompt": "a", "suffix": "b"}, "suffix"),
            ("/api/generate", {"prompt": "a", "raw": True, "system": "b"}, "system"),
            ("/api/generate", {"prompt": "a", "raw": True, "images": [PNG]}, "images"),
            ("/api/generate", {"prompt": "a", "width": 64}, "width"),
            ("/api/embed", {"input": 1}, "input"),
            ("/api/embed", {}, "input"),
            ("/api/pull", {"insecure": True}, "insecure"),
            ("/api/show", {"name": "other"}, "name"),
        ],
    )
    async def test_what_cannot_be_served_is_refused_by_name(
        self,
        client: httpx.AsyncClient,
        runtime: FakeRuntime,
        path: str,
        body: dict[str, Any],
        field: str,
    ) -> None:
        whole = {**CHAT, **body} if path == "/api/chat" else {"model": "small", **body}
        answer = await client.post(path, json=whole)
        assert answer.status_code == 400, answer.text
        assert list(answer.json()) == ["error"]
        assert field in answer.json()["error"]
        assert not runtime.requests

    @pytest.mark.parametrize("action", ["copy", "create", "push"])
    async def test_refused_routes(self, client: httpx.AsyncClient, action: str) -> None:
        answer = await client.post(f"/api/{action}", json={"model": "small"})
        assert answer.status_code == 400
        assert f"/api/{action} is not served here" in answer.json()["error"]

    async def test_errors_of_http_have_the_same_form(self, client: httpx.AsyncClient) -> None:
        for answer, status in (
            (await client.get("/api/nothing"), 404),
            (await client.get("/api/chat"), 405),
            (await client.post("/api/chat", content=b"{"), 400),
        ):
            assert answer.status_code == status
            assert isinstance(answer.json()["error"], str)


class TestFields:
    async def test_options_format_and_thinking_reach_the_engine(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        options = {
            "num_predict": 5.0,
            "temperature": 1,
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0.0,
            "seed": 3,
            "stop": ["a"],
            "repeat_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": None,
            "repeat_last_n": -1,
            "num_ctx": 8192.0,
            "num_gpu": 1,
            "use_mmap": True,
            "mirostat": 0,
            "typical_p": 1.0,
        }
        schema = {"type": "object", "properties": {"a": {"default": None}}}
        await lines(client, "/api/chat", **CHAT, options=options, format=schema, think="high")
        body = dict(runtime.requests[0].body)
        assert body.pop("response_format")["json_schema"]["schema"] == schema
        assert body == {
            "model": "small",
            "messages": HELLO,
            "max_completion_tokens": 5,
            "temperature": 1,
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0.0,
            "seed": 3,
            "stop": ["a"],
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "reasoning_effort": "high",
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def test_values_that_ask_for_nothing(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        options = {"num_predict": -1, "seed": -1, "repeat_last_n": 0, "repeat_penalty": 1.1}
        nothing: dict[str, Any] = {
            "options": options,
            "format": "",
            "tools": [],
            "think": None,
            "logprobs": False,
        }
        await lines(client, "/api/chat", **CHAT, **nothing)
        assert set(runtime.requests[0].body) == {"model", "messages", "stream", "stream_options"}

    async def test_json_and_whether_to_think(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        await lines(client, "/api/generate", model="small", prompt="a", format="json", think=False)
        await lines(client, "/api/chat", **CHAT, think=True)
        first, second = (request.body for request in runtime.requests)
        assert first["response_format"] == {"type": "json_object"}
        assert first["reasoning_effort"] == "none"
        assert second["chat_template_kwargs"] == {"enable_thinking": True}

    async def test_scheduling_fields(self, client: httpx.AsyncClient, runtime: FakeRuntime) -> None:
        await lines(client, "/api/chat", **CHAT, keep_alive="10m", priority="batch")
        await lines(client, "/api/chat", **CHAT, keep_alive=-1)
        first, second = (request.scheduling for request in runtime.requests)
        assert (first.keep_alive_s, first.priority) == (600.0, Priority.BATCH)
        assert second.keep_alive_s == float("inf")

    async def test_images_and_calls_in_messages(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        call = {"function": {"name": "f", "arguments": {"x": 1}}}
        other = {"id": "own", "function": {"name": "g", "arguments": {}}}
        messages = [
            {"role": "user", "content": "Look", "images": [PNG]},
            {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call, other]},
            {"role": "tool", "content": "two", "tool_name": "g"},
            {"role": "tool", "content": "one"},
        ]
        await lines(client, "/api/chat", model="small", messages=messages)
        user, assistant, first, second = runtime.requests[0].body["messages"]
        url = {"url": f"data:image/png;base64,{PNG}"}
        assert user["content"] == [
            {"type": "image_url", "image_url": url},
            {"type": "text", "text": "Look"},
        ]
        assert assistant["reasoning"] == "Hm."
        ids = [each["id"] for each in assistant["tool_calls"]]
        assert ids[1] == "own"
        assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
        assert [first["tool_call_id"], second["tool_call_id"]] == ["own", ids[0]]


class TestNames:
    @pytest.mark.parametrize("name", ["small:latest", "gpt-4o:latest", "org/small", "auto:latest"])
    async def test_latest_is_no_tag(
        self, client: httpx.AsyncClient, runtime: FakeRuntime, name: str
    ) -> None:
        answer = await client.post("/api/chat", json={**CHAT, "model": name, "stream": False})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        assert answer.headers["x-roundhouse-served-by"] in ("small", "other")

    async def test_a_model_that_is_called_latest(
        self, runtime: FakeRuntime, tmp_path: Path
    ) -> None:
        model = {"id": "llama:latest", "runtime": "fake", "source": "none"}
        engine = fake_engine(runtime, tmp_path, models=[model])
        app = create_app(engine, ServerSettings())
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
            ) as client,
        ):
            await lines(client, "/api/chat", model="llama", messages=HELLO)
        assert runtime.requests[0].model == "llama:latest"

    async def test_the_former_name_of_the_field(self, client: httpx.AsyncClient) -> None:
        assert (await client.post("/api/show", json={"name": "small"})).status_code == 200


class TestLists:
    async def test_tags_has_every_name(self, client: httpx.AsyncClient) -> None:
        found = (await client.get("/api/tags")).json()["models"]
        by_name = {each["name"]: each for each in found}
        assert {"small", "gpt-4o", "org/small", "other", "auto"} <= set(by_name)
        assert by_name["small"]["digest"] == by_name["gpt-4o"]["digest"]
        assert by_name["auto"]["details"]["family"] == "route"
        for each in found:
            assert each["name"] == each["model"]
            assert len(bytes.fromhex(each["digest"])) == 32
            assert isinstance(each["size"], int)
            datetime.fromisoformat(each["modified_at"])

    async def test_ps_has_what_is_on_the_device(self, client: httpx.AsyncClient) -> None:
        assert (await client.get("/api/ps")).json() == {"models": []}
        loaded = await client.post("/api/generate", json={"model": "small"})
        assert loaded.headers["content-type"] == "application/json"
        assert loaded.json()["done_reason"] == "load"
        await client.post("/api/chat", json={"model": "other", "messages": []})
        small, other = (await client.get("/api/ps")).json()["models"]
        assert (small["name"], small["size"], small["size_vram"]) == ("small", 1000, 0)
        now = datetime.now().astimezone()
        assert 0 < (datetime.fromisoformat(small["expires_at"]) - now).total_seconds() <= 300
        assert (datetime.fromisoformat(other["expires_at"]) - now).days > 20 * 365

    async def test_without_a_prompt_keep_alive_0_unloads(self, client: httpx.AsyncClient) -> None:
        await client.post("/api/generate", json={"model": "auto"})
        gone = {"model": "small", "keep_alive": 0}
        assert (await client.post("/api/generate", json=gone)).json()["done_reason"] == "unload"
        assert (await client.get("/api/ps")).json() == {"models": []}
        assert (await client.post("/api/generate", json=gone)).json()["done_reason"] == "unload"
        await client.post("/api/generate", json={"model": "small"})
        assert len((await client.get("/api/ps")).json()["models"]) == 1

    async def test_show(self, client: httpx.AsyncClient) -> None:
        found = (await client.post("/api/show", json={"model": "gpt-4o"})).json()
        assert found["capabilities"] == ["completion"]
        assert found["model_info"]["general.basename"] == "small"
        route = (await client.post("/api/show", json={"model": "auto"})).json()
        assert route["modelfile"] == "FROM small\nFROM other\n"

    async def test_version(self, client: httpx.AsyncClient) -> None:
        version = (await client.get("/api/version")).json()["version"]
        assert tuple(map(int, version.split("."))) >= (0, 12, 0)

    async def test_the_root_says_that_it_runs(self, client: httpx.AsyncClient) -> None:
        assert (await client.head("/")).status_code == 200
        page = await client.get("/", headers={"accept": "text/html,*/*"})
        assert page.headers["content-type"].startswith("text/html")
        assert "Ollama is running" in page.text
        assert "Ollama is running" in (await client.get("/")).text
        plain = await client.get("/", headers={"accept": "application/json, text/plain, */*"})
        assert plain.text == "Ollama is running"


class TestFiles:
    async def test_a_pull_reports_its_progress(
        self, client: httpx.AsyncClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def pull(name: str, every_s: float) -> AsyncGenerator[FetchProgress, None]:
            assert name == "small"
            for done in (0, 5, 10):
                yield FetchProgress("org/repo", done, 10, 0, 1)
            if broken:
                raise RuntimeFailed("The hub is gone.")

        broken = False
        monkeypatch.setattr(engine, "pull", pull)
        first, *progress, end = await lines(client, "/api/pull", model="gpt-4o")
        assert first == {"status": "pulling manifest"}
        assert [each["completed"] for each in progress] == [0, 5, 10]
        assert {each["total"] for each in progress} == {10}
        assert all(each["digest"].startswith("sha256:") for each in progress)
        assert end == {"status": "success"}
        whole = await client.post("/api/pull", json={"model": "small", "stream": False})
        assert whole.json() == {"status": "success"}
        broken = True
        assert (await lines(client, "/api/pull", model="small"))[-1] == {
            "error": "The hub is gone."
        }
        whole = await client.post("/api/pull", json={"model": "small", "stream": False})
        assert (whole.status_code, whole.json()) == (500, {"error": "The hub is gone."})

    async def test_delete_unloads_and_deletes(
        self, client: httpx.AsyncClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deleted: list[object] = []

        def delete(found: object) -> int:
            deleted.append(found)
            return 1

        monkeypatch.setattr(routes, "removable", lambda *_: ("files",))
        monkeypatch.setattr(routes, "remove_all", delete)
        await client.post("/api/generate", json={"model": "small"})
        answer = await client.request("DELETE", "/api/delete", json={"model": "small"})
        assert (answer.status_code, answer.content) == (200, b"")
        assert deleted == [("files",)]
        assert (await client.get("/api/ps")).json() == {"models": []}
        monkeypatch.setattr(routes, "removable", lambda *_: ())
        answer = await client.request("DELETE", "/api/delete", json={"model": "small"})
        assert answer.status_code == 404

    async def test_a_lora_is_listed_and_its_model_is_not_deleted(
        self, client: httpx.AsyncClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine.config.know_adapters(lambda model: ("formal",) if model.id == "small" else ())
        monkeypatch.setattr(
            engine.loras, "adapters", lambda model: ("formal",) if model.id == "small" else ()
        )
        names = [each["name"] for each in (await client.get("/api/tags")).json()["models"]]
        assert "small:formal" in names
        for method, path in (("DELETE", "/api/delete"), ("POST", "/api/pull")):
            answer = await client.request(method, path, json={"model": "small:formal"})
            assert (answer.status_code, "LoRA" in answer.text) == (400, True)

    async def test_what_has_no_files(self, client: httpx.AsyncClient) -> None:
        answer = await client.request("DELETE", "/api/delete", json={"model": "small"})
        assert (answer.status_code, "on this disk" in answer.text) == (404, True)
        for method, path in (("DELETE", "/api/delete"), ("POST", "/api/pull")):
            answer = await client.request(method, path, json={"model": "auto"})
            assert (answer.status_code, "route" in answer.text) == (400, True)


class TestKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(
            api_keys=(SecretStr("user-key"),), admin_keys=(SecretStr("admin-key"),)
        )

    async def test_each_route_needs_its_key(self, client: httpx.AsyncClient) -> None:
        user, admin = ({"authorization": f"Bearer {name}-key"} for name in ("user", "admin"))
        body = {"model": "nobody", "input": "a"}
        for path in ("/api/chat", "/api/generate", "/api/show", "/api/embeddings", "/api/embed"):
            refused = await client.post(path, json=body)
            assert refused.status_code == 401 and isinstance(refused.json()["error"], str)
            assert (await client.post(path, json=body, headers=user)).status_code in (400, 404)
        for path in ("/api/tags", "/api/ps", "/api/version"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=user)).status_code == 200
        for method, path, status in (
            ("POST", "/api/pull", 404),
            ("DELETE", "/api/delete", 404),
            ("POST", "/api/copy", 400),
            ("POST", "/api/create", 400),
            ("POST", "/api/push", 400),
        ):
            body = {"model": "nobody"}
            assert (await client.request(method, path, json=body)).status_code == 401
            refused = await client.request(method, path, json=body, headers=user)
            assert refused.status_code == 403
            answer = await client.request(method, path, json=body, headers=admin)
            assert answer.status_code == status, path
