"""A realtime conversation through OpenAI's own client. Turns are ended by hand here."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.requests import SpeechRequest, TextRequest, TranscriptionRequest
from server.app import Application
from server.realtime import conversation
from server.routes import realtime
from tests.server.fake import MODEL_BYTES, listening
from tests.server.realtime.conftest import RATE, Talk, Voices, talking

BY_HAND: dict[str, Any] = {"input": {"turn_detection": None, "transcription": {}}}


def tone(seconds: float, level: int = 8_000) -> str:
    time = np.arange(int(seconds * RATE)) / RATE
    samples = (np.sin(2 * np.pi * 220 * time) * level).astype("<i2")
    return base64.b64encode(samples.tobytes()).decode()


async def ask(talk: Talk, **response: Any) -> Any:
    await talk.connection.response.create(response=response or None)  # type: ignore[arg-type]
    return await talk.until("response.done", "error")


async def test_text_is_answered_by_speech(talk: Talk, voices: Voices) -> None:
    await talk.update(type="realtime", instructions="Be brief.", audio={"output": {"voice": "v"}})
    await talk.say("Who are you?")
    done = await ask(talk)
    assert done.response.status == "completed"
    assert done.response.usage.total_tokens == 11
    text = "".join(voices.words)
    assert done.response.output[0].content[0].transcript == text
    deltas = talk.of("response.output_audio.delta")
    audio = b"".join(base64.b64decode(delta.delta) for delta in deltas)
    assert len(audio) / 2 / RATE == pytest.approx(0.1 * len(text.split()), abs=0.02)
    chat = next(each for each in voices.requests if isinstance(each, TextRequest))
    assert chat.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
    ]
    # Clause by clause, in order: the first is short.
    spoken = [each.text for each in voices.requests if isinstance(each, SpeechRequest)]
    assert spoken == ["Well, this is what I say.", "And more."]
    assert {each.voice for each in voices.requests if isinstance(each, SpeechRequest)} == {"v"}


async def test_the_events_of_a_response_are_openais(talk: Talk) -> None:
    await talk.say("Hi")
    await ask(talk)
    kinds = list(dict.fromkeys(kind for kind in talk.kinds() if kind.startswith("response.")))
    assert kinds[:4] == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
    ]
    assert kinds[-5:] == [
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
    ]
    parts = [*talk.of("response.content_part.added"), *talk.of("response.content_part.done")]
    assert [each.part.type for each in parts] == ["audio", "audio"]


async def test_an_answer_in_text_is_not_spoken(talk: Talk, voices: Voices) -> None:
    updated = await talk.update(type="realtime", output_modalities=["text"])
    assert updated.session.output_modalities == ["text"]
    await talk.say("Hi")
    done = await ask(talk)
    assert done.response.output[0].content[0].text == "".join(voices.words)
    assert not [each for each in voices.requests if isinstance(each, SpeechRequest)]


async def test_what_was_said_is_transcribed_and_answered(talk: Talk, voices: Voices) -> None:
    await talk.update(type="realtime", audio=BY_HAND)
    await talk.connection.input_audio_buffer.append(audio=tone(0.5))
    await talk.connection.input_audio_buffer.commit()
    done = await ask(talk)
    assert done.response.status == "completed"
    completed = talk.of("conversation.item.input_audio_transcription.completed")
    assert [each.transcript for each in completed] == [voices.heard]
    chat = next(each for each in voices.requests if isinstance(each, TextRequest))
    assert chat.body["messages"] == [{"role": "user", "content": voices.heard}]
    assert set(done.response.model_extra["roundhouse"]) == {
        "transcript_ms",
        "first_token_ms",
        "first_audio_ms",
    }


async def test_speech_that_cannot_be_heard_is_told(talk: Talk, voices: Voices) -> None:
    voices.deaf = True
    await talk.update(type="realtime", audio=BY_HAND)
    await talk.connection.input_audio_buffer.append(audio=tone(0.5))
    await talk.connection.input_audio_buffer.commit()
    failed = await talk.until("conversation.item.input_audio_transcription.failed")
    assert "deaf" in failed.error.message
    voices.deaf = False
    await talk.say("Hi")
    assert (await ask(talk)).response.status == "completed"


@pytest.mark.parametrize("format", ["audio/pcmu", "audio/pcma"])
async def test_the_audio_of_telephones(talk: Talk, voices: Voices, format: str) -> None:
    telephone = {"format": {"type": format}}
    await talk.update(
        type="realtime", audio={"input": BY_HAND["input"] | telephone, "output": telephone}
    )
    quiet = b"\xff" if format == "audio/pcmu" else b"\xd5"
    await talk.connection.input_audio_buffer.append(audio=base64.b64encode(quiet * 4000).decode())
    await talk.connection.input_audio_buffer.commit()
    await ask(talk)
    heard = next(each for each in voices.requests if isinstance(each, TranscriptionRequest))
    assert (len(heard.audio) - 44) / 32_000 == pytest.approx(0.5, abs=0.02)
    audio = b"".join(base64.b64decode(d.delta) for d in talk.of("response.output_audio.delta"))
    assert len(audio) / 8_000 == pytest.approx(0.8, abs=0.02)


async def test_a_function_is_called_and_its_output_is_read(talk: Talk, voices: Voices) -> None:
    voices.calls = [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": ""}},
        {"function": {"arguments": '{"zone": "UTC"}'}},
    ]
    voices.calls[1]["index"] = 0
    tool = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
    await talk.update(type="realtime", tools=[tool])
    await talk.say("What time is it?")
    done = await ask(talk)
    call = done.response.output[0]
    assert (call.type, call.name, call.arguments) == ("function_call", "clock", '{"zone": "UTC"}')
    chat = next(each for each in voices.requests if isinstance(each, TextRequest))
    function = {"name": "clock", "parameters": {"type": "object"}}
    assert chat.body["tools"] == [{"type": "function", "function": function}]
    voices.calls = []
    output = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
    await talk.connection.conversation.item.create(item=output)  # type: ignore[arg-type]
    await ask(talk)
    chats = [each for each in voices.requests if isinstance(each, TextRequest)]
    assert chats[-1].body["messages"][-2:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "clock", "arguments": '{"zone": "UTC"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]


async def test_a_response_that_is_cancelled_at_once_has_a_begin_and_an_end(talk: Talk) -> None:
    await talk.say("Hi")
    for _ in range(2):
        await talk.connection.response.create()
        await talk.connection.response.cancel()
    await talk.connection.response.create(response={"output_modalities": ["text"]})
    for status in ("cancelled", "cancelled", "completed"):
        await talk.until("response.created")
        assert (await talk.until("response.done")).response.status == status


async def test_what_no_tokenizer_and_no_parser_takes_ends_nothing(talk: Talk) -> None:
    content = '[{"type": "input_text", "text": "\\ud800"}]'
    item = f'{{"type": "message", "role": "user", "content": {content}}}'
    await talk.connection.send_raw(f'{{"type": "conversation.item.create", "item": {item}}}')
    assert "valid JSON" in (await talk.until("error")).error.message
    deep = '{"a":' * 300 + "1" + "}" * 300
    tool = f'{{"type": "function", "name": "f", "parameters": {deep}}}'
    session = f'{{"type": "realtime", "tools": [{tool}]}}'
    await talk.connection.send_raw(f'{{"type": "session.update", "session": {session}}}')
    assert "valid JSON" in (await talk.until("error")).error.message
    await talk.say("Hi")
    assert (await ask(talk)).response.status == "completed"


async def test_a_conversation_has_a_size(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MAX_BYTES", 2_000)
    await talk.say("x" * 1_500)
    item = {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "x" * 500}],
    }
    await talk.connection.conversation.item.create(item=item)  # type: ignore[arg-type]
    assert (await talk.until("error")).error.param == "item"


async def test_a_call_that_was_whole_when_the_tokens_ran_out(talk: Talk, voices: Voices) -> None:
    voices.finish = "length"
    whole, cut = '{"zone": "UTC"}', '{"zone'
    voices.calls = [
        {"id": each, "type": "function", "function": {"name": "clock", "arguments": arguments}}
        for each, arguments in (("c1", whole), ("c2", cut))
    ]
    await talk.say("What time is it?")
    done = await ask(talk)
    assert done.response.status_details.reason == "max_output_tokens"
    assert [each.status for each in done.response.output] == ["completed", "incomplete"]


async def test_cancelling_ends_generation_and_speech(talk: Talk, voices: Voices) -> None:
    voices.may_go_on.clear()
    await talk.say("Hi")
    await talk.connection.response.create()
    await talk.until("response.output_audio_transcript.delta")
    await talk.connection.response.cancel()
    done = await talk.until("response.done")
    assert (done.response.status, done.response.status_details.reason) == (
        "cancelled",
        "client_cancelled",
    )
    assert "TextRequest" in voices.ended
    voices.may_go_on.set()
    assert (await ask(talk)).response.status == "completed"


async def test_one_response_at_a_time_but_others_beside_it(talk: Talk, voices: Voices) -> None:
    voices.may_go_on.clear()
    await talk.say("Hi")
    await talk.connection.response.create()
    await talk.until("response.output_audio_transcript.delta")
    assert "under way" in (await ask(talk)).error.message
    await talk.connection.response.create(
        response={"conversation": "none", "output_modalities": ["text"], "input": []}
    )
    created = await talk.until("response.created")
    voices.may_go_on.set()
    done = [await talk.until("response.done") for _ in range(2)]
    beside = next(each for each in done if each.response.id == created.response.id)
    assert beside.response.conversation_id is None
    assert beside.response.status == "completed"


async def test_a_truncated_answer_keeps_what_was_heard(talk: Talk, voices: Voices) -> None:
    await talk.say("Hi")
    done = await ask(talk)
    item_id = done.response.output[0].id
    # The first clause has six words of 100 ms.
    await talk.connection.conversation.item.truncate(
        item_id=item_id, content_index=0, audio_end_ms=300
    )
    await talk.until("conversation.item.truncated")
    await talk.connection.conversation.item.retrieve(item_id=item_id)
    retrieved = await talk.until("conversation.item.retrieved")
    assert retrieved.item.content[0].transcript == "Well, this is"
    await talk.connection.conversation.item.delete(item_id=item_id)
    await talk.until("conversation.item.deleted")
    await talk.connection.conversation.item.retrieve(item_id=item_id)
    assert (await talk.until("error")).error.param == "item_id"


async def test_what_is_truncated_before_the_end_stays_away(talk: Talk, voices: Voices) -> None:
    voices.words = ["Well, this is what I say. It is the second one. And then "]
    voices.may_go_on.clear()
    await talk.say("Hi")
    await talk.connection.response.create()
    heard_s = 0.0
    while heard_s < 0.61:  # the first clause is whole then
        delta = await talk.until("response.output_audio.delta")
        heard_s += len(base64.b64decode(delta.delta)) / 2 / RATE
    await talk.connection.conversation.item.truncate(
        item_id=delta.item_id, content_index=0, audio_end_ms=300
    )
    await talk.until("conversation.item.truncated")
    await talk.connection.response.cancel()
    done = await talk.until("response.done")
    assert done.response.status == "cancelled"
    assert done.response.output[0].content[0].transcript == "Well, this is"


async def test_an_interrupted_clause_keeps_the_words_that_were_sent(
    talk: Talk, voices: Voices
) -> None:
    voices.may_speak_on.clear()
    await talk.say("Hi")
    await talk.connection.response.create()
    item_id = (await talk.until("response.output_audio.delta")).item_id
    # A client that plays it may say first what was heard.
    await talk.connection.conversation.item.truncate(
        item_id=item_id, content_index=0, audio_end_ms=300
    )
    await talk.until("conversation.item.truncated")
    await talk.connection.response.cancel()
    done = await talk.until("response.done")
    assert done.response.output[0].content[0].transcript == "Well, this is"


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({"type": "nonsense"}, "type"),
        ({"type": "session.update"}, "session"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"x": 1}}}},
            "session.audio.input.x",
        ),
        (
            {"type": "session.update", "session": {"audio": {"input": {"noise_reduction": {}}}}},
            "session.audio.input.noise_reduction",
        ),
        ({"type": "session.update", "session": {"model": "nobody"}}, "model"),
        ({"type": "input_audio_buffer.append", "audio": "*"}, "audio"),
        ({"type": "input_audio_buffer.append"}, "audio"),
        ({"type": "conversation.item.create", "item": {"type": "message"}}, "item.role"),
        ({"type": "conversation.item.delete", "item_id": {}}, "item_id"),
        ({"type": "response.create", "response": {"modalities": []}}, "response.modalities"),
        ({"type": "response.cancel", "response_id": "no"}, "response_id"),
        ({"type": "response.create", "response": {"tool_choice": "required"}}, "tool_choice"),
        (
            {
                "type": "response.create",
                "response": {"tool_choice": {"type": "function", "name": "no"}},
            },
            "tool_choice",
        ),
        ({"type": "session.update", "session": {"model": "ears"}}, "session.model"),
        (
            {"type": "session.update", "session": {"audio": {"output": {"model": "ears"}}}},
            "session.audio.output.model",
        ),
        (
            {
                "type": "session.update",
                "session": {"audio": {"input": {"transcription": {"model": "voice"}}}},
            },
            "session.audio.input.transcription.model",
        ),
        (
            {
                "type": "session.update",
                "session": {"audio": {"output": {"format": {"type": "audio/pcmu", "rate": 24000}}}},
            },
            "session.audio.output.format",
        ),
    ],
)
async def test_a_wrong_event_is_answered_and_nothing_else_changes(
    talk: Talk, event: dict[str, Any], param: str
) -> None:
    await talk.connection.send({"event_id": "mine", **event})  # type: ignore[arg-type]
    error = (await talk.until("error")).error
    assert (error.param, error.event_id) == (param, "mine")
    await talk.say("Hi")
    assert (await ask(talk)).response.status == "completed"


async def test_the_models_are_kept_for_the_session(url: str, engine: Engine) -> None:
    async with talking(url):
        assert {model.id for model in engine.status().models if model.holds} == {
            "chat",
            "ears",
            "voice",
        }
    async with talking(url, intent="transcription"):
        assert {model.id for model in engine.status().models if model.holds} == {"ears"}


async def test_a_session_without_room_is_refused_before_it_is_accepted(url: str) -> None:
    for model, status in (("nobody", 404), ("huge", 507)):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"{url.replace('http', 'ws')}/v1/realtime?model={model}"):
                pass
        assert refused.value.response.status_code == status
        assert b'"error"' in refused.value.response.body


@pytest.mark.parametrize("fails", [False, True])
async def test_models_that_load_for_long_keep_no_client_from_connecting(
    app: Application, voices: Voices, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(realtime, "HANDSHAKE_S", 0.01)
    voices.may_start.clear()
    voices.start_error = RuntimeFailed("the library is torn") if fails else None
    async with asyncio.timeout(20), listening(app) as url:
        address = f"{url.replace('http', 'ws')}/v1/realtime?model=chat"
        async with connect(address) as socket:
            voices.may_start.set()
            if not fails:
                assert json.loads(await socket.recv())["type"] == "session.created"
                return
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    assert "the library is torn" in closed.value.rcvd.reason


async def test_models_without_room_leave_the_session_as_it_was(talk: Talk, engine: Engine) -> None:
    error = await talk.update(type="realtime", audio={"output": {"model": "big"}})
    assert error.error.code == "insufficient_capacity"
    assert engine.model_status("voice").holds == 1
    await talk.say("Hi")
    assert (await ask(talk)).response.status == "completed"


async def test_what_is_no_websocket_is_told_so(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/v1/realtime")
    assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{url.replace('http', 'ws')}/v1/models"):
            pass
    assert refused.value.response.status_code == 405


async def let_go(engine: Engine) -> None:
    """Wait until no session holds a model and no request runs."""
    async with asyncio.timeout(5):
        while any(each.holds or each.leases for each in engine.status().models):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_client_that_is_cut_off_leaves_nothing_and_may_come_again(
    url: str, engine: Engine, voices: Voices
) -> None:
    voices.may_go_on.clear()
    granted_bytes = engine.status().ledger.granted_bytes
    async with asyncio.timeout(20), talking(url) as talk:
        assert engine.model_status("chat").holds == 1
        await talk.say("Hi")
        await talk.connection.response.create()
        await talk.until("response.output_audio_transcript.delta")
        talk.connection._connection.transport.abort()
        await let_go(engine)
    assert "TextRequest" in voices.ended
    assert engine.status().ledger.granted_bytes == granted_bytes + 3 * MODEL_BYTES
    voices.may_go_on.set()
    async with talking(url) as talk:
        await talk.say("Hi")
        assert (await ask(talk)).response.status == "completed"


async def test_audio_without_end_is_bounded(talk: Talk) -> None:
    """Ten minutes are kept. More is refused, and the session goes on."""
    telephone = {"input": {**BY_HAND["input"], "format": {"type": "audio/pcmu"}}}
    await talk.update(type="realtime", audio=telephone)
    for _ in range(11):  # of 58 seconds
        audio = base64.b64encode(bytes(58 * 8_000)).decode()
        await talk.connection.input_audio_buffer.append(audio=audio)
    error = (await talk.until("error")).error
    assert (error.param, error.type) == ("audio", "invalid_request_error")
    await talk.connection.input_audio_buffer.clear()
    await talk.until("input_audio_buffer.cleared")
    await talk.connection.input_audio_buffer.append(audio=tone(0.5))
    await talk.connection.input_audio_buffer.commit()
    assert (await ask(talk)).response.status == "completed"


def ten_megabytes() -> str:
    """Two and a half minutes of audio."""
    audio = base64.b64encode(bytes(7_500_000)).decode()
    return json.dumps({"type": "input_audio_buffer.append", "audio": audio})


async def test_a_message_of_ten_megabytes_is_taken(app: Application) -> None:
    async with listening(app, max_message=16 * 2**20) as url, talking(url) as talk:
        await talk.update(type="realtime", audio=BY_HAND)
        await talk.connection._connection.send(ten_megabytes())
        await talk.connection.input_audio_buffer.commit()
        await talk.until("conversation.item.done")


async def test_a_message_above_the_limit_ends_the_connection(url: str, engine: Engine) -> None:
    async with talking(url) as talk:
        with pytest.raises(ConnectionClosed) as closed:
            await talk.connection._connection.send(ten_megabytes())
            await talk.until("nothing")
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    await let_go(engine)
