"""Images and videos of a real server with real pipelines, asked by the official client."""

from __future__ import annotations

import base64
import io
import signal
import time
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.contract.openai import conforms
from tests.engine.runtimes.diffusers.test_diffusers import IMAGE_FAMILIES, bare
from tests.server.real import Server, starter_config

pytestmark = [
    pytest.mark.slow,
    # The client's notices about OpenAI's own service.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WAIT_S = 120.0
SIZE: Any = "128x128"


def decoded(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def pixels(data: str | None) -> NDArray[np.uint8]:
    return np.asarray(decoded(data).convert("RGB"))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((128, 128)).convert("RGB")


def nearly_equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Within a level in one byte of ten thousand: what several threads of torch may differ by."""
    distance = np.abs(one.astype(int) - other.astype(int))
    return bool(distance.max() <= 1 and (distance > 0).mean() <= 1e-4)


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1"])
def test_images_by_their_well_known_names(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.images.generate(
        model=model, prompt="a red train", n=2, size=SIZE, extra_body={"seed": 3}
    )
    assert answer.data is not None and len(answer.data) == 2
    # OpenAI's own answer to a request that names no format.
    assert all((each.url is None) == model.startswith("gpt-") for each in answer.data)
    first, second = (
        pixels(each.b64_json or base64.b64encode(httpx.get(each.url or "").content).decode())
        for each in answer.data
    )
    assert first.shape == (128, 128, 3) and first.std() > 5
    assert (first != second).any()
    again = sdk.images.generate(
        model=model,
        prompt="a red train",
        size=SIZE,
        response_format="b64_json",
        extra_body={"seed": 3},
    )
    assert again.data is not None
    assert nearly_equal(pixels(again.data[0].b64_json), first)


def test_an_image_is_that_of_the_library_alone(sdk: openai.OpenAI, tmp_path: Path) -> None:
    name = "tiny-sdxl-turbo"
    pipe = bare(name, tmp_path, IMAGE_FAMILIES[name])
    expected = pipe(
        "a red train",
        width=128,
        height=128,
        num_inference_steps=2,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    answer = sdk.images.generate(
        model=name,
        prompt="a red train",
        size=SIZE,
        extra_body={"seed": 3, "steps": 2, "guidance": 0},
    )
    assert answer.data is not None
    assert nearly_equal(pixels(answer.data[0].b64_json), np.asarray(expected))


def test_the_raw_answer_keeps_the_contract(server: Server) -> None:
    body = {"model": "dall-e-3", "prompt": "a red train", "size": "128x128"}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=WAIT_S)
    assert conforms(answer.json(), "ImagesResponse")
    assert float(answer.headers["x-roundhouse-run-ms"]) > 0


def test_partial_images_are_streamed_and_converge(sdk: openai.OpenAI) -> None:
    stream: Any = sdk.images.generate(
        model="gpt-image-1",
        prompt="a red train",
        size=SIZE,
        stream=True,
        partial_images=3,
        extra_body={"seed": 3, "steps": 6},
    )
    events = list(stream)
    kinds = [event.type for event in events]
    partial, last = "image_generation.partial_image", "image_generation.completed"
    assert kinds == [partial] * 3 + [last]
    shown = [pixels(event.b64_json).astype(float) for event in events]
    distances = [np.abs(each - shown[-1]).mean() for each in shown[:-1]]
    assert distances == sorted(distances, reverse=True) and distances[-1] > 0


def test_edits_with_a_mask_and_variations(sdk: openai.OpenAI) -> None:
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    answer: Any = sdk.images.edit(
        model="dall-e-2",
        response_format="b64_json",
        image=("image.png", png(picture())),
        mask=("mask.png", png(mask)),
        prompt="a red train",
        extra_body={"seed": 3},
    )
    edited = pixels(answer.data[0].b64_json).astype(float)
    assert edited.shape == (128, 128, 3)
    changed = np.abs(edited - np.asarray(picture())).mean(axis=(0, 2))
    assert changed[:64].mean() > changed[64:].mean()
    variation = sdk.images.create_variation(
        model="dall-e-2", image=("image.png", png(picture())), n=1, response_format="url"
    )
    assert variation.data is not None and variation.data[0].url is not None
    file = httpx.get(variation.data[0].url)
    assert file.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(file.content)).size == (128, 128)


def probe(content: bytes) -> dict[str, Any]:
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return {
            "codec": stream.codec_context.name,
            "size": f"{stream.width}x{stream.height}",
            "fps": stream.average_rate,
            "frames": frames,
            "pix_fmt": stream.codec_context.pix_fmt,
        }


def test_a_video_is_created_polled_and_downloaded(server: Server, sdk: openai.OpenAI) -> None:
    video = sdk.videos.create_and_poll(
        model="sora-2",
        prompt="a red train",
        size="128x128",  # type: ignore[arg-type]  # the real service knows four sizes
        poll_interval_ms=100,
        extra_body={"num_frames": 9, "fps": 6, "seed": 3},
    )
    assert video.status == "completed", video.error
    assert video.progress == 100
    content = sdk.videos.download_content(video.id).read()
    assert probe(content) == {
        "codec": "h264",
        "size": "128x128",
        "fps": 6,
        "frames": 9,
        "pix_fmt": "yuv420p",
    }
    thumbnail = sdk.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (128, 128)
    assert video.id in [each.id for each in sdk.videos.list()]
    assert sdk.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.videos.retrieve(video.id)
    status = httpx.get(f"{server.url}/v1/engine").json()
    assert not [entry for entry in status["ledger"]["entries"] if entry["kind"] == "lease"]


def test_an_image_starts_to_move_and_a_text_through_an_image(sdk: openai.OpenAI) -> None:
    made = {}
    for name, reference in (("image", True), ("text", False)):
        more: dict[str, Any] = {}
        if reference:
            more["input_reference"] = ("start.png", png(picture()), "image/png")
        video = sdk.videos.create_and_poll(
            model="tiny-svd",
            prompt="a red train",
            poll_interval_ms=100,
            extra_body={"num_frames": 4, "fps": 4, "seed": 3, "steps": 2, "motion": "slow"},
            **more,
        )
        assert video.status == "completed", video.error
        made[name] = sdk.videos.download_content(video.id).read()
        assert probe(made[name])["frames"] == 4
    assert made["image"] != made["text"]


def test_bad_input_is_told_at_once(sdk: openai.OpenAI, server: Server) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"size": "100x100"}, "size"),
        ({"n": 1000}, "n"),
        ({"steps": 0}, "steps"),
        ({"loras": [{"name": "nothing"}]}, "loras[0].name"),
        ({"unheard_of": 1}, "unheard_of"),
    ]
    for fields, param in bad:
        body = {"model": "dall-e-2", "prompt": "x", **fields}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=WAIT_S)
        assert answer.status_code == 400, (fields, answer.text)
        assert conforms(answer.json(), "ErrorResponse")
        assert answer.json()["error"]["param"] == param
    with pytest.raises(openai.BadRequestError):
        sdk.images.generate(model="gpt-4o-mini", prompt="x")
    with pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(
            model="dall-e-3", messages=[{"role": "user", "content": "hello"}]
        )


def test_a_job_survives_a_kill(tmp_path: Path) -> None:
    arguments = ("--config", str(starter_config(tmp_path, {"tiny-wan"})))
    server = Server(tmp_path, *arguments)
    try:
        server.wait_ready()
        body = {"model": "tiny-wan", "prompt": "a red train", "size": "128x128", "num_frames": 9,
                "steps": 20, "seed": 3}  # fmt: skip
        created = httpx.post(f"{server.url}/v1/videos", json=body, timeout=WAIT_S)
        assert created.status_code == 200, created.text
        url = f"/v1/videos/{created.json()['id']}"
        deadline = time.monotonic() + WAIT_S
        while not httpx.get(server.url + url).json()["progress"]:
            assert time.monotonic() < deadline
        server.stop(signal.SIGKILL)
        second = Server(tmp_path, *arguments)
        try:
            second.wait_ready()
            while (job := httpx.get(second.url + url).json())["status"] != "completed":
                assert job["status"] in ("queued", "in_progress"), job
                assert time.monotonic() < deadline
                time.sleep(0.1)
            content = httpx.get(f"{second.url}{url}/content").content
            assert probe(content)["frames"] == 9
        finally:
            assert second.stop() == 0
    finally:
        server.stop()
