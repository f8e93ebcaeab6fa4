"""The image endpoints, with the official client over real sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image
from pydantic import SecretStr

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Event, ImageResult, PartialImage, Progress
from engine.requests import ImageOperation, ImageRequest, LoraChoice, Priority, Quality
from server.forms import Fields
from server.schemas.images import GenerationBody
from server.settings import ServerSettings
from tests.contract.openai import conforms
from tests.server.fake import FakeRuntime
from tests.server.test_connection import TIMEOUT_S, Stuck, wait_for
from tests.server.test_image_io import blank_png, file_of

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
KEY = {"authorization": "Bearer user-key"}
SEED = 41
RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


async def paint(request: ImageRequest) -> AsyncGenerator[Event, None]:
    """Previews that grow lighter, then images in grey, each lighter than the one before."""
    size = (request.width or 1024, request.height or 1024)
    yield Progress(0.1)
    for index in range(request.partial_images):
        yield PartialImage(index, Image.new("RGB", size, (50 * index, 0, 0)))
    images = tuple(Image.new("RGB", size, (20 * index,) * 3) for index in range(request.n))
    yield ImageResult(images, request.seed or SEED)


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(api_keys=(SecretStr("user-key"),))


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = FakeRuntime()
    runtime.answer = paint
    return runtime


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="user-key", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def plain(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Sends what the official client would not."""
    async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=TIMEOUT_S * 4) as client:
        yield client


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def images_of(answer: ImagesResponse) -> list[Image.Image]:
    assert answer.data is not None
    return [opened(item.b64_json) for item in answer.data]


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(file_of(image)).decode()}"


def colour(image: Image.Image | None) -> tuple[int, ...] | float | None:
    assert image is not None
    return image.getpixel((0, 0))


