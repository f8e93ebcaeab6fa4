"""The Videos API, with the official client over real sockets; jobs and files are the real ones."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import av
import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import SecretStr

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.events import Cut, Event, Progress, VideoResult
from engine.requests import LoraChoice, Priority, Quality, Request, VideoRequest
from engine.runtimes.base import Prepared
from server.app import create_app
from server.settings import ServerSettings
from server.start import Start
from tests.contract.openai import conforms
from tests.server.fake import FakeRuntime
from tests.server.test_connection import TIMEOUT_S, Stuck, wait_for
from tests.server.test_image_io import blank_png, file_of
from tests.server.test_images import RED, data_url

# Every method of `client.videos` says that OpenAI's own service will end.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VIDEOS = "/v1/videos"
KEY = {"authorization": "Bearer user-key"}
SIZE: Final = "1280x720"
"""One of the contract's; the answers could not be checked against it with another."""
FPS = 6
FRAMES = 6


class VideoRuntime(FakeRuntime):
    """Fills in a model's defaults, as runtimes must."""

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        assert isinstance(request, VideoRequest)
        if request.prompt == "the impossible":
            raise InvalidRequest("This cannot be shown.", param="prompt")
        fps = request.fps or FPS
        frames = request.num_frames or (round(request.seconds * fps) if request.seconds else FRAMES)
        width, height = request.width or 1280, request.height or 720
        request = replace(request, fps=fps, num_frames=frames, width=width, height=height)
        return Prepared(request, None)


async def film(request: VideoRequest) -> AsyncGenerator[Event, None]:
    """A red video."""
    yield Progress(0.5)
    assert request.num_frames and request.height and request.width and request.fps
    frames = np.zeros((request.num_frames, request.height, request.width, 3), np.uint8)
    frames[..., 0] = 255
    yield VideoResult(frames, request.fps, request.seed or 0)


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(api_keys=(SecretStr("user-key"),))


@pytest.fixture
def start(engine: Engine) -> Start:
    return Start(engine)


@pytest.fixture
def app(engine: Engine, settings: ServerSettings, start: Start) -> FastAPI:
    return create_app(engine, settings, start)


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = VideoRuntime()
    runtime.answer = film
    return runtime


@pytest.fixture
async def sdk(url: str, start: Start) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="user-key", max_retries=0
    ) as client:
        await asyncio.wait_for(start.done.wait(), TIMEOUT_S)
        yield client


@pytest.fixture
async def plain(url: str, sdk: openai.AsyncOpenAI) -> AsyncIterator[httpx.AsyncClient]:
    """Sends what the official client would not."""
    async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=TIMEOUT_S * 4) as client:
        yield client


async def ended(sdk: openai.AsyncOpenAI, video_id: str) -> openai.types.Video:
    async with asyncio.timeout(TIMEOUT_S * 4):
        return await sdk.videos.poll(video_id, poll_interval_ms=10)


def document_of(video: openai.types.Video) -> dict[str, Any]:
    """The answer, after checking it against the contract."""
    document = video.to_dict(mode="json")
    assert conforms(document, "VideoResource")
    return document


async def test_create_and_download(sdk: openai.AsyncOpenAI) -> None:
    video = await sdk.videos.create_and_poll(
        model="gpt-4o",
        prompt="a cat",
        seconds="1",  # type: ignore[arg-type]
        size=SIZE,
        poll_interval_ms=10,
        extra_body={"seed": 7},
    )
    document = document_of(video)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.model, video.prompt, video.size) == ("small", "a cat", SIZE)
    assert video.seconds == "1"
    assert (document["fps"], document["num_frames"], document["seed"]) == (FPS, FPS, 7)
    assert document["position"] is None
    assert video.completed_at is not None and video.expires_at is not None
    assert video.created_at <= video.completed_at < video.expires_at

    content = await sdk.videos.download_content(video.id)
    assert content.response.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(content.content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == FPS
    assert [frame.shape for frame in frames] == [(720, 1280, 3)] * FPS
    thumbnail = await sdk.videos.download_content(video.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.content)).format == "WEBP"


