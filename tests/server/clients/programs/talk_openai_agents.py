"""A conversation by voice, through the realtime runner of OpenAI's Agents SDK."""

from __future__ import annotations

from typing import Any

from agents import function_tool, set_tracing_disabled
from agents.realtime import (
    RealtimeAgent,
    RealtimePlaybackTracker,
    RealtimeRunner,
    RealtimeSession,
)
from spoken import MODEL, URL, check_spoken, pieces, question, words

set_tracing_disabled(True)
called = []


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    called.append(city)
    return "Rain"


async def begin(
    agent: RealtimeAgent, tracker: RealtimePlaybackTracker, **more: Any
) -> RealtimeSession:
    settings = {"model_name": MODEL, **more}
    return await RealtimeRunner(agent, config={"model_settings": settings}).run(
        model_config={
            "url": f"{URL.replace('http', 'ws')}/v1/realtime?model={MODEL}",
            "api_key": "none",
            "playback_tracker": tracker,
        }
    )


async def until(session: RealtimeSession, events: list[Any], kind: str) -> Any:
    """Add all events up to one of this kind to `events`, and return it: the SDK's or our own."""
    async for event in session:
        assert event.type != "error", event
        events.append(event)
        if event.type == kind:
            return event
        own = getattr(event, "data", None)
        if getattr(own, "type", None) == "raw_server_event" and own.data["type"] == kind:
            return own.data
    raise AssertionError(f"the session ended before {kind}")


async def test_a_question_is_answered_and_interrupts_a_story() -> None:
    asked = pieces(question())
    tracker = RealtimePlaybackTracker()
    session = await begin(RealtimeAgent(name="Agent"), tracker, max_output_tokens=60, voice="alloy")
    async with session:
        events: list[Any] = []
        for piece in asked:
            await session.send_audio(piece)
        answer = (await until(session, events, "response.done"))["response"]
        await until(session, events, "agent_end")
        assert answer["status"] in ("completed", "incomplete")
        pcm = b"".join(event.audio.data for event in events if event.type == "audio")
        check_spoken(answer["output"][0]["content"][0]["transcript"], pcm)
        updated = [event for event in events if event.type == "history_updated"]
        said = [item for item in updated[-1].history if item.role == "user"]
        assert "capital of france" in said[0].content[0].transcript.lower()

        await session.send_message("Tell me a long story about a train.")
        story = (await until(session, events, "audio")).audio
        tracker.on_play_ms(story.item_id, story.content_index, 300)
        for piece in asked:
            await session.send_audio(piece)
        await until(session, events, "audio_interrupted")
        cancelled = (await until(session, events, "response.done"))["response"]
        assert (cancelled["id"], cancelled["status"]) == (story.response_id, "cancelled")
        # The SDK says how much of it was heard, and asks what is kept.
        events = []
        truncated = await until(session, events, "conversation.item.truncated")
        assert truncated["item_id"] == story.item_id
        # It says no more than has come by then.
        assert 0 < truncated["audio_end_ms"] <= 300
        kept = (await until(session, events, "conversation.item.retrieved"))["item"]
        assert kept["id"] == story.item_id
        assert len(words(kept["content"][0]["transcript"])) < 6
        audio = [event.audio for event in events if event.type == "audio"]
        assert story.response_id not in {each.response_id for each in audio}


async def test_a_function_is_called() -> None:
    agent = RealtimeAgent(name="Agent", tools=[get_weather])
    more = {"modalities": ["text"], "tool_choice": "required", "max_output_tokens": 60}
    session = await begin(agent, RealtimePlaybackTracker(), **more)
    events: list[Any] = []
    async with session:
        await session.send_message("What is the weather in Paris?")
        assert (await until(session, events, "tool_end")).output == "Rain"
        # The SDK sends it, and has the model answer.
        await until(session, events, "response.created")
        assert (await until(session, events, "response.done"))["response"]["output"]
    assert all(isinstance(city, str) for city in called)
