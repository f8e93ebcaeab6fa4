"""Pictures through a real server and a real model, by the official clients."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
from PIL import Image, ImageDraw

from tests.server.real import Server

pytestmark = pytest.mark.slow

MODEL = "tiny-idefics3"
QUESTION = "What is this?"
TOKENS = 16


def drawing() -> Image.Image:
    image = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(image).rectangle((10, 10, 50, 80), fill="navy")
    return image


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def part(data: str, kind: str = "png", **more: Any) -> Any:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}", **more}}


def messages(*parts: Any) -> Any:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def chat(sdk: openai.OpenAI, *parts: Any) -> Any:
    return sdk.chat.completions.create(
        model=MODEL, messages=messages(*parts), max_tokens=TOKENS, temperature=0
    )


@pytest.fixture(scope="module")
def seen(sdk: openai.OpenAI) -> Any:
    """What the model says of the drawing."""
    return chat(sdk, part(file_of(drawing())))


def test_pictures_count_as_tokens_and_change_the_answer(sdk: openai.OpenAI, seen: Any) -> None:
    blind = sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], max_tokens=TOKENS
    )
    other = chat(sdk, part(file_of(Image.new("RGB", (120, 90), "white"))))
    assert blind.usage is not None
    assert other.usage.prompt_tokens == seen.usage.prompt_tokens > blind.usage.prompt_tokens + 40
    texts = {each.choices[0].message.content for each in (seen, other, blind)}
    assert len(texts) == 3


def test_a_rotated_photograph_is_seen_upright(sdk: openai.OpenAI, seen: Any) -> None:
    """And a transparent drawing on white, a palette in its colours."""
    turned = drawing().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = drawing().convert("RGBA")
    clear.putalpha(drawing().convert("L").point(lambda level: 0 if level == 255 else 255))
    for picture in (
        part(file_of(turned, exif=exif)),
        part(file_of(clear)),
        part(file_of(drawing().convert("P", palette=Image.Palette.ADAPTIVE))),
        part(file_of(drawing(), "WEBP", lossless=True), "webp"),
    ):
        answer = chat(sdk, picture)
        assert answer.usage.prompt_tokens == seen.usage.prompt_tokens
        assert answer.choices[0].message.content == seen.choices[0].message.content


def test_a_stream_and_the_other_interfaces_say_the_same(
    sdk: openai.OpenAI, server: Server, seen: Any
) -> None:
    expected, data = seen.choices[0].message.content, file_of(drawing())
    chunks = sdk.chat.completions.create(
        model=MODEL,
        messages=messages(part(data, detail="high")),
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == expected
    content: Any = [
        {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{data}"},
        {"type": "input_text", "text": QUESTION},
    ]
    response = sdk.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": content}],
        max_output_tokens=TOKENS,
        temperature=0,
    )
    assert response.output_text == expected
    assert response.usage is not None
    assert response.usage.input_tokens == seen.usage.prompt_tokens
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    source: Any = {"type": "base64", "media_type": "image/png", "data": data}
    asked: Any = messages({"type": "image", "source": source})
    message = client.messages.create(
        model=MODEL, messages=asked, max_tokens=TOKENS, extra_body={"temperature": 0}
    )
    assert message.content[0].type == "text"
    assert message.content[0].text == expected
    counted = client.messages.count_tokens(model=MODEL, messages=asked)
    assert counted.input_tokens == seen.usage.prompt_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == (
        counted.input_tokens
    )


def test_ollama_sees_and_says_so(server: Server, seen: Any) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION, "images": [file_of(drawing())]}],
        "options": {"temperature": 0, "num_predict": TOKENS},
        "stream": False,
    }
    answer = httpx.post(f"{server.url}/api/chat", json=body, timeout=60)
    assert answer.json()["message"]["content"] == seen.choices[0].message.content
    for name, sees in ((MODEL, True), ("tiny-llama", False)):
        shown = httpx.post(f"{server.url}/api/show", json={"model": name}).json()
        assert ("vision" in shown["capabilities"]) is sees
        listed = httpx.get(f"{server.url}/v1/models/{name}").json()
        assert ("image" in listed["input_modalities"]) is sees


def test_what_a_model_does_not_take(sdk: openai.OpenAI) -> None:
    sound: Any = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    for model, picture, param, reason in (
        ("tiny-llama", part(file_of(drawing())), "image_url", "takes no image, only text"),
        (MODEL, sound, "input_audio", "takes no audio"),
        (MODEL, part("AAAA"), "image_url", "cannot be read"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model=model, messages=messages(picture))
        assert caught.value.param == f"messages[0].content[0].{param}"
        assert reason in caught.value.message


def test_a_swap_changes_no_answer(server: Server, sdk: openai.OpenAI, seen: Any) -> None:
    for action in ("park", "unload"):
        done = httpx.post(f"{server.url}/v1/engine/models/{MODEL}/{action}", timeout=60)
        assert done.status_code == 200, done.text
        answer = chat(sdk, part(file_of(drawing())))
        assert answer.choices[0].message.content == seen.choices[0].message.content
    ledger = httpx.get(f"{server.url}/v1/engine").json()["ledger"]
    assert ledger["granted_bytes"] == sum(entry["nbytes"] for entry in ledger["entries"])
    assert json.dumps(ledger).count(MODEL) >= 3
