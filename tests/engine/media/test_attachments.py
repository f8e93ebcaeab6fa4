"""What a text request holds beside its texts."""

from __future__ import annotations

from typing import Any

import pytest

from engine.media.attachments import ROOTS, Kind, attachments


def of(part: Any) -> list[tuple[Kind, str]]:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]}
    return [(each.kind, each.param) for each in attachments(body)]


@pytest.mark.parametrize(
    ("part", "kind", "field"),
    [
        ({"type": "image_url", "image_url": {"url": "a"}}, Kind.IMAGE, "image_url"),
        ({"type": "input_image", "image_url": "a"}, Kind.IMAGE, "image_url"),
        ({"type": "image", "source": {"data": "a"}}, Kind.IMAGE, "source"),
        ({"image_url": "a"}, Kind.IMAGE, "image_url"),
        ({"type": "input_audio", "input_audio": {}}, Kind.AUDIO, "input_audio"),
        ({"audio_url": "a"}, Kind.AUDIO, "audio_url"),
        ({"type": "video_url", "video_url": {"url": "a"}}, Kind.VIDEO, "video_url"),
        ({"type": "file", "file": {}}, Kind.FILE, "file"),
        ({"type": "document", "source": {}}, Kind.FILE, "source"),
        ({"type": "image_embeds", "image_embeds": "a"}, Kind.TENSOR, "image_embeds"),
        ({"prompt_embeds": "a"}, Kind.TENSOR, "prompt_embeds"),
        ({"type": "prompt_embeds", "data": "a"}, Kind.TENSOR, "data"),
        ({"type": "audio_embeds", "audio_embeds": "a"}, Kind.TENSOR, "audio_embeds"),
        ({"type": "video_embeds", "video_embeds": "a"}, Kind.TENSOR, "video_embeds"),
        ({"type": "image_pil", "image_pil": "a"}, Kind.TENSOR, "image_pil"),
        ({"image_pil": "a"}, Kind.TENSOR, "image_pil"),
        ({"image_embeds": "a"}, Kind.TENSOR, "image_embeds"),
        ({"audio_embeds": "a"}, Kind.TENSOR, "audio_embeds"),
        ({"video_embeds": "a"}, Kind.TENSOR, "video_embeds"),
        ({"input_audio": {}}, Kind.AUDIO, "input_audio"),
        ({"video_url": "a"}, Kind.VIDEO, "video_url"),
        ({"type": "audio_url", "audio_url": {"url": "a"}}, Kind.AUDIO, "audio_url"),
        ({"type": "container_upload", "file_id": "a"}, Kind.FILE, "type"),
        ({"type": "input_file", "file_id": "a"}, Kind.FILE, "type"),
        (
            {"type": "tool_result", "content": [{"type": "image", "source": {}}]},
            Kind.IMAGE,
            "content[0].source",
        ),
    ],
)
def test_each_form_is_found_where_it_stands(part: Any, kind: Kind, field: str) -> None:
    assert of(part) == [(kind, f"messages[0].content[1].{field}")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "image_url": "a"},
        {"type": "tool_use", "input": {"type": "image_url", "image_url": "a"}},
        {"type": "thinking", "thinking": "image_url"},
    ],
)
def test_texts_and_arguments_of_calls_are_none(part: Any) -> None:
    assert of(part) == []


def test_items_of_responses_and_scores() -> None:
    image = {"type": "input_image", "image_url": "a"}
    body = {
        "input": [
            {"role": "user", "content": [image]},
            {"type": "function_call_output", "output": [image]},
        ],
        "documents": [{"content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
        "tools": [image],
    }
    assert [each.param for each in attachments(body)] == [
        "input[0].content[0].image_url",
        "input[1].output[0].image_url",
        "documents[0].content[0].image_url",
    ]


@pytest.mark.parametrize("root", ROOTS)
def test_every_field_that_may_hold_parts_is_looked_at(root: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "a"}}
    for value, place in (
        ([image], "[0]"),
        ([[image]], "[0][0]"),
        (image, ""),
        ({"content": [image]}, ".content[0]"),
    ):
        (found,) = attachments({root: value})
        assert found.param == f"{root}{place}.image_url" and found.place == f"{root}{place}"


def test_the_roots_are_those_of_the_interfaces() -> None:
    chat, responses = {"messages", "system"}, {"input", "prompt"}
    pooling = {"query", "queries", "documents", "items", "text_1", "text_2", "data_1", "data_2"}
    assert {*ROOTS} == chat | responses | pooling
