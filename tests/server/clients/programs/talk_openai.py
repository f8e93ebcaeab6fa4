"""A conversation by voice, through OpenAI's Python SDK."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from spoken import MODEL, TOOL, URL, check_spoken, pieces, question, words


@pytest.fixture
async def connection() -> AsyncIterator[AsyncRealtimeConnection]:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    async with client.realtime.connect(model=MODEL) as connection:
        assert (await connection.recv()).type == "session.created"
        yield connection


async def until(connection: AsyncRealtimeConnection, *kinds: str) -> list[Any]:
    """All events up to one of these kinds."""
    events = []
    async for event in connection:
        assert event.type != "error", event
        events.append(event)
        if event.type in kinds:
            break
    return events


async def say(connection: AsyncRealtimeConnection, pcm: bytes) -> None:
    for piece in pieces(pcm):
        await connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())


async def test_a_question_is_answered_and_interrupts_a_story(
    connection: AsyncRealtimeConnection,
) -> None:
    asked = question()
    await connection.session.update(
        session={
            "type": "realtime",
            "max_output_tokens": 20,
            "audio": {
                "input": {"transcription": {"model": "whisper-1"}},
                "output": {"voice": "marin"},
            },
        }
    )
    await say(connection, asked)
    events = await until(connection, "response.done")
    answer = events[-1].response
    assert answer.status in ("completed", "incomplete")
    completed = "conversation.item.input_audio_transcription.completed"
    [heard] = [event.transcript for event in events if event.type == completed]
    assert "capital of france" in heard.lower()
    audio = [event for event in events if event.type == "response.output_audio.delta"]
    pcm = b"".join(base64.b64decode(event.delta) for event in audio)
    check_spoken(answer.output[0].content[0].transcript, pcm)

    content = [{"type": "input_text", "text": "Tell me a long story about a train."}]
    await connection.conversation.item.create(
        item={"type": "message", "role": "user", "content": content}
    )
    await connection.response.create(response={"max_output_tokens": 200})
    story = (await until(connection, "response.output_audio.delta"))[-1]
    await say(connection, asked)
    cancelled = (await until(connection, "response.done"))[-1].response
    assert (cancelled.id, cancelled.status) == (story.response_id, "cancelled")
    assert cancelled.status_details.reason == "turn_detected"
    # The client says how much of it was heard.
    await connection.conversation.item.truncate(
        item_id=story.item_id, content_index=0, audio_end_ms=300
    )
    events = await until(connection, "conversation.item.truncated")
    await connection.conversation.item.retrieve(item_id=story.item_id)
    events += await until(connection, "conversation.item.retrieved")
    kept = events[-1].item.content[0].transcript
    assert len(words(kept)) < 6, kept
    audio = [event for event in events if event.type == "response.output_audio.delta"]
    assert story.response_id not in {event.response_id for event in audio}


async def test_a_function_is_called(connection: AsyncRealtimeConnection) -> None:
    await connection.session.update(
        session={
            "type": "realtime",
            "output_modalities": ["text"],
            "max_output_tokens": 60,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": TOOL["name"]},
        }
    )
    content = [{"type": "input_text", "text": "What is the weather in Paris?"}]
    await connection.conversation.item.create(
        item={"type": "message", "role": "user", "content": content}
    )
    await connection.response.create()
    events = await until(connection, "response.done")
    [call] = events[-1].response.output
    assert (call.type, call.name) == ("function_call", TOOL["name"])
    assert isinstance(json.loads(call.arguments)["city"], str)
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments

    await connection.conversation.item.create(
        item={"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
    )
    await connection.response.create(response={"tool_choice": "none", "max_output_tokens": 16})
    answer = (await until(connection, "response.done"))[-1].response
    assert answer.output[0].content[0].text
