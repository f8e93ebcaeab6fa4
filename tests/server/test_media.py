from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from server.media import check_media_urls

ALLOWED = ("images.example", "media.example:8443", "[::1]:80")


def chat(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]}


FOREIGN = "http://10.0.0.1/secret"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat({"image_url": {"url": FOREIGN}}), "messages[0].content[1].image_url"),
        (chat({"image_url": FOREIGN}), "messages[0].content[1].image_url"),
        (chat({"audio_url": {"url": FOREIGN}}), "messages[0].content[1].audio_url"),
        (chat({"video_url": {"url": FOREIGN}}), "messages[0].content[1].video_url"),
        (chat({"type": "input_file", "file_url": FOREIGN}), "messages[0].content[1].file_url"),
        (
            chat({"type": "image", "source": {"type": "url", "url": FOREIGN}}),
            "messages[0].content[1].source",
        ),
        (
            chat({"type": "tool_result", "content": [{"source": {"url": FOREIGN}}]}),
            "messages[0].content[1].content[0].source",
        ),
        (
            {"input": [{"content": [{"type": "input_image", "image_url": FOREIGN}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"messages": [{"type": "tool_use", "content": [{"image_url": FOREIGN}]}]},
            "messages[0].content[0].image_url",
        ),
    ],
)
def test_foreign_url_is_refused_and_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_media_urls(body, ALLOWED)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://images.example/a",
        "//images.example/a",
        "http://images.example.evil/a",
        "http://evil/images.example",
        "http://images.example@evil/a",
        "http://evil\\@images.example/a",
        "http://evil\t@images.example/a",
        "http://evil @images.example/a",
        "http://[images.example/a",
        " data:image/png;base64,AA",
        "https://images.example:8443/a",
        "http://images.example:443/a",
        "https://images.example:x/a",
        "https://user@images.example/a",
        "http://images.example:6379/a",
    ],
)
def test_urls_that_only_look_allowed(url: str) -> None:
    with pytest.raises(InvalidRequest):
        check_media_urls(chat({"image_url": {"url": url}}), ALLOWED)


@pytest.mark.parametrize(
    "body",
    [
        chat({"image_url": {"url": "data:image/png;base64,AA"}}),
        chat({"image_url": {"url": "https://images.example/a.png"}}),
        chat({"image_url": {"url": "HTTPS://Images.Example:443/a.png"}}),
        chat({"image_url": "https://media.example:8443/a.png"}),
        chat({"image_url": "http://[::1]/a.png"}),
        chat({"type": "image", "source": {"type": "base64", "data": "AA"}}),
        chat({"type": "text", "text": FOREIGN}),
        chat({"type": "tool_use", "input": {"image_url": FOREIGN}}),
        {"input": FOREIGN},
        {"input": [[1, 2], [3]]},
        {"tools": [{"image_url": FOREIGN}]},
    ],
)
def test_what_is_never_fetched_or_allowed_passes(body: dict[str, Any]) -> None:
    check_media_urls(body, ALLOWED)