async def test_generate(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    raw = await sdk.images.with_raw_response.generate(
        model="small", prompt="a cat", n=2, size="1024x1536", quality="low"
    )
    document = json.loads(raw.content)
    assert conforms(document, "ImagesResponse")
    assert document["size"] == "1024x1536"
    assert (document["quality"], document["background"]) == ("low", "opaque")
    assert (document["output_format"], document["seed"]) == ("png", SEED)
    assert abs(document["created"] - time.time()) < 60
    first, second = images_of(raw.parse())
    assert (first.format, first.size) == ("PNG", (1024, 1536))
    assert (colour(first), colour(second)) == ((0,) * 3, (20,) * 3)
    (request,) = runtime.requests
    assert (request.operation, request.prompt) == (ImageOperation.GENERATION, "a cat")
    assert (request.n, request.width, request.height) == (2, 1024, 1536)
    assert request.quality is Quality.LOW
    assert request.request_id == raw.headers["x-request-id"]
    assert (request.images, request.mask, request.partial_images) == ((), None, 0)


async def test_what_is_not_said_is_the_models_choice(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime
) -> None:
    raw = await sdk.images.with_raw_response.generate(
        model="small", prompt="a cat", size="auto", style="vivid", user="me", moderation="low"
    )
    document = json.loads(raw.content)
    assert conforms(document, "ImagesResponse")
    assert "quality" not in document
    (request,) = runtime.requests
    for field in ("width", "height", "steps", "guidance", "seed", "negative_prompt", "strength"):
        assert getattr(request, field) is None
    assert request.quality is Quality.AUTO
    assert (request.scheduling.priority, request.scheduling.timeout_s) == (Priority.NORMAL, None)


async def test_size_that_the_contract_does_not_know_is_not_named(sdk: openai.AsyncOpenAI) -> None:
    raw = await sdk.images.with_raw_response.generate(model="small", prompt="a", size="64x48")
    document = json.loads(raw.content)
    assert conforms(document, "ImagesResponse")
    assert "size" not in document
    assert images_of(raw.parse())[0].size == (64, 48)


@pytest.mark.parametrize(
    ("asked", "meant"), [("standard", Quality.MEDIUM), ("hd", Quality.HIGH), ("high", Quality.HIGH)]
)
async def test_quality(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, asked: Any, meant: Quality
) -> None:
    raw = await sdk.images.with_raw_response.generate(model="small", prompt="a", quality=asked)
    assert runtime.requests[0].quality is meant
    assert conforms(json.loads(raw.content), "ImagesResponse")
    assert json.loads(raw.content)["quality"] == meant


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_output_format(sdk: openai.AsyncOpenAI, output_format: Any) -> None:
    answer = await sdk.images.generate(
        model="small",
        prompt="a",
        size="256x256",
        output_format=output_format,
        output_compression=None if output_format == "png" else 50,
    )
    (image,) = images_of(answer)
    assert (image.format, answer.output_format) == (output_format.upper(), output_format)


async def test_our_own_fields(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    await sdk.images.generate(
        model="small",
        prompt="a cat",
        size="256x256",
        extra_body={
            "seed": 2**63 - 1,
            "negative_prompt": "dogs",
            "steps": 3,
            "guidance": 0,
            "strength": 0.5,
            "loras": [{"name": "ink", "weight": -0.5}, {"name": "glow"}],
            "control_image": data_url(Image.new("RGB", (3, 3), RED)),
            "reference_image": data_url(Image.new("RGB", (4, 4), GREEN)),
            "image": base64.b64encode(file_of(Image.new("RGB", (5, 5), WHITE))).decode(),
        },
        extra_headers={"x-roundhouse-priority": "interactive", "x-roundhouse-timeout": "7"},
    )
    (request,) = runtime.requests
    assert (request.seed, request.negative_prompt, request.steps) == (2**63 - 1, "dogs", 3)
    assert (request.guidance, request.strength) == (0, 0.5)
    assert request.loras == (LoraChoice("ink", -0.5), LoraChoice("glow"))
    assert (colour(request.control_image), colour(request.reference_image)) == (RED, GREEN)
    assert [image.size for image in request.images] == [(5, 5)]
    assert request.operation is ImageOperation.EDIT, "it starts from an image"
    assert (request.scheduling.priority, request.scheduling.timeout_s) == (Priority.INTERACTIVE, 7)


async def test_headers_tell_where_the_time_went(plain: httpx.AsyncClient) -> None:
    for stream in (False, True):
        body = {"model": "small", "prompt": "a", "size": "64x64", "stream": stream}
        answer = await plain.post(GENERATIONS, json=body)
        for phase in ("queue", "load", "run"):
            assert float(answer.headers[f"x-roundhouse-{phase}-ms"]) >= 0


async def test_run_time_is_that_of_the_whole_run(
    plain: httpx.AsyncClient, runtime: FakeRuntime, engine: Engine
) -> None:
    loop = asyncio.get_running_loop()

    async def slow_after_the_first(request: ImageRequest) -> AsyncGenerator[Event, None]:
        yield Progress(0.5)
        until = loop.time() + 0.05
        while loop.time() < until:
            yield Progress(0.5)
        yield ImageResult((Image.new("RGB", (8, 8)),), 1)

    runtime.answer = slow_after_the_first
    answer = await plain.post(GENERATIONS, json={"model": "small", "prompt": "a"})
    assert float(answer.headers["x-roundhouse-run-ms"]) >= 50


def files_of(folder: Path) -> list[Path]:
    return list(folder.rglob("*.png"))


class TestUrl:
    async def test_file_is_read_without_a_key(self, sdk: openai.AsyncOpenAI, url: str) -> None:
        raw = await sdk.images.with_raw_response.generate(
            model="small",
            prompt="a",
            n=2,
            size="256x256",
            response_format="url",
            output_format="webp",
        )
        assert conforms(json.loads(raw.content), "ImagesResponse")
        data = raw.parse().data
        assert data is not None
        async with httpx.AsyncClient() as stranger:
            for index, item in enumerate(data):
                assert item.b64_json is None
                assert item.url is not None and item.url.startswith(f"{url}/v1/images/files/")
                answer = await stranger.get(item.url)
                assert answer.status_code == 200
                assert answer.headers["content-type"] == "image/webp"
                assert answer.headers["cache-control"] == "private"
                image = Image.open(io.BytesIO(answer.content)).convert("RGB")
                assert (image.size, colour(image)) == ((256, 256), (20 * index,) * 3)
                head = await stranger.head(item.url)
                assert (head.status_code, head.content) == (200, b"")
            assert data[0].url != data[1].url

    async def test_expired_file(
        self, plain: httpx.AsyncClient, engine: Engine, tmp_path: Path
    ) -> None:
        body = {"model": "small", "prompt": "a", "size": "64x64", "response_format": "url"}
        url = (await plain.post(GENERATIONS, json=body)).json()["data"][0]["url"]
        (path,) = files_of(tmp_path)
        assert url.endswith(path.name)
        past = time.time() - engine.config.max_data_age - 1
        os.utime(path, (past, past))
        answer = await plain.get(url)
        assert answer.status_code == 404
        assert conforms(answer.json(), "ErrorResponse")

    @pytest.mark.parametrize(
        "name",
        [
            "A" * 43 + ".png",
            "..%2f..%2fconfig.yaml",
            "%2e%2e%2f%2e%2e%2fjobs.sqlite3",
            "..",
            "../../../../etc/passwd",
            "a%00.png",
        ],
    )
    async def test_name_that_was_never_given(self, plain: httpx.AsyncClient, name: str) -> None:
        answer = await plain.get(f"/v1/images/files/{name}")
        assert answer.status_code == 404
        assert conforms(answer.json(), "ErrorResponse")

    async def test_only_reading_needs_no_key(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as stranger:
            assert (await stranger.post("/v1/images/files/x.png")).status_code == 401
            assert (await stranger.post(GENERATIONS, json={})).status_code == 401
            assert (await stranger.get("/v1/images/files/x.png")).status_code == 404


class TestStream:
    async def test_previews_then_images(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        stream = await sdk.images.generate(
            model="small", prompt="a", n=2, size="1024x1024", stream=True, partial_images=3
        )
        events = [event async for event in stream]
        assert [event.type for event in events] == [
            *["image_generation.partial_image"] * 3,
            *["image_generation.completed"] * 2,
        ]
        for event in events:
            assert conforms(event.to_dict(mode="json"), "ImageGenStreamEvent")
            assert event.size == "1024x1024"
        colours = [colour(opened(event.b64_json)) for event in events]
        assert colours == [(0, 0, 0), (50, 0, 0), (100, 0, 0), (0, 0, 0), (20, 20, 20)]
        assert [event.to_dict().get("partial_image_index") for event in events[:3]] == [0, 1, 2]
        assert [event.to_dict().get("seed") for event in events[3:]] == [SEED, SEED + 1]
        assert runtime.requests[0].partial_images == 3

    async def test_lines(self, plain: httpx.AsyncClient) -> None:
        body = {"model": "small", "prompt": "a", "size": "64x64", "stream": True}
        answer = await plain.post(GENERATIONS, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        event, data, *end = answer.text.split("\n")
        assert event == "event: image_generation.completed"
        document = json.loads(data.removeprefix("data: "))
        assert conforms(document, "ImageGenStreamEvent")
        assert document["size"] == "auto", "the contract knows no such size"
        assert end == ["", ""]

    async def test_edit(self, sdk: openai.AsyncOpenAI) -> None:
        stream = await sdk.images.edit(
            model="small",
            image=file_of(Image.new("RGB", (8, 8))),
            prompt="a",
            stream=True,
            partial_images=1,
        )
        events = [event async for event in stream]
        assert [event.type for event in events] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]
        for event in events:
            assert conforms(event.to_dict(mode="json"), "ImageEditStreamEvent")

    async def test_preview_is_sent_before_the_run_goes_on(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        seen = asyncio.Event()

        async def waits_for_the_client(request: ImageRequest) -> AsyncGenerator[Event, None]:
            image = Image.new("RGB", (8, 8))
            yield PartialImage(0, image)
            await seen.wait()
            yield ImageResult((image,), 1)

        runtime.answer = waits_for_the_client
        count = 0
        async with asyncio.timeout(TIMEOUT_S):
            stream = await sdk.images.generate(
                model="small", prompt="a", stream=True, partial_images=1
            )
            async for _ in stream:
                seen.set()
                count += 1
        assert count == 2

    @pytest.mark.parametrize("result", [True, False])
    async def test_failure_on_the_way_is_the_last_event(
        self, sdk: openai.AsyncOpenAI, engine: Engine, runtime: FakeRuntime, result: bool
    ) -> None:
        async def breaks(request: ImageRequest) -> AsyncGenerator[Event, None]:
            yield PartialImage(0, Image.new("RGB", (8, 8)))
            if result:
                raise RuntimeFailed("the device fell over")

        runtime.answer = breaks
        stream = await sdk.images.generate(model="small", prompt="a", stream=True, partial_images=1)
        reason = "the device fell over" if result else "gave no image"
        with pytest.raises(openai.APIError, match=reason) as caught:
            async for event in stream:
                assert event.type == "image_generation.partial_image"
        assert caught.value.code == "runtime_failed"
        assert engine.model_status("small").leases == 0


@pytest.mark.parametrize(
    ("fields", "with_url"),
    [
        ({"model": "dall-e-2"}, True),
        ({"model": "dall-e-3"}, True),
        ({"model": "dall-e-3", "response_format": "b64_json"}, False),
        ({"model": "dall-e-3", "stream": True}, False),
        ({"model": "gpt-image-1"}, False),
        ({"model": "small"}, False),
        ({"model": "small", "response_format": "url"}, True),
    ],
)
def test_the_name_of_a_model_decides_what_its_clients_expect(
    fields: dict[str, Any], with_url: bool
) -> None:
    body = GenerationBody.of(Fields({"prompt": "a", **fields}, typed=True))
    assert body.answers_with_url is with_url


class TestEdit:
    async def test_images_and_mask(self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
        mask = Image.new("RGBA", (8, 6), (0, 0, 0, 255))
        mask.putpixel((2, 3), (0, 0, 0, 0))
        raw = await sdk.images.with_raw_response.edit(
            model="small",
            image=[
                file_of(Image.new("RGB", (8, 6), RED)),
                ("b.webp", file_of(Image.new("RGB", (4, 4), GREEN), "WEBP", lossless=True)),
            ],
            mask=file_of(mask),
            prompt="a hat",
            n=2,
            size="256x256",
            input_fidelity="high",
            extra_body={
                "strength": 0.25,
                "seed": 5,
                "loras": [{"name": "ink", "weight": 0.5}, {"name": "glow", "weight": 2}],
                "control_image": data_url(Image.new("RGB", (3, 3), WHITE)),
            },
        )
        assert conforms(json.loads(raw.content), "ImagesResponse")
        assert len(images_of(raw.parse())) == 2
        (request,) = runtime.requests
        assert (request.operation, request.prompt, request.n) == (ImageOperation.EDIT, "a hat", 2)
        assert (request.width, request.height) == (256, 256)
        assert [image.size for image in request.images] == [(8, 6), (4, 4)]
        assert [colour(image) for image in request.images] == [RED, GREEN]
        assert (request.mask.mode, request.mask.size) == ("L", (8, 6))
        assert request.mask.getbbox() == (2, 3, 3, 4), "only what is transparent is white"
        assert (request.strength, request.seed) == (0.25, 5)
        assert request.loras == (LoraChoice("ink", 0.5), LoraChoice("glow", 2))
        assert colour(request.control_image) == WHITE

    async def test_white_of_an_opaque_mask_is_painted_anew(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        mask = Image.new("L", (8, 6))
        mask.putpixel((1, 1), 255)
        image = file_of(Image.new("RGB", (8, 6)))
        await sdk.images.edit(model="small", image=image, mask=file_of(mask), prompt="a")
        assert runtime.requests[0].mask.getbbox() == (1, 1, 2, 2)

    async def test_transparent_image_is_its_own_mask(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        image = Image.new("RGBA", (8, 6), (*RED, 255))
        image.putpixel((7, 5), (0, 0, 0, 0))
        await sdk.images.edit(model="small", image=file_of(image), prompt="a")
        assert runtime.requests[0].mask.getbbox() == (7, 5, 8, 6)
        assert runtime.requests[0].images[0].getpixel((7, 5)) == WHITE

    async def test_opaque_image_alone_has_no_mask(
        self, sdk: openai.AsyncOpenAI, runtime: FakeRuntime
    ) -> None:
        image = file_of(Image.new("RGBA", (8, 6), (*RED, 255)))
        await sdk.images.edit(model="small", image=image, prompt="a")
        assert runtime.requests[0].mask is None

    async def test_json(self, plain: httpx.AsyncClient, runtime: FakeRuntime) -> None:
        body = {
            "model": "small",
            "prompt": "a",
            "images": [
                {"image_url": data_url(Image.new("RGB", (8, 6), RED))},
                {"image_url": data_url(Image.new("RGB", (4, 4), GREEN))},
            ],
            "mask": {"image_url": data_url(Image.new("L", (8, 6), 255))},
        }
        answer = await plain.post(EDITS, json=body)
        assert answer.status_code == 200
        assert conforms(answer.json(), "ImagesResponse")
        (request,) = runtime.requests
        assert [colour(image) for image in request.images] == [RED, GREEN]
        assert colour(request.mask) == 255


async def test_variation(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    raw = await sdk.images.with_raw_response.create_variation(
        model="small", image=file_of(Image.new("RGB", (8, 8), RED)), n=3, size="256x256"
    )
    assert conforms(json.loads(raw.content), "ImagesResponse")
    assert len(images_of(raw.parse())) == 3
    (request,) = runtime.requests
    assert (request.operation, request.n) == (ImageOperation.VARIATION, 3)
    assert [colour(image) for image in request.images] == [RED]


class TestRefusal:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"model": None}, "model"),
            ({"model": ["small"]}, "model"),
            ({"prompt": None}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": 7}, "prompt"),
            ({"prompt": "x" * 32_001}, "prompt"),
            ({"n": 1000}, "n"),
            ({"n": 0}, "n"),
            ({"n": "2"}, "n"),
            ({"n": True}, "n"),
            ({"n": 1.5}, "n"),
            ({"size": "axb"}, "size"),
            ({"size": "0x64"}, "size"),
            ({"size": "-1x64"}, "size"),
            ({"size": "64X64"}, "size"),
            ({"size": "20000x64"}, "size"),
            ({"size": [64, 64]}, "size"),
            ({"size": "٦٤x64"}, "size"),
            ({"quality": "best"}, "quality"),
            ({"steps": 0}, "steps"),
            ({"steps": 10**400}, "steps"),
            ({"guidance": -1}, "guidance"),
            ({"strength": 0}, "strength"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**63}, "seed"),
            ({"stream": "yes"}, "stream"),
            ({"stream": True, "partial_images": 4}, "partial_images"),
            ({"partial_images": 1}, "partial_images"),
            ({"style": "baroque"}, "style"),
            ({"stream": True, "response_format": "url"}, "response_format"),
            ({"response_format": "json"}, "response_format"),
            ({"output_format": "gif"}, "output_format"),
            ({"output_compression": 50}, "output_compression"),
            ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
            ({"background": "transparent"}, "background"),
            ({"loras": [{"name": "a", "scale": 1}]}, "loras[0].scale"),
            ({"loras": [{"name": "a"}, {"weight": 1}]}, "loras[1].name"),
            ({"loras": {"name": "a"}}, "loras"),
            ({"image": 7}, "image"),
            ({"image": "http://127.0.0.1/a.png"}, "image"),
            ({"control_image": {"file_id": "file-1"}}, "control_image"),
            ({"reference_image": "nonsense"}, "reference_image"),
            ({"mask": "AAAA"}, "mask"),
            ({"frobnicate": 1}, "frobnicate"),
        ],
    )
    async def test_wrong_field_is_named(
        self,
        client: httpx.AsyncClient,
        engine: Engine,
        runtime: FakeRuntime,
        body: dict[str, Any],
        param: str,
    ) -> None:
        document = {"model": "small", "prompt": "a", **body}
        answer = await client.post(GENERATIONS, json=document, headers=KEY)
        assert answer.status_code == 400
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == param
        assert runtime.requests == []
        assert engine.status().ledger.granted_bytes == 0, "the model was loaded"

    @pytest.mark.parametrize(
        ("image", "mask"),
        [
            (b"", None),
            (b"no picture", None),
            (file_of(Image.effect_noise((32, 32), 100))[:200], None),
            (file_of(Image.new("RGB", (8, 8)), "GIF", save_all=True), b""),
            (file_of(Image.new("RGB", (8, 8))), file_of(Image.new("L", (8, 9)))),
        ],
    )
    async def test_wrong_upload_is_named(
        self,
        sdk: openai.AsyncOpenAI,
        engine: Engine,
        image: bytes,
        mask: bytes | None,
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.images.edit(
                model="small", image=image, prompt="a", mask=openai.omit if mask is None else mask
            )
        assert caught.value.param == ("image" if mask is None else "mask")
        assert engine.status().ledger.granted_bytes == 0, "the model was loaded"

    async def test_animated_bomb(self, sdk: openai.AsyncOpenAI) -> None:
        frames = [Image.new("L", (5000, 5000), level) for level in (0, 255)]
        bomb = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
        with Peak() as peak, pytest.raises(openai.BadRequestError, match="animated") as caught:
            await sdk.images.edit(model="small", image=bomb, prompt="a")
        assert caught.value.param == "image"
        assert peak.grown_bytes < 60 * 2**20

    async def test_picture_of_400_million_pixels(self, sdk: openai.AsyncOpenAI) -> None:
        bomb = blank_png(20_000, 20_000)
        assert len(bomb) < 2**20
        with Peak() as peak, pytest.raises(openai.BadRequestError) as caught:
            await sdk.images.edit(model="small", image=bomb, prompt="a")
        assert caught.value.param == "image"
        assert peak.grown_bytes < 60 * 2**20

    async def test_picture_that_pillow_itself_would_take(self, sdk: openai.AsyncOpenAI) -> None:
        with Peak() as peak, pytest.raises(openai.BadRequestError) as caught:
            await sdk.images.edit(model="small", image=blank_png(8_000, 8_000), prompt="a")
        assert (caught.value.param, "pixels" in caught.value.message) == ("image", True)
        assert peak.grown_bytes < 60 * 2**20

    async def test_no_image_and_two_kinds_of_images(self, plain: httpx.AsyncClient) -> None:
        url = data_url(Image.new("RGB", (2, 2)))
        for images, param in (
            ({}, "image"),
            ({"images": []}, "images"),
            ({"image": url, "images": [url]}, "images"),
            ({"images": [url] * 17}, "images"),
            ({"images": [url, {"image_url": "https://example.com/"}]}, "images[1]"),
        ):
            body = {"model": "small", "prompt": "a", **images}
            answer = await plain.post(EDITS, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    async def test_stream_of_variations(self, plain: httpx.AsyncClient) -> None:
        form = {"model": "small", "stream": "true"}
        image = {"image": ("a.png", file_of(Image.new("RGB", (2, 2))))}
        answer = await plain.post(VARIATIONS, data=form, files=image)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")

    async def test_body_beyond_the_limit(
        self, plain: httpx.AsyncClient, settings: ServerSettings
    ) -> None:
        image = {"image": ("a.png", b"x" * settings.max_body_bytes)}
        answer = await plain.post(VARIATIONS, data={"model": "small"}, files=image)
        assert answer.status_code == 413
        assert conforms(answer.json(), "ErrorResponse")

    async def test_unknown_model(self, sdk: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            await sdk.images.generate(model="smal", prompt="a")
        assert caught.value.code == "model_not_found"


class Peak:
    """How far resident memory rose above what it was before, at its highest."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self._before_bytes = self._high_water_bytes()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.grown_bytes = self._high_water_bytes() - self._before_bytes

    def _high_water_bytes(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_ends_the_run(
    url: str, engine: Engine, runtime: FakeRuntime, stream: bool
) -> None:
    class Painting(Stuck):
        async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
            yield Progress(0.1)
            async for event in super().__call__(request):
                yield event

    stuck = runtime.answer = Painting()
    body = {"model": "small", "prompt": "a", "stream": stream}
    async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=60) as client:
        call = asyncio.create_task(client.post(GENERATIONS, json=body))
        await wait_for(stuck.began)
        assert engine.model_status("small").leases == 1
        call.cancel()
        await asyncio.wait([call])
    await wait_for(stuck.ended)
    runtime.answer = paint
    async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=TIMEOUT_S) as client:
        assert (await client.post(GENERATIONS, json=body)).status_code == 200