async def test_everything_reaches_the_runtime(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime
) -> None:
    video = await sdk.videos.create(
        model="small",
        prompt="a cat",
        size="64x48",  # type: ignore[arg-type]
        input_reference=file_of(Image.new("RGB", (8, 6), RED)),
        extra_body={
            "fps": 5,
            "num_frames": 3,
            "seed": 9,
            "motion": "fast",
            "negative_prompt": "dogs",
            "quality": "high",
            "steps": 4,
            "guidance": 1.5,
            "loras": [{"name": "ink", "weight": 0.5}],
            "priority": "normal",
        },
    )
    assert (video.size, video.seconds) == ("64x48", "0.6"), "the truth, though not the contract's"
    await ended(sdk, video.id)
    (request,) = runtime.requests
    assert (request.width, request.height, request.fps, request.num_frames) == (64, 48, 5, 3)
    assert (request.seed, request.motion, request.negative_prompt) == (9, 180, "dogs")
    assert (request.quality, request.steps, request.guidance) == (Quality.HIGH, 4, 1.5)
    assert request.loras == (LoraChoice("ink", 0.5),)
    assert request.scheduling.priority is Priority.NORMAL
    assert (request.image.size, request.image.getpixel((0, 0))) == ((8, 6), RED)


@pytest.mark.parametrize(
    ("motion", "bucket"), [("slow", 60), ("medium", 127), ("fast", 180), (0, 0), ("255", 255)]
)
async def test_motion(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime, motion: object, bucket: int
) -> None:
    video = await sdk.videos.create(model="small", prompt="a", extra_body={"motion": motion})
    await ended(sdk, video.id)
    assert runtime.requests[0].motion == bucket


@pytest.mark.parametrize("seconds", [2, 2.0, "2", "2.0"])
@pytest.mark.parametrize("header", [None, "interactive"])
async def test_json(
    plain: httpx.AsyncClient,
    sdk: openai.AsyncOpenAI,
    runtime: FakeRuntime,
    seconds: object,
    header: str | None,
) -> None:
    body = {
        "model": "small",
        "input_reference": {"image_url": data_url(Image.new("RGB", (8, 6), RED))},
        "seconds": seconds,
        "size": SIZE,
    }
    headers = {} if header is None else {"x-roundhouse-priority": header}
    answer = await plain.post(VIDEOS, json=body, headers=headers)
    assert answer.status_code == 200
    assert conforms(answer.json(), "VideoResource")
    assert (answer.json()["seconds"], answer.json()["prompt"]) == ("2", None)
    await ended(sdk, answer.json()["id"])
    (request,) = runtime.requests
    assert request.image.size == (8, 6)
    assert request.scheduling.priority is (
        Priority.BATCH if header is None else Priority.INTERACTIVE
    )


async def test_the_job_says_what_of_its_texts_was_cut(
    sdk: openai.AsyncOpenAI, runtime: FakeRuntime
) -> None:
    plain_answer = runtime.answer

    async def cut(request: VideoRequest) -> AsyncGenerator[Event, None]:
        yield Cut("prompt", 127, 400)
        async for event in plain_answer(request):
            yield event

    runtime.answer = cut
    video: Any = await sdk.videos.create(model="small", prompt="a", size=SIZE)
    assert video.cut == []
    done: Any = await ended(sdk, video.id)
    assert done.cut == [{"param": "prompt", "kept": 127, "given": 400}]


