"""The tools, with the official client over real sockets; only the models are fakes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from mcp.client.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import AudioContent, CallToolResult, ImageContent, ResourceLink, TextContent
from PIL import Image

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Document, Event
from engine.requests import ImageRequest, Priority, Request
from server.mcp.media import MAX_INLINE_BYTES
from tests.server.fake import FakeRuntime
from tests.server.keys.conftest import eventually
from tests.server.mcp.conftest import Connect, work
from tests.server.test_image_io import blank_png

MODES = ("auto", "legacy")
PNG = base64.b64encode(blank_png(64, 64)).decode()


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[-1], TextContent)
    return result.content[-1].text


def refused(result: CallToolResult) -> str:
    assert result.is_error
    return text_of(result)


async def got(url: str) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.get(url)


async def structured(client: Client, name: str, arguments: dict[str, Any]) -> Any:
    """The client also checks it against the schema of the tool."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error, text_of(result)
    return result.structured_content


@pytest.mark.parametrize("mode", MODES)
async def test_every_tool_is_described(connect: Connect, mode: str) -> None:
    async with connect(mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert [*tools] == [
        "list_models", "engine_status", "plan_model", "generate_image", "edit_image",
        "start_video", "get_video", "cancel_video", "speak", "transcribe", "chat", "embed",
        "rerank", "list_vector_stores", "search",
    ]  # fmt: skip
    for tool in tools.values():
        assert tool.title and tool.description and tool.output_schema
        assert tool.annotations is not None
        assert tool.annotations.open_world_hint is False
        assert tool.input_schema["additionalProperties"] is False
        properties = tool.input_schema["properties"]
        assert {*tool.input_schema["required"]} <= {*properties}
        for field in properties.values():
            assert field["description"] and {"type", "enum", "anyOf"} & {*field}, field
    read_only = {
        name
        for name, tool in tools.items()
        if tool.annotations is not None and tool.annotations.read_only_hint
    }
    assert read_only == {
        "list_models", "engine_status", "plan_model", "get_video", "transcribe", "chat", "embed",
        "rerank", "list_vector_stores", "search",
    }  # fmt: skip
    models = tools["generate_image"].input_schema["properties"]["model"]["enum"]
    assert models == ["image", "second-image"]
    size = tools["generate_image"].input_schema["properties"]["size"]
    assert size["type"] == "string" and "pattern" in size


@pytest.mark.parametrize("mode", MODES)
async def test_what_is_there(connect: Connect, mode: str) -> None:
    async with connect(mode=mode) as client:
        await structured(client, "chat", {"prompt": "hello"})
        models = (await structured(client, "list_models", {}))["models"]
        by_id = {model["id"]: model for model in models}
        assert by_id["generate"]["tier"] == "device"
        assert by_id["image"]["tier"] == "disk"
        status = await structured(client, "engine_status", {})
        assert (status["free_bytes"], status["capacity_bytes"]) == (4000, 10_000)
        assert [model["id"] for model in status["loaded"]] == ["generate"]
        plan = await structured(client, "plan_model", {"model": "image"})
        assert plan["fits"] and [each["model"] for each in plan["evictions"]] == ["generate"]


class TestImages:
    async def test_it_is_shown_and_linked(
        self, connect: Connect, runtime: FakeRuntime, url: str
    ) -> None:
        arguments = {"prompt": "a fox", "size": "128x64", "n": 2, "seed": 5, "model": None}
        async with connect() as client:
            result = await client.call_tool("generate_image", arguments)
        assert not result.is_error, text_of(result)
        *shown, first, second, text = result.content
        assert len(shown) == 2
        for each in shown:
            assert isinstance(each, ImageContent) and each.mime_type == "image/png"
            image = Image.open(io.BytesIO(base64.b64decode(each.data)))
            assert image.size == (128, 64)
        assert isinstance(first, ResourceLink) and isinstance(second, ResourceLink)
        assert first.uri.startswith(f"{url}/v1/images/files/") and first.mime_type == "image/png"
        answer = await got(first.uri)
        assert answer.status_code == 200 and len(answer.content) == first.size
        assert isinstance(text, TextContent)
        assert json.loads(text.text) == result.structured_content
        assert result.structured_content["seed"] == 5
        (request,) = runtime.requests
        assert isinstance(request, ImageRequest)
        assert (request.prompt, request.n, request.model) == ("a fox", 2, "image")

    async def test_one_that_is_loaded_is_taken(self, connect: Connect) -> None:
        async with connect() as client:
            made = {"prompt": "a", "model": "second-image"}
            assert (await structured(client, "generate_image", made))["model"] == "second-image"
            again = await structured(client, "generate_image", {"prompt": "a"})
            assert again["model"] == "second-image"

    async def test_what_is_too_long_is_shown_smaller(self, connect: Connect) -> None:
        async with connect() as client:
            result = await client.call_tool("generate_image", {"prompt": "noise", "n": 2})
            shown, _, link, *_ = result.content
            assert isinstance(shown, ImageContent) and shown.mime_type == "image/jpeg"
            assert len(base64.b64decode(shown.data)) <= MAX_INLINE_BYTES // 2
            assert isinstance(link, ResourceLink)
            assert Image.open(io.BytesIO((await got(link.uri)).content)).size == (1024, 1024)
            result = await client.call_tool("generate_image", {"prompt": "a", "link_only": True})
            assert [each.type for each in result.content] == ["resource_link", "text"]

    async def test_one_is_edited(self, connect: Connect, runtime: FakeRuntime) -> None:
        async with connect() as client:
            made = await structured(client, "generate_image", {"prompt": "a"})
            url = made["images"][0]["url"]
            for image in (url, PNG, f"data:image/png;base64,{PNG}"):
                arguments = {"prompt": "b", "image": image, "strength": 0.5}
                assert (await structured(client, "edit_image", arguments))["images"]
                assert runtime.requests[-1].images[0].size == (64, 64)
            for image, words in (
                ("https://example.org/a.png", "fetches no URLs"),
                (url.replace("files/", "files/x"), "no file"),
                ("%", "no base64"),
                ("AAAA", "image"),
                (5, "it is a file"),
            ):
                result = await client.call_tool("edit_image", {"prompt": "b", "image": image})
                assert words in refused(result)


class TestVideos:
    async def test_a_job_and_its_file(self, connect: Connect, url: str) -> None:
        told: list[str] = []

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            told.append(message or "")

        async with connect() as client:
            started = await structured(client, "start_video", {"prompt": "a wave"})
            arguments = {"id": started["id"], "wait_seconds": 60}
            result = await client.call_tool("get_video", arguments, progress_callback=on_progress)
        assert result.structured_content["status"] == "completed", result
        thumbnail, link, _ = result.content
        assert isinstance(thumbnail, ImageContent) and isinstance(link, ResourceLink)
        assert link.uri == f"{url}/v1/videos/{started['id']}/content"
        assert (await got(link.uri)).headers["content-type"] == link.mime_type == "video/mp4"
        assert all(each.split()[0] in ("queued", "in_progress") for each in told)

    async def test_one_is_cancelled(self, connect: Connect, runtime: FakeRuntime) -> None:
        async def stuck(_: Request) -> AsyncGenerator[Event, None]:
            await asyncio.Event().wait()
            yield Document(b"{}")

        runtime.answer = stuck
        async with connect() as client:
            started = await structured(client, "start_video", {"prompt": "a wave"})
            ended = await structured(client, "cancel_video", {"id": started["id"]})
            assert ended["status"] == "failed" and ended["error"]["code"] == "cancelled"
            for video_id in ("nothing", "../models"):
                result = await client.call_tool("get_video", {"id": video_id})
                assert "404" in refused(result)
            result = await client.call_tool("get_video", {"id": "a", "wait_seconds": "b"})
            assert "wait_seconds" in refused(result)


class TestSound:
    async def test_speech_is_given_and_transcribed(
        self, connect: Connect, runtime: FakeRuntime
    ) -> None:
        async with connect() as client:
            result = await client.call_tool("speak", {"input": "hi", "response_format": "wav"})
            sound, link, _ = result.content
            assert isinstance(sound, AudioContent) and sound.mime_type == "audio/wav"
            audio = base64.b64decode(sound.data)
            assert audio.startswith(b"RIFF") and isinstance(link, ResourceLink)
            file = await got(link.uri)
            assert file.content == audio and "wav" in file.headers["content-type"]
            for given in (link.uri, sound.data):
                heard = await structured(client, "transcribe", {"audio": given, "language": "en"})
                assert heard["text"].strip() == f"{len(audio)} bytes"
                assert (heard["language"], heard["duration"]) == ("english", 1.0)
            assert runtime.requests[-1].language == "en"

    async def test_long_speech_is_a_link(self, connect: Connect) -> None:
        async with connect() as client:
            arguments = {"input": "long", "response_format": "wav"}
            result = await client.call_tool("speak", arguments)
            assert [each.type for each in result.content] == ["resource_link", "text"]
            result = await client.call_tool("speak", {"input": "hi", "response_format": "pcm"})
            assert "response_format" in refused(result)


async def test_text(connect: Connect, runtime: FakeRuntime) -> None:
    async with connect() as client:
        arguments = {"prompt": "hi", "system": "short", "max_tokens": 5, "temperature": 0}
        result = await client.call_tool("chat", arguments)
        said = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
        assert json.loads(text_of(result)) == said
        assert result.structured_content["usage"]["total_tokens"] == 7
        assert runtime.requests[-1].body["max_tokens"] == 5
        vectors = await structured(client, "embed", {"input": ["a", "b"], "dimensions": 2})
        assert vectors["embeddings"] == [[0.5, 0.5]] * 2
        too_many = {"input": ["a"] * 100, "dimensions": 4000}
        assert "too long" in refused(await client.call_tool("embed", too_many))
        arguments = {"query": "a", "documents": ["a", "b"]}
        ranks = await structured(client, "rerank", arguments)
        assert ranks["results"] == [{"index": 1, "relevance_score": 0.9}]


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "arguments", "words"),
        [
            ("chat", {"prompt": "a", "model": "nobody"}, "list_models"),
            ("chat", {"prompt": "a", "stream": True}, "has no argument 'stream'. It takes"),
            ("chat", {}, "needs the argument prompt"),
            ("list_models", {"a": 1}, "It takes none"),
            ("generate_image", {"prompt": "a", "size": "big"}, "WIDTHxHEIGHT"),
            ("generate_image", {"prompt": "a", "n": 11}, "'n'"),
            ("generate_image", {"prompt": 5}, "'prompt'"),
            ("transcribe", {"audio": "AAAA", "temperature": 3}, "no argument 'temperature'"),
        ],
    )
    async def test_they_say_what_to_do(
        self,
        connect: Connect,
        runtime: FakeRuntime,
        name: str,
        arguments: dict[str, Any],
        words: str,
    ) -> None:
        async with connect() as client:
            assert words in refused(await client.call_tool(name, arguments))
        assert not runtime.requests

    async def test_a_failed_run(self, connect: Connect, runtime: FakeRuntime) -> None:
        async def fail(_: Request) -> AsyncGenerator[Event, None]:
            raise RuntimeFailed("The card is on fire.")
            yield Document(b"{}")

        runtime.answer = fail
        async with connect() as client:
            for name, arguments in (("generate_image", {"prompt": "a"}), ("speak", {"input": "a"})):
                assert "on fire" in refused(await client.call_tool(name, arguments))

    async def test_a_result_that_is_too_long(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.mcp.protocol.MAX_RESULT_CHARS", 100)
        async with connect() as client:
            result = await client.call_tool("list_models", {})
        assert result.is_error and "too long" in text_of(result)

    async def test_an_unknown_tool(self, connect: Connect) -> None:
        async with connect() as client:
            with pytest.raises(MCPError, match="There is no tool 'nothing'"):
                await client.call_tool("nothing", {})


class TestWaits:
    @pytest.mark.parametrize("mode", MODES)
    async def test_the_place_in_the_queue_is_told(
        self, connect: Connect, runtime: FakeRuntime, mode: str
    ) -> None:
        release = asyncio.Event()

        async def slow(request: Request) -> AsyncGenerator[Event, None]:
            await release.wait()
            async for event in work(request):
                yield event

        runtime.answer = slow
        told: list[tuple[float, float | None, str | None]] = []

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            told.append((progress, total, message))
            if message is not None and message.startswith("queued position=1"):
                release.set()

        async with connect(mode=mode) as client:
            first = asyncio.create_task(client.call_tool("chat", {"prompt": "a"}))
            await eventually(lambda: bool(runtime.requests))
            try:
                async with asyncio.timeout(30):
                    # No room beside the first: it waits for its end.
                    result = await client.call_tool(
                        "generate_image", {"prompt": "a"}, progress_callback=on_progress
                    )
            finally:
                release.set()
                await first
        assert not result.is_error
        assert any(message and "queued position=1" in message for _, _, message in told)
        seconds = [done for done, _, _ in told]
        assert seconds == sorted(seconds) and seconds[0] > 0

    async def test_a_long_run_is_not_silent(
        self, connect: Connect, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.mcp.tool.PROGRESS_INTERVAL_S", 0.01)
        monkeypatch.setattr("server.mcp.tool.HEARTBEAT_S", 0.01)
        release, told = asyncio.Event(), 0

        async def slow(request: Request) -> AsyncGenerator[Event, None]:
            await release.wait()
            async for event in work(request):
                yield event

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            nonlocal told
            told += message == "running"
            if told >= 3:
                release.set()

        runtime.answer = slow
        async with connect() as client, asyncio.timeout(30):
            result = await client.call_tool("chat", {"prompt": "a"}, progress_callback=on_progress)
        assert not result.is_error

    @pytest.mark.parametrize("mode", MODES)
    async def test_a_cancelled_call_gives_its_lease_back(
        self, connect: Connect, runtime: FakeRuntime, engine: Engine, mode: str
    ) -> None:
        ended = asyncio.Event()

        async def stuck(_: Request) -> AsyncGenerator[Event, None]:
            try:
                await asyncio.Event().wait()
                yield Document(b"{}")
            finally:
                ended.set()

        runtime.answer = stuck
        async with connect(mode=mode) as client:
            for name, arguments in (("chat", {"prompt": "a"}), ("generate_image", {"prompt": "a"})):
                runtime.requests.clear()
                ended.clear()
                call = asyncio.create_task(client.call_tool(name, arguments))
                await eventually(lambda: bool(runtime.requests))
                call.cancel()
                async with asyncio.timeout(30):
                    await ended.wait()
                await eventually(lambda: all(not model.leases for model in engine.status().models))
            runtime.answer = work
            assert not (await client.call_tool("chat", {"prompt": "a"})).is_error

    async def test_headers_say_how_it_is_scheduled(
        self, connect: Connect, runtime: FakeRuntime
    ) -> None:
        async with connect(**{"x-roundhouse-priority": "batch"}) as client:
            await client.call_tool("chat", {"prompt": "a"})
        assert runtime.requests[-1].scheduling.priority is Priority.BATCH


async def test_files_are_searched(connect: Connect, url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        text = ("notes.txt", b"The lighthouse is white.")
        file = (
            await http.post("/v1/files", files={"file": text}, data={"purpose": "assistants"})
        ).json()
        body = {"name": "notes", "file_ids": [file["id"]]}
        store = (await http.post("/v1/vector_stores", json=body)).json()
        async with asyncio.timeout(60):
            while store["status"] != "completed":
                await asyncio.sleep(0.01)
                store = (await http.get(f"/v1/vector_stores/{store['id']}")).json()
    assert store["file_counts"]["completed"] == 1, store
    async with connect() as client:
        listed = await structured(client, "list_vector_stores", {})
        assert listed["vector_stores"] == [{"id": store["id"], "name": "notes", "files": 1}]
        arguments = {"vector_store_id": store["id"], "query": "what?", "max_num_results": 3}
        (found,) = (await structured(client, "search", arguments))["results"]
        assert (found["filename"], found["text"]) == ("notes.txt", "The lighthouse is white.")
        for wrong, words in (("nothing", "404"), ("a/../b", "404"), (5, "list_vector_stores")):
            result = await client.call_tool("search", {"vector_store_id": wrong, "query": "a"})
            assert words in refused(result)
