"""What the user of a realtime session says: cut into turns, and transcribed while it is spoken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import InvalidRequest
from engine.events import Segment
from engine.media.live_transcript import LiveTranscript, split_words
from engine.media.turns import (
    IdleTimeout,
    SpeechPaused,
    SpeechResumed,
    SpeechStarted,
    SpeechStopped,
)
from engine.requests import Request, TranscriptionRequest
from server.errors import Failure
from server.realtime.conversation import Conversation, Item, new_id
from server.realtime.input_audio import InputBuffer
from server.realtime.response import Emit, Marks
from server.schemas.realtime import InputAudio

if TYPE_CHECKING:
    from engine.requests import SchedulingOptions

LEAST_COMMIT_MS = 100
"""OpenAI's least audio of a commit."""
AT_ONCE_BYTES = 16 * 2**10
"""A third of a second, in which the detector takes less time than a thread needs to begin."""
PARTIAL_S = 1.5
"""Seconds between transcripts of speech that goes on. A slow machine takes longer."""

Start = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]
"""Starts a task that ends with the session at the latest."""


class TurnListener(Protocol):
    """The session, as its turns see it."""

    def on_speech_started(self) -> None:
        """Somebody begins to speak. The client does not know it yet."""

    async def on_turn(self, item: Item) -> None:
        """A turn is an item now. Its transcript is under way."""

    def on_turn_end(self) -> None:
        """Turn detection says that it is time for a response."""