async def test_reference_object_in_a_form(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    reference = {"image_url": data_url(Image.new("RGB", (8, 6), RED))}
    video = await sdk.videos.create(
        model="small", prompt="a", size=SIZE, extra_body={"input_reference": reference}
    )
    await ended(sdk, video.id)
    assert runtime.requests[0].image.size == (8, 6)


class TestQueue:
    """One job runs and is stuck; the model takes one at a time."""

    @pytest.fixture
    def stuck(self, runtime: FakeRuntime) -> Stuck:
        class Filming(Stuck):
            async def __call__(self, request: Any) -> AsyncGenerator[Event, None]:
                yield Progress(0.42)
                async for event in super().__call__(request):
                    yield event

        stuck = runtime.answer = Filming()
        return stuck

    async def test_progress_and_place(self, sdk: openai.AsyncOpenAI, stuck: Stuck) -> None:
        created = [
            await sdk.videos.create(model="small", prompt=str(index), size=SIZE)
            for index in range(5)
        ]
        await wait_for(stuck.began)
        videos = [await sdk.videos.retrieve(video.id) for video in created]
        documents = [document_of(video) for video in videos]
        assert [video.status for video in videos[:1]] == ["in_progress"]
        assert (videos[0].progress, documents[0]["position"]) == (42, None)
        queued = [each for each in documents if each["status"] == "queued"]
        assert len(queued) >= 2
        assert [each["position"] for each in queued] == list(range(len(queued)))
        assert all(each["progress"] == 0 for each in queued)

    async def test_cancel(
        self, sdk: openai.AsyncOpenAI, plain: httpx.AsyncClient, engine: Engine, stuck: Stuck
    ) -> None:
        video = await sdk.videos.create(model="small", prompt="a", size=SIZE)
        await wait_for(stuck.began)
        answer = await plain.post(f"{VIDEOS}/{video.id}/cancel")
        assert stuck.ended.is_set()
        assert engine.model_status("small").leases == 0
        assert conforms(answer.json(), "VideoResource")
        assert answer.json()["status"] == "failed"
        assert answer.json()["error"]["code"] == "cancelled"
        kept = await sdk.videos.retrieve(video.id)
        assert kept.error is not None and kept.error.code == "cancelled"

    async def test_delete(self, sdk: openai.AsyncOpenAI, stuck: Stuck) -> None:
        video = await sdk.videos.create(model="small", prompt="a", size=SIZE)
        await wait_for(stuck.began)
        deleted = await sdk.videos.delete(video.id)
        assert conforms(deleted.to_dict(mode="json"), "DeletedVideoResource")
        assert (deleted.id, deleted.deleted) == (video.id, True)
        assert stuck.ended.is_set()
        with pytest.raises(openai.NotFoundError):
            await sdk.videos.retrieve(video.id)

    async def test_content_of_an_unfinished_job(
        self, sdk: openai.AsyncOpenAI, stuck: Stuck
    ) -> None:
        video = await sdk.videos.create(model="small", prompt="a", size=SIZE)
        with pytest.raises(openai.ConflictError) as caught:
            await sdk.videos.download_content(video.id)
        assert conforms(caught.value.response.json(), "ErrorResponse")

    async def test_job_outlives_its_connection(
        self, url: str, sdk: openai.AsyncOpenAI, stuck: Stuck
    ) -> None:
        async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=60) as client:
            await client.post(VIDEOS, json={"model": "small", "prompt": "a", "size": SIZE})
        await wait_for(stuck.began)
        (video,) = (await sdk.videos.list()).data
        assert video.status == "in_progress"
        assert not stuck.ended.is_set()

    async def test_stop_does_not_wait_for_jobs(
        self, sdk: openai.AsyncOpenAI, start: Start, stuck: Stuck
    ) -> None:
        await sdk.videos.create(model="small", prompt="a", size=SIZE)
        await wait_for(stuck.began)
        await asyncio.wait_for(start.drain(limit_s=3600), TIMEOUT_S)
        assert stuck.ended.is_set()
        with pytest.raises(openai.InternalServerError) as caught:
            await sdk.videos.create(model="small", prompt="a", size=SIZE)
        assert caught.value.status_code == 503


async def test_list(sdk: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
    empty = (await plain.get(VIDEOS)).json()
    assert conforms(empty, "VideoListResource")
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)
    ids = [
        (await sdk.videos.create(model="small", prompt=str(index), size=SIZE)).id
        for index in range(5)
    ]
    for video_id in ids:
        await ended(sdk, video_id)
    page = (await plain.get(VIDEOS, params={"limit": 2})).json()
    assert conforms(page, "VideoListResource")
    assert [video["id"] for video in page["data"]] == [ids[4], ids[3]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[4], ids[3], True)
    # The official client fetches page after page.
    assert [video.id async for video in sdk.videos.list(limit=2)] == ids[::-1]
    assert [video.id async for video in sdk.videos.list(limit=2, order="asc")] == ids
    assert [video.id async for video in sdk.videos.list(after=ids[3])] == ids[2::-1]


async def test_ranges_of_a_file(sdk: openai.AsyncOpenAI, plain: httpx.AsyncClient) -> None:
    video = await sdk.videos.create(model="small", prompt="a", size=SIZE)
    await ended(sdk, video.id)
    url = f"{VIDEOS}/{video.id}/content"
    whole = await plain.get(url)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["cache-control"] == "private"
    part = await plain.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    head = await plain.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)


def files_of(folder: Path, video_id: str) -> list[Path]:
    return list(folder.rglob(f"{video_id}.*"))


async def test_expired_content(sdk: openai.AsyncOpenAI, engine: Engine, tmp_path: Path) -> None:
    video = await sdk.videos.create(model="small", prompt="a", size=SIZE)
    await ended(sdk, video.id)
    files = files_of(tmp_path, video.id)
    assert len(files) == 2
    for path in files:
        os.unlink(path)
    with pytest.raises(openai.NotFoundError, match="expired"):
        await sdk.videos.download_content(video.id)
    assert (await sdk.videos.retrieve(video.id)).status == "completed"


