"""Pictures in text requests: what reaches the runtime, and what is refused before it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import gzip
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.requests import TextOperation, TextRequest
from engine.runtimes.remote import transport
from server.app import create_app
from server.pictures import Pictures
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PARAM = "messages[0].content[0].image_url"
LIMIT_S = 30.0


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = file_of(Image.new("RGB", (8, 6), "red"))


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chat(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": list(parts)}]}


def asking(url: str, **more: Any) -> dict[str, Any]:
    return chat({"type": "image_url", "image_url": {"url": url, **more}})


def image_of(url: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    image.load()
    return image


def sent(runtime: FakeRuntime) -> Any:
    """The first part of the last request that reached the runtime."""
    return runtime.requests[-1].body["messages"][0]["content"][0]


@asynccontextmanager
async def serving(
    tmp_path: Path, runtime: FakeRuntime, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(fake_engine(runtime, tmp_path), ServerSettings(**settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000"
        ) as client,
    ):
        yield client


Handler = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def response(content: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(content)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


@asynccontextmanager
async def host(handle: Handler) -> AsyncIterator[tuple[str, list[str]]]:
    """A host of pictures on loopback, its address and the paths that were asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            asked.append(head.split()[1].decode())
            await handle(asked[-1], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


async def error_of(client: httpx.AsyncClient, body: Any, path: str = CHAT) -> tuple[str, str]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error.get("param"), error["message"]


async def test_a_plain_picture_reaches_the_model_byte_for_byte(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    photo = file_of(Image.new("RGB", (40, 30), "teal"), "JPEG")
    for content, kind in ((RED, "png"), (photo, "jpeg")):
        answer = await client.post(CHAT, json=asking(data_url(content, kind), detail="high"))
        assert answer.status_code == 200
        assert sent(runtime) == {"type": "image_url", "image_url": {"url": data_url(content, kind)}}
    small = file_of(Image.new("RGB", (40, 30), "teal"), "JPEG", quality=20)
    await client.post(CHAT, json=asking(data_url(small, "jpeg"), detail="low"))
    assert sent(runtime)["image_url"] == {"url": data_url(small, "jpeg")}


async def test_the_url_of_a_picture_may_stand_alone(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    part = {"type": "image_url", "image_url": data_url(RED), "detail": "high"}
    assert (await client.post(CHAT, json=chat(part))).status_code == 200
    assert sent(runtime) == {"type": "image_url", "image_url": {"url": data_url(RED)}}


async def test_the_type_is_that_of_the_file(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    await client.post(CHAT, json=asking(data_url(RED, "gif")))
    assert sent(runtime)["image_url"]["url"] == data_url(RED)


async def test_what_is_transparent_is_shown_on_white(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for content in (file_of(clear), file_of(palette)):
        await client.post(CHAT, json=asking(data_url(content)))
        image = image_of(sent(runtime)["image_url"]["url"])
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((3, 1)) == (255, 0, 0)


async def test_low_detail_bounds_the_longer_side(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    large = data_url(file_of(Image.new("RGB", (1024, 256), "red")))
    await client.post(CHAT, json=asking(large, detail="low"))
    assert image_of(sent(runtime)["image_url"]["url"]).size == (512, 128)
    for detail in ("auto", "high", "original"):
        await client.post(CHAT, json=asking(large, detail=detail))
        assert image_of(sent(runtime)["image_url"]["url"]).size == (1024, 256)
    param, message = await error_of(client, asking(large, detail="fine"))
    assert param == f"{PARAM}.detail"
    assert "'fine' is none of 'auto', 'low', 'high', 'original'" in message


async def test_responses_and_messages_have_pictures_of_their_own_form(
    client: httpx.AsyncClient, runtime: FakeRuntime
) -> None:
    large = data_url(file_of(Image.new("RGB", (1024, 256), "red")))
    content = [{"type": "input_image", "image_url": large, "detail": "low"}]
    items = [{"role": "user", "content": content}, {"type": "function_call_output", "call_id": "a",
             "output": [{"type": "input_image", "image_url": data_url(RED)}]}]  # fmt: skip
    await client.post(RESPONSES, json={"model": "small", "input": items})
    first, second = runtime.requests[-1].body["input"]
    assert first["content"][0]["detail"] == "auto"
    assert image_of(first["content"][0]["image_url"]).size == (512, 128)
    # Without `detail` vLLM takes no picture in the output of a tool.
    picture = {"type": "input_image", "image_url": data_url(RED), "detail": "auto"}
    assert second["output"] == [picture]
    source = {"type": "base64", "media_type": "image/jpeg", "data": data_url(RED).split(",")[1]}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image",
              "source": dict(source)}]}  # fmt: skip
    for block in ({"type": "image", "source": dict(source)}, result):
        await client.post(MESSAGES, json=chat(block))
        found = sent(runtime)
        found = found["content"][0] if block is result else found
        assert found["source"] == {**source, "media_type": "image/png"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not a picture", "cannot be read"),
        (RED[:-20], "cannot be read"),
        (file_of(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:-300], "cannot be read"),
        (
            file_of(
                Image.new("RGB", (4, 4), "red"),
                "GIF",
                save_all=True,
                append_images=[Image.new("RGB", (4, 4), "blue")],
            ),
            "animated",
        ),
        (file_of(Image.new("L", (8000, 8000))), "too large"),
        (file_of(Image.new("RGB", (4, 4)), "BMP"), "cannot be read"),
    ],
    ids=["empty", "text", "torn png", "torn jpeg", "animated", "bomb", "bmp"],
)
async def test_what_is_no_whole_picture_is_refused_by_name(
    client: httpx.AsyncClient, runtime: FakeRuntime, content: bytes, reason: str
) -> None:
    param, message = await error_of(client, asking(data_url(content)))
    assert param == PARAM
    assert reason in message
    assert not runtime.requests


async def test_limits_are_named(tmp_path: Path, runtime: FakeRuntime) -> None:
    url = {"type": "image_url", "image_url": {"url": data_url(RED)}}
    async with serving(tmp_path, runtime, max_images=2) as client:
        assert (await client.post(CHAT, json=chat(url, url))).status_code == 200
        param, message = await error_of(client, chat(url, url, url))
        assert param == "messages[0].content[2].image_url"
        assert "server.max_images" in message
    noise = file_of(Image.effect_noise((64, 64), 50))
    async with serving(tmp_path, runtime, max_image_bytes=1000) as client:
        param, message = await error_of(client, asking(data_url(noise)))
        assert param == PARAM
        assert "server.max_image_bytes" in message
    async with serving(tmp_path, runtime, max_image_pixels=90) as client:
        param, message = await error_of(client, chat(url, url))
        assert param == "messages[0].content[1].image_url"
        assert "90 pixels together" in message


async def test_what_a_model_does_not_take_is_refused_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inputs(_: FakeRuntime, model: ModelConfig) -> frozenset[str]:
        return frozenset({"text"} if model.id == "small" else {"text", "image"})

    monkeypatch.setattr(FakeRuntime, "inputs", inputs)
    runtime = FakeRuntime()

    async def never(path: str, writer: asyncio.StreamWriter) -> None:
        raise AssertionError(path)

    async with host(never) as (address, asked):
        async with serving(tmp_path, runtime, allowed_media_hosts=[address]) as client:
            await client.post(CHAT, json=chat())  # waits for the start
            param, message = await error_of(client, asking(f"http://{address}/a.png"))
            assert param == PARAM
            assert "takes no image, only text" in message
            sound = {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}
            param, message = await error_of(client, {**chat(sound), "model": "other"})
            assert param == "messages[0].content[0].input_audio"
            assert "takes no audio" in message
            listed = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
            assert listed["small"]["input_modalities"] == ["text"]
            assert listed["other"]["input_modalities"] == ["image", "text"]
        assert not asked


async def test_a_url_is_fetched_here_and_its_redirects_are_followed(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    async def handle(path: str, writer: asyncio.StreamWriter) -> None:
        hops = {"/a.png": "/b.png", "/b.png": "/c.png?x=1"}
        if path in hops:
            writer.write(response(b"", "302 Found", location=hops[path]))
        else:
            writer.write(response(RED))

    async with host(handle) as (address, asked):
        async with serving(tmp_path, runtime, allowed_media_hosts=[address]) as client:
            answer = await client.post(CHAT, json=asking(f"http://{address}/a.png"))
            assert answer.status_code == 200, answer.text
            assert sent(runtime)["image_url"] == {"url": data_url(RED)}
            source = {"type": "url", "url": f"http://{address}/c.png"}
            await client.post(MESSAGES, json=chat({"type": "image", "source": source}))
            assert sent(runtime)["source"]["data"] == data_url(RED).split(",")[1]
        assert asked == ["/a.png", "/b.png", "/c.png?x=1", "/c.png"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response(b"gone", "404 Not Found"), "127.0.0.1 answered 404"),
        (response(b"", "302 Found", location="http://localhost:1/secret"), "not allowed"),
        (response(b"", "302 Found", location="file:///etc/passwd"), "not allowed"),
        (response(b"", "302 Found", location="/again"), "more than 3 redirects"),
        (response(b"<html>"), "cannot be read"),
        (response(b"\0" * 200_000), "server.max_image_bytes"),
        (response(gzip.compress(b"\0" * 10_000_000), content_encoding="gzip"), "compressed"),
        (b"\0\0\0 no HTTP", "cannot be reached"),
        (response(RED)[:-30], "cannot be reached"),
    ],
    ids=["404", "elsewhere", "file", "endless", "page", "large", "gzip", "noise", "torn"],
)
async def test_hosts_that_misbehave(
    tmp_path: Path, runtime: FakeRuntime, answer: bytes, reason: str
) -> None:
    async def handle(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    settings = {"max_image_bytes": 100_000}
    async with (
        host(handle) as (address, _),
        serving(tmp_path, runtime, allowed_media_hosts=[address], **settings) as client,
    ):
        param, message = await error_of(client, asking(f"http://{address}/secret.png?key=hush"))
        assert param == PARAM
        assert reason in message
        assert "hush" not in message
        assert not runtime.requests


async def test_a_host_that_sends_nothing_holds_nobody_up(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    asked, done = asyncio.Event(), asyncio.Event()

    async def handle(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
        asked.set()
        await done.wait()

    settings = {"media_timeout": 0.5}
    async with (
        host(handle) as (address, _),
        serving(tmp_path, runtime, allowed_media_hosts=[address], **settings) as client,
    ):
        waiting = asyncio.create_task(error_of(client, asking(f"http://{address}/a")))
        try:
            async with asyncio.timeout(LIMIT_S):
                await asked.wait()
                assert (await client.post(CHAT, json=chat())).status_code == 200
                param, message = await waiting
        finally:
            done.set()
        assert param == PARAM
        assert "server.media_timeout" in message


async def test_a_name_that_leads_to_a_private_address(
    tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: Any) -> list[str]:
        return ["127.0.0.1"]

    async def handle(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(response(RED))

    monkeypatch.setattr(transport, "_resolve", resolve)
    async with host(handle) as (address, asked):
        named = f"media.example:{address.partition(':')[2]}"
        body = asking(f"http://{named}/a.png")
        async with serving(tmp_path, runtime, allowed_media_hosts=[named]) as client:
            param, message = await error_of(client, body)
            assert param == PARAM
            assert "server.private_media_hosts" in message
            assert "127.0.0.1" not in message
        assert not asked
        private = {"private_media_hosts": ["media.example"]}
        async with serving(tmp_path, runtime, allowed_media_hosts=[named], **private) as client:
            assert (await client.post(CHAT, json=body)).status_code == 200
        assert asked == ["/a.png"]


async def test_ollama_names_its_own_fields(client: httpx.AsyncClient) -> None:
    torn = base64.b64encode(RED[:-20]).decode()
    good = base64.b64encode(RED).decode()
    message = {"role": "user", "content": "what", "images": [good, torn]}
    answer = await client.post("/api/chat", json={"model": "small", "messages": [message]})
    assert answer.status_code == 400
    assert "picture cannot be read" in answer.text
    body = {"model": "small", "prompt": "what", "images": [good, good], "stream": False}
    assert (await client.post("/api/generate", json=body)).status_code != 400


async def test_so_many_are_fetched_at_a_time(
    tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.picture_fetch.AT_ONCE", 2)
    open_now, most = 0, 0
    third = asyncio.Event()

    async def handle(_path: str, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        if open_now > 2:
            third.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(third.wait(), 0.05)
        open_now -= 1
        writer.write(response(RED))

    async with (
        host(handle) as (address, asked),
        serving(tmp_path, runtime, allowed_media_hosts=[address]) as client,
    ):
        part = {"type": "image_url", "image_url": {"url": f"http://{address}/a.png"}}
        answer = await client.post(CHAT, json=chat(*(copy.deepcopy(part) for _ in range(4))))
        assert answer.status_code == 200, answer.text
    assert (len(asked), most) == (4, 2)


async def test_pictures_behind_urls_are_bounded_together(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    noise = file_of(Image.effect_noise((64, 64), 50))

    async def handle(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(response(noise))

    settings = {"max_body_bytes": len(noise) * 3 // 2}
    async with (
        host(handle) as (address, _),
        serving(tmp_path, runtime, allowed_media_hosts=[address], **settings) as client,
    ):
        part = {"type": "image_url", "image_url": {"url": f"http://{address}/a.png"}}
        assert (await client.post(CHAT, json=chat(part))).status_code == 200
        param, message = await error_of(client, chat(part, part))
        assert param is not None and param.endswith("image_url")
        assert "server.max_body_bytes" in message


async def test_what_only_a_provider_answers_is_left_as_it_is(
    tmp_path: Path, runtime: FakeRuntime
) -> None:
    """It reads the picture itself. With a fallback here, it is read here."""
    far = {"runtime": "remote", "source": "http://127.0.0.1:9", "options": {"model": "theirs"}}
    models = [
        {"id": "small", "runtime": "fake", "source": "none"},
        {"id": "far", **far},
        {"id": "near", **far, "fallbacks": ["small"]},
    ]
    pictures = Pictures(fake_engine(runtime, tmp_path, models=models), ServerSettings())
    body = asking("data:image/png;base64,AAAA", detail="low")
    kept = copy.deepcopy(body)
    await pictures.settle(TextRequest("far", TextOperation.CHAT, body, "a"))
    assert body == kept
    with pytest.raises(InvalidRequest, match="cannot be read"):
        await pictures.settle(TextRequest("near", TextOperation.CHAT, body, "a"))


async def test_pictures_that_are_not_there(client: httpx.AsyncClient) -> None:
    named = {"type": "input_image", "file_id": "file-1"}
    items = {"model": "small", "input": [{"role": "user", "content": [named]}]}
    param, message = await error_of(client, items, RESPONSES)
    assert param == "input[0].content[0].file_id" and "stored files" in message
    param, message = await error_of(client, chat({"type": "image_url", "image_url": {}}))
    assert param == PARAM and "missing" in message
    source = {"type": "file", "file_id": "file-1"}
    answer = await client.post(MESSAGES, json=chat({"type": "image", "source": source}))
    assert answer.status_code == 400
    assert "source.type" in answer.text and "'file' is none of" in answer.text
