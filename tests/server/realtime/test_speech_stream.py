"""Text streamed in, audio out, as a client of vLLM-omni's endpoint does it."""

from __future__ import annotations

import asyncio
import io
import json
import wave
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Event
from engine.requests import SpeechRequest
from server.app import Application
from server.keys.record import Key, digest_of
from server.realtime import speech_stream
from tests.server.keys.conftest import eventually
from tests.server.realtime.conftest import RATE, Voices

PATH = "/v1/audio/speech/stream"
WAIT_S = 20.0


class Speaker:
    """A connection, and what came for each sentence."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.frames: list[bytes] = []
        """Of the sentence under way, or the last one."""

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def until(self, *kinds: str) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self.socket.recv()
                if isinstance(message, bytes):
                    self.frames.append(message)
                    continue
                event: dict[str, Any] = json.loads(message)
                if event["type"] == "audio.start":
                    self.frames = []
                if event["type"] in kinds:
                    return event

    async def close_code(self) -> int | None:
        async with asyncio.timeout(WAIT_S):
            await self.socket.wait_closed()
        return self.socket.close_code


@asynccontextmanager
async def speaking(url: str, path: str = PATH, **config: Any) -> AsyncIterator[Speaker]:
    address = url.replace("http", "ws") + path
    async with connect(address, proxy=None, open_timeout=WAIT_S) as socket:
        speaker = Speaker(socket)
        if config:
            await speaker.send("session.config", **config)
        yield speaker


def spoken(voices: Voices) -> list[str]:
    return [each.text for each in voices.requests if isinstance(each, SpeechRequest)]


async def nobody_holds(engine: Engine) -> None:
    await eventually(lambda: not engine.model_status("voice").holds)


async def test_the_first_clause_is_spoken_while_the_text_is_written(
    url: str, engine: Engine, voices: Voices
) -> None:
    config: dict[str, Any] = {
        "response_format": "pcm",
        "voice": "v",
        "speed": 1.5,
        "language": "en",
    }
    async with speaking(url, **config) as speaker:
        for piece in ("Well, this", " is what I say, ", "and"):
            await speaker.send("input.text", text=piece)
        start = await speaker.until("audio.start")
        assert start == {
            "type": "audio.start",
            "utterance_index": 0,
            "sentence_index": 0,
            "sentence_text": "Well, this is what I say,",
            "format": "pcm",
            "sample_rate": RATE,
            "channels": 1,
        }
        done = await speaker.until("audio.done")
        assert (done["error"], done["total_bytes"]) == (False, 6 * RATE // 10 * 2)
        assert [len(frame) for frame in speaker.frames] == [done["total_bytes"]]
        assert engine.model_status("voice").holds == 1
        await speaker.send("input.text", text=" more. ...")
        await speaker.send("input.done")
        end = await speaker.until("session.done")
        assert (end["utterance_index"], end["total_sentences"]) == (0, 2)
        assert spoken(voices) == ["Well, this is what I say,", "and more."]
        request = voices.requests[0]
        assert (request.model, request.voice, request.speed) == ("voice", "v", 1.5)
        assert request.language == "en"
    await nobody_holds(engine)


async def test_utterances_follow_one_another_until_the_client_closes(
    url: str, engine: Engine, voices: Voices
) -> None:
    # What vLLM-omni's own demo sends.
    config: dict[str, Any] = {
        "voice": "Vivian",
        "task_type": "CustomVoice",
        "response_format": "wav",
        "speed": 1.0,
        "split_granularity": "sentence",
    }
    async with speaking(url, **config) as speaker:
        for index in range(2):
            for piece in ("One and two, ", "three. Four five."):
                await speaker.send("input.text", text=piece)
            await speaker.send("input.done")
            done = await speaker.until("audio.done")
            assert done["utterance_index"] == index
            [frame] = speaker.frames
            with wave.open(io.BytesIO(frame)) as file:
                assert file.getframerate() == RATE
                assert len(file.readframes(RATE)) == 4 * RATE // 10 * 2
            assert (await speaker.until("session.done"))["utterance_index"] == index
        await speaker.send("session.config", response_format="pcm", split_granularity="none")
        await speaker.send("input.text", text="One and two, three. Four five.")
        await speaker.send("input.done")
        await speaker.send("session.close")
        assert (await speaker.until("session.done"))["total_sentences"] == 1
        assert await speaker.close_code() == 1000
    assert spoken(voices)[-3:] == [
        "One and two, three.",
        "Four five.",
        "One and two, three. Four five.",
    ]
    await nobody_holds(engine)


async def test_what_is_left_is_spoken_when_the_client_closes(url: str, voices: Voices) -> None:
    async with speaking(url, model="voice") as speaker:
        await speaker.send("input.text", text="Hello there, my friend. How are you")
        await speaker.send("session.close")
        assert (await speaker.until("session.done"))["total_sentences"] == len(spoken(voices))
        assert await speaker.close_code() == 1000
    assert spoken(voices)[-1] == "How are you"


async def test_audio_may_come_while_it_is_made(url: str, voices: Voices) -> None:
    go_on = asyncio.Event()
    once = voices.react

    async def twice(request: Any) -> AsyncGenerator[Event, None]:
        async for event in once(request):
            yield event
        await go_on.wait()
        async for event in once(request):
            yield event

    voices.answer = twice
    config: dict[str, Any] = {"response_format": "pcm", "stream_audio": True}
    async with speaking(url, **config) as speaker:
        await speaker.send("input.text", text="One two three.")
        await speaker.send("input.done")
        await speaker.until("audio.start")
        assert isinstance(await speaker.socket.recv(), bytes)
        go_on.set()
        done = await speaker.until("audio.done")
        assert done["total_bytes"] == 2 * 3 * RATE // 10 * 2


async def test_a_clause_that_fails_does_not_end_the_session(url: str, voices: Voices) -> None:
    once = voices.react

    async def moody(request: Any) -> AsyncGenerator[Event, None]:
        if "Bad" in request.text:
            raise RuntimeFailed("I cannot say that.")
        async for event in once(request):
            yield event

    voices.answer = moody
    async with speaking(url, response_format="pcm") as speaker:
        await speaker.send("input.text", text="Bad word. Good word.")
        await speaker.send("input.done")
        error = await speaker.until("error")
        assert (error["message"], error["sentence_index"]) == ("I cannot say that.", 0)
        done = [await speaker.until("audio.done") for _ in range(2)]
        assert [each["error"] for each in done] == [True, False]
        assert (await speaker.until("session.done"))["total_sentences"] == 2


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"type": "nonsense"}, "type"),
        ({"type": "session.config", "speed": 9}, "speed"),
        ({"type": "session.config", "ref_audio": "x"}, "ref_audio"),
        ({"type": "session.config", "model": "nobody"}, "model"),
        ({"type": "input.text", "text": 5}, "text"),
        ({"type": "input.text", "text": "x" * 140_000}, "text"),
        ({"type": "input.text"}, "text"),
    ],
)
async def test_what_is_wrong_is_named_and_ends_nothing_once_it_is_configured(
    url: str, message: dict[str, Any], param: str
) -> None:
    async with speaking(url, response_format="pcm") as speaker:
        await speaker.socket.send(json.dumps(message))
        assert (await speaker.until("error"))["param"] == param
        await speaker.send("input.done")
        await speaker.until("session.done")


async def test_a_session_without_a_configuration_ends(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config, code, close in (
        ({"model": "nobody"}, "model_not_found", 1008),
        ({"model": "big"}, "insufficient_capacity", 1008),
        ({"speed": 9}, "invalid_request", 1008),
    ):
        async with speaking(url, **config) as speaker:
            assert (await speaker.until("error"))["code"] == code
            assert await speaker.close_code() == close
    async with speaking(url) as speaker:
        await speaker.send("input.text", text="hello")
        assert (await speaker.until("error"))["param"] == "type"
        assert await speaker.close_code() == 1008
    monkeypatch.setattr(speech_stream, "CONFIG_S", 0.02)
    async with speaking(url) as speaker:
        assert "No message" in (await speaker.until("error"))["message"]
        assert await speaker.close_code() == 1008
    monkeypatch.setattr(speech_stream, "CONFIG_S", WAIT_S)
    monkeypatch.setattr(speech_stream, "IDLE_S", 0.02)
    async with speaking(url, response_format="pcm") as speaker:
        assert "No message" in (await speaker.until("error"))["message"]
        assert await speaker.close_code() == 1008
    assert engine.model_status("voice").holds == 0
    with pytest.raises(InvalidStatus) as refused:
        async with speaking(url, f"{PATH}?model=voice"):
            pass
    assert refused.value.response.status_code == 400


async def test_what_changes_within_an_utterance_is_refused(url: str) -> None:
    async with speaking(url, response_format="pcm", split_granularity="none") as speaker:
        await speaker.send("input.text", text="Hello ")
        await speaker.send("session.config", response_format="wav")
        assert "under way" in (await speaker.until("error"))["message"]
        await speaker.send("input.text", text="x" * speech_stream.MAX_UNCUT_CHARS)
        assert (await speaker.until("error"))["param"] == "text"
        await speaker.send("input.done")
        assert (await speaker.until("audio.start"))["sentence_text"] == "Hello"


async def test_a_client_that_leaves_cancels_what_is_spoken(
    url: str, engine: Engine, voices: Voices
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def endless(_request: Any) -> AsyncGenerator[Event, None]:
        began.set()
        try:
            await asyncio.Event().wait()
            yield None  # type: ignore[misc]
        finally:
            ended.set()

    voices.answer = endless
    async with asyncio.timeout(WAIT_S), speaking(url, response_format="pcm") as speaker:
        await speaker.send("input.text", text="All of this. And more. And more.")
        await began.wait()
        speaker.socket.transport.abort()
        await ended.wait()
    await nobody_holds(engine)
    assert len(voices.requests) == 1


async def test_text_is_taken_no_faster_than_it_is_spoken(
    url: str, voices: Voices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech_stream, "WAITING_CLAUSES", 4)
    began, go_on = asyncio.Event(), asyncio.Event()
    once = voices.react

    async def slow(request: Any) -> AsyncGenerator[Event, None]:
        began.set()
        await go_on.wait()
        async for event in once(request):
            yield event

    voices.answer = slow
    async with speaking(url, response_format="pcm") as speaker:
        await speaker.send("input.text", text="This is to be said. " * 10)
        await speaker.send("nonsense")
        async with asyncio.timeout(WAIT_S):
            await began.wait()
            for _ in range(20):  # the server had its time to take more
                await (await speaker.socket.ping())
        go_on.set()
        assert (await speaker.until("audio.start", "error"))["type"] == "audio.start"
        await speaker.until("error")


async def test_it_belongs_to_the_family_of_speech(url: str, app: Application) -> None:
    for families, status in (("speech",), 101), (("chat",), 403):
        digest = digest_of("sk-speaker")
        app.keyring.replace([Key(name="s", digest=digest, endpoints=families, created_at=0)])
        headers = {"authorization": "Bearer sk-speaker"}
        address = url.replace("http", "ws") + PATH
        if status == 101:
            async with connect(address, proxy=None, additional_headers=headers):
                continue
        with pytest.raises(InvalidStatus) as refused:
            async with connect(address, proxy=None, additional_headers=headers):
                pass
        assert refused.value.response.status_code == status