class TestRefusal:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"model": None}, "model"),
            ({"prompt": None}, "prompt"),
            ({"prompt": "the impossible"}, "prompt"),
            ({"seconds": 0}, "seconds"),
            ({"seconds": "0"}, "seconds"),
            ({"seconds": -4}, "seconds"),
            ({"seconds": "nan"}, "seconds"),
            ({"seconds": "inf"}, "seconds"),
            ({"seconds": 1e300}, "seconds"),
            ({"seconds": "1e300"}, "seconds"),
            ({"seconds": "four"}, "seconds"),
            ({"seconds": True}, "seconds"),
            ({"seconds": [4]}, "seconds"),
            ({"seconds": 4, "num_frames": 9}, "num_frames"),
            ({"num_frames": 0}, "num_frames"),
            ({"num_frames": 10**9}, "num_frames"),
            ({"fps": 0}, "fps"),
            ({"fps": 1000}, "fps"),
            ({"size": "axb"}, "size"),
            ({"motion": "wild"}, "motion"),
            ({"motion": 256}, "motion"),
            ({"motion": -1}, "motion"),
            ({"motion": True}, "motion"),
            ({"motion": None, "input_reference": 4}, "input_reference"),
            ({"input_reference": {"file_id": "file-1"}}, "input_reference"),
            ({"input_reference": {"image_url": "https://example.com"}}, "input_reference"),
            ({"input_reference": {}}, "input_reference"),
            ({"priority": "urgent"}, "priority"),
            ({"loras": "ink"}, "loras"),
            ({"frobnicate": 1}, "frobnicate"),
        ],
    )
    async def test_wrong_field_is_named(
        self, client: httpx.AsyncClient, start: Start, body: dict[str, Any], param: str
    ) -> None:
        await asyncio.wait_for(start.done.wait(), TIMEOUT_S)
        document = {"model": "small", "prompt": "a", **body}
        answer = await client.post(VIDEOS, json=document, headers=KEY)
        assert answer.status_code == 400
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == param
        assert (await client.get(VIDEOS, headers=KEY)).json()["data"] == []

    @pytest.mark.parametrize("reference", [b"", b"no picture", blank_png(20_000, 20_000)])
    async def test_wrong_upload_is_named(self, sdk: openai.AsyncOpenAI, reference: bytes) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.videos.create(model="small", prompt="a", input_reference=reference)
        assert caught.value.param == "input_reference"

    @pytest.mark.parametrize(
        "query", [{"limit": "101"}, {"limit": "-1"}, {"limit": "x"}, {"order": "up"}, {"page": "2"}]
    )
    async def test_wrong_query_is_named(
        self, client: httpx.AsyncClient, query: dict[str, str]
    ) -> None:
        answer = await client.get(VIDEOS, params=query, headers=KEY)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(query))

    async def test_unknown_job(self, client: httpx.AsyncClient, start: Start) -> None:
        await asyncio.wait_for(start.done.wait(), TIMEOUT_S)
        url = f"{VIDEOS}/video_{'0' * 32}"
        for method, path in (
            ("GET", url),
            ("GET", f"{url}/content"),
            ("DELETE", url),
            ("POST", f"{url}/cancel"),
            ("GET", f"{VIDEOS}?after=video_{'0' * 32}"),
            ("GET", f"{VIDEOS}/..%2f..%2fjobs/content"),
        ):
            answer = await client.request(method, path, headers=KEY)
            assert answer.status_code == 404, path
            assert conforms(answer.json(), "ErrorResponse")

    async def test_unknown_variant(self, client: httpx.AsyncClient) -> None:
        path = f"{VIDEOS}/video_{'0' * 32}/content?variant=spritesheet"
        answer = await client.get(path, headers=KEY)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "variant")

    async def test_without_a_key(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as stranger:
            assert (await stranger.get(VIDEOS)).status_code == 401
            assert (await stranger.post(VIDEOS, json={})).status_code == 401
            assert (await stranger.get(f"{VIDEOS}/x/content")).status_code == 401


async def test_failed_job_tells_why(sdk: openai.AsyncOpenAI, runtime: FakeRuntime) -> None:
    async def refuses(request: VideoRequest) -> AsyncGenerator[Event, None]:
        yield Progress(0.1)
        raise InvalidRequest("There is no such adapter.", param="loras")

    runtime.answer = refuses
    video = await ended(sdk, (await sdk.videos.create(model="small", prompt="a", size=SIZE)).id)
    document = document_of(video)
    assert document["status"] == "failed"
    assert document["error"] == {"code": "invalid_request", "message": "There is no such adapter."}
    with pytest.raises(openai.NotFoundError):
        await sdk.videos.download_content(video.id)