class SpokenTurns:
    """Audio in; items with transcripts out, with the events that tell the client of them.

    `configure` comes before the first audio. One task at a time may call the methods that wait.
    """

    def __init__(
        self,
        open_session: Callable[[Request], Awaitable[Any]],
        emit: Emit,
        start: Start,
        *,
        listener: TurnListener,
        conversation: Conversation,
        new_request_id: Callable[[], str],
        scheduling: SchedulingOptions,
    ) -> None:
        """The transcripts are requests with `scheduling`. Nothing of `conversation` is changed."""
        self._open = open_session
        self._emit = emit
        self._start = start
        self._listener = listener
        self._conversation = conversation
        self._new_request_id = new_request_id
        self._scheduling = scheduling
        self._config = InputAudio(turn_detection=None)
        self._model = ""
        self._buffer = InputBuffer(self._config)
        self._item_id = new_id("item")
        """Of the turn under way."""
        self._live = LiveTranscript()
        self._partial: asyncio.Task[None] | None = None
        self._partial_s = PARTIAL_S
        self._partial_at = 0.0
        self._guess: asyncio.Task[str] | None = None
        """The transcript of what was said up to a pause, which may be the end of the turn."""
        self._marks = Marks()

    def configure(self, config: InputAudio, model: str) -> None:
        """Go on with other options. `model` transcribes. The audio so far stays.

        `VoiceActivity.load` comes before turn detection.

        Raises:
            InvalidRequest: the format changes while there is audio. Nothing is changed then.

        """
        self._buffer.configure(config)
        self._config, self._model = config, model

    async def append(self, data: bytes) -> None:
        """Take audio, and do what the turns in it ask for.

        Raises:
            InvalidRequest: there is too much of it.

        """
        if len(data) > AT_ONCE_BYTES:
            turns = await asyncio.to_thread(self._buffer.append, data)
        else:
            turns = self._buffer.append(data)
        for turn in turns:
            if isinstance(turn, SpeechStarted):
                await self._on_speech_started(turn)
            elif isinstance(turn, SpeechPaused):
                self._drop_guess()
                self._guess = self._start(self._hear_pause(self._buffer.peek(), turn.at_ms))
            elif isinstance(turn, SpeechResumed):
                self._drop_guess()
            elif isinstance(turn, SpeechStopped):
                await self._on_speech_stopped(turn)
            elif isinstance(turn, IdleTimeout):
                await self._on_idle(turn)
        if self._buffer.speaking:
            self._transcribe_more()

    async def commit(self) -> None:
        """End the turn by order of the client.

        Raises:
            InvalidRequest: there is too little audio.

        """
        if self._buffer.kept_ms < LEAST_COMMIT_MS:
            raise InvalidRequest(
                f"The buffer holds {self._buffer.kept_ms:.0f} ms of audio. A commit needs"
                f" {LEAST_COMMIT_MS} ms."
            )
        self._drop_guess()
        self._marks = Marks(speech_end_s=time.perf_counter())
        await self._commit()

    def clear(self) -> None:
        """Drop the audio of the turn under way."""
        self._buffer.clear()
        self._drop_guess()
        self._end_live()

    def take_marks(self) -> Marks:
        """The times of the last turn, for the response to it."""
        marks, self._marks = self._marks, Marks()
        return marks

    def wait_for_speech(self, after_ms: int) -> None:
        """Begin the idle timeout once `after_ms` more of audio have come."""
        self._buffer.wait_for_speech(after_ms)

    def cancel_wait(self) -> None:
        """End the idle timeout."""
        self._buffer.cancel_wait()

    async def _on_speech_started(self, turn: SpeechStarted) -> None:
        self._marks = Marks()
        self._listener.on_speech_started()
        await self._emit(
            {
                "type": "input_audio_buffer.speech_started",
                "audio_start_ms": turn.at_ms,
                "item_id": self._item_id,
            }
        )

    async def _on_speech_stopped(self, turn: SpeechStopped) -> None:
        silence_s = (turn.at_ms - turn.speech_end_ms) / 1e3
        self._marks = Marks(speech_end_s=time.perf_counter() - silence_s)
        await self._emit(
            {
                "type": "input_audio_buffer.speech_stopped",
                "audio_end_ms": turn.at_ms,
                "item_id": self._item_id,
            }
        )
        await self._commit()
        self._listener.on_turn_end()

    async def _on_idle(self, turn: IdleTimeout) -> None:
        await self._emit(
            {
                "type": "input_audio_buffer.timeout_triggered",
                "audio_start_ms": turn.start_ms,
                "audio_end_ms": turn.at_ms,
                "item_id": self._item_id,
            }
        )
        self._listener.on_turn_end()

    async def _commit(self) -> None:
        """Make an item of the audio, and transcribe it."""
        wav = await asyncio.to_thread(self._buffer.commit)
        item_id, self._item_id = self._item_id, new_id("item")
        live = self._live
        guess, self._guess = self._guess, None
        self._end_live()
        document = {
            "id": item_id,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": None}],
        }
        item = Item(document)
        await self._emit(
            {
                "type": "input_audio_buffer.committed",
                "previous_item_id": self._conversation.last_id,
                "item_id": item_id,
            }
        )
        item.transcript = self._start(self._hear(item, wav, guess, live, self._marks))
        await self._listener.on_turn(item)

    # Transcripts

    async def _hear(
        self,
        item: Item,
        wav: bytes,
        guess: asyncio.Task[str] | None,
        live: LiveTranscript,
        marks: Marks,
    ) -> str:
        """Transcribe an item, tell the client if it wants to know, and return the text."""
        place = {"item_id": item.id, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"
        tells = self._config.transcription is not None
        try:
            # What was said up to the pause that ended the turn may be known already.
            text = await (guess if guess is not None else self._transcribe(wav))
        except Exception as error:
            item.document["content"][0]["transcript"] = ""
            failure = Failure.of(error)
            await self._emit(
                {
                    "type": f"{kind}.failed",
                    **place,
                    "error": {
                        "type": failure.type,
                        "code": failure.code,
                        "message": failure.message,
                        "param": failure.param,
                    },
                }
            )
            raise
        marks.transcript_s = time.perf_counter()
        item.document["content"][0]["transcript"] = text
        if tells:
            rest = live.final(text)
            if rest:
                await self._emit({"type": f"{kind}.delta", **place, "delta": rest})
            usage = {"type": "duration", "seconds": round((len(wav) - 44) / 32_000, 2)}
            await self._emit(
                {"type": f"{kind}.completed", **place, "transcript": text, "usage": usage}
            )
        return text

    async def _hear_pause(self, wav: bytes, paused_at_ms: int) -> str:
        text = await self._transcribe(wav)
        self._buffer.heard(text, paused_at_ms)
        return text

    async def _transcribe(self, wav: bytes) -> str:
        transcription = self._config.transcription
        request = TranscriptionRequest(
            model=self._model,
            audio=wav,
            request_id=self._new_request_id(),
            language=None if transcription is None else transcription.language,
            prompt=None if transcription is None else transcription.prompt,
            scheduling=self._scheduling,
        )
        opened = await self._open(request)
        texts = []
        async with aclosing(opened.events()) as events:
            async for event in events:
                if isinstance(event, Segment):
                    texts.append(event.text)
        return "".join(texts).strip()

    def _transcribe_more(self) -> None:
        """Transcribe what is said so far, if the client wants to know and it is time."""
        now = time.perf_counter()
        if self._config.transcription is None or self._guess is not None:
            return
        if self._partial is not None and not self._partial.done():
            return
        if now - self._partial_at < self._partial_s or self._buffer.kept_ms < PARTIAL_S * 1e3:
            return
        self._partial_at = now
        self._partial = self._start(self._hear_partly(self._item_id, self._live))

    async def _hear_partly(self, item_id: str, live: LiveTranscript) -> None:
        began_s = time.perf_counter()
        text = await self._transcribe(self._buffer.peek())
        # No more than a third of the time goes into transcripts that are made again.
        self._partial_s = max(PARTIAL_S, 3 * (time.perf_counter() - began_s))
        delta = live.hypothesis(split_words(text))
        if delta and item_id == self._item_id:
            await self._emit(
                {
                    "type": "conversation.item.input_audio_transcription.delta",
                    "item_id": item_id,
                    "content_index": 0,
                    "delta": delta,
                }
            )

    def _end_live(self) -> None:
        if self._partial is not None:
            self._partial.cancel()
            self._partial = None
        self._live = LiveTranscript()

    def _drop_guess(self) -> None:
        if self._guess is not None:
            self._guess.cancel()
            self._guess = None
