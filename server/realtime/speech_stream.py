"""Text streamed in, audio out: one connection of `/v1/audio/speech/stream`.

The messages are those of vLLM-omni's endpoint of this name. One task reads them and cuts the text;
another speaks. Text that waits to be spoken is bounded: beyond that the client is held back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, InvalidRequest, Overloaded, QueueTimeout
from engine.media.clauses import Clauses
from engine.requests import Priority, SchedulingOptions, SpeechRequest
from server.body import parse_object
from server.encoded_speech import encoded_speech
from server.errors import Failure
from server.forms import Fields
from server.keys.access import Access
from server.realtime.session_reader import SessionReader
from server.schemas.speech_stream import InputText, SpeechConfig
from server.websocket.connection import POLICY, TRY_LATER, ClientLeft, WebSocketConnection

if TYPE_CHECKING:
    from pathlib import Path

    from engine.engine import Engine
    from engine.scheduling.lease import Lease

logger = logging.getLogger(__name__)

CONFIG_S = 10.0
"""Seconds until the first message. vLLM-omni waits as long."""
IDLE_S = 60.0
"""Seconds between messages while nothing is spoken. A model is held all the time."""
MAX_SESSION_S = 3_600
WAITING_CLAUSES = 64
"""Clauses that wait to be spoken, some minutes of speech."""
MAX_UNCUT_CHARS = 4_096
"""Of an utterance that is spoken in one piece: the limit of OpenAI's speech endpoint."""
_SLICE_CHARS = 1_024
"""Text is cut in slices, as a cut takes time for all of the text that waits for it."""


@dataclass(frozen=True, slots=True)
class _Voice:
    """How text is spoken: a checked configuration."""

    config: SpeechConfig
    model: str
    sample: Path | None

    def request(self, text: str, request_id: str, scheduling: SchedulingOptions) -> SpeechRequest:
        config = self.config
        return SpeechRequest(
            model=self.model,
            text=text,
            request_id=request_id,
            voice=None if self.sample is not None else config.voice,
            voice_sample=self.sample,
            language=config.language,
            speed=config.speed,
            seed=config.seed,
            scheduling=scheduling,
        )


@dataclass(frozen=True, slots=True)
class _Clause:
    """A text to speak."""

    text: str
    place: Mapping[str, int]
    """`utterance_index` and `sentence_index`."""
    voice: _Voice


@dataclass(frozen=True, slots=True)
class _UtteranceEnd:
    """After all clauses of an utterance."""

    index: int
    count: int


class _Closed(Exception):
    """The connection must end, with a code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class SpeechStream:
    """One connection of a client. `run` serves it."""

    def __init__(
        self,
        engine: Engine,
        access: Access,
        connection: WebSocketConnection,
        *,
        request_id: str,
        find_voice: Callable[[str], Path | None],
    ) -> None:
        """`find_voice` gives the sample of a cloned voice."""
        self._engine = engine
        self._access = access
        self._connection = connection
        self._request_id = request_id
        self._find_voice = find_voice
        self._scheduling = SchedulingOptions(priority=Priority.INTERACTIVE, caller=access.caller)
        self._count = 0
        self._sending = asyncio.Lock()
        self._voice: _Voice | None = None
        self._lease: Lease | None = None
        self._text: _Cutter | None = None
        """Of the utterance under way."""
        self._utterance = 0
        self._sentence = 0
        self._jobs: asyncio.Queue[_Clause | _UtteranceEnd | None] = asyncio.Queue(WAITING_CLAUSES)
        self._speaking = False

    async def run(self) -> None:
        """Serve the client until it leaves or closes the session, then let the model go."""
        reading = asyncio.create_task(self._read())
        speaking = asyncio.create_task(self._speak())
        try:
            await asyncio.wait((reading, speaking), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            await speaking
        except _Closed as end:
            await self._connection.close(end.code)
        finally:
            for task in (reading, speaking):
                task.cancel()
            await asyncio.wait((reading, speaking))
            if self._lease is not None:
                self._lease.release()

    # What the client sends

    async def _read(self) -> None:
        """Take messages until `session.close`. Then what is left is spoken."""
        try:
            async with asyncio.timeout(MAX_SESSION_S):
                while await self._on_message(await self._receive()):
                    pass
                await self._jobs.put(None)
        except TimeoutError:
            await self._refuse(InvalidRequest("The session reached its limit of 60 minutes."))
            raise _Closed(POLICY) from None

    async def _receive(self) -> str | bytes:
        while True:
            limit_s = CONFIG_S if self._voice is None else IDLE_S
            try:
                async with asyncio.timeout(limit_s):
                    message = await self._connection.receive()
            except TimeoutError:
                if self._speaking or not self._jobs.empty():
                    continue
                await self._refuse(InvalidRequest(f"No message came for {limit_s:g} seconds."))
                raise _Closed(POLICY) from None
            if message is None:
                raise ClientLeft
            return message

    async def _on_message(self, text: str | bytes) -> bool:
        """Whether the session goes on."""
        try:
            event = parse_object(text, "message")
            match event.get("type"):
                case "session.config":
                    await self._on_config(event)
                case "input.text":
                    await self._on_text(event)
                case "input.done":
                    await self._on_done()
                case "session.close":
                    if self._text is not None:
                        await self._on_done()
                    return False
                case _:
                    raise InvalidRequest(
                        "It is session.config, input.text, input.done or session.close.",
                        param="type",
                    )
        except EngineError as error:
            await self._refuse(error)
            if self._voice is None:  # nothing that comes next could be served
                code = TRY_LATER if isinstance(error, Overloaded) else POLICY
                raise _Closed(code) from error
        return True

    async def _on_config(self, event: dict[str, Any]) -> None:
        if self._text is not None:
            raise InvalidRequest(
                "An utterance is under way. End it by input.done first.", param="type"
            )
        config = SpeechConfig.of(Fields(event, typed=True))
        reader = SessionReader(self._engine.config, self._access)
        model = config.model or reader.first("speech", "model")
        self._access.check_model(model)
        sample = None
        if config.voice is not None:
            sample = await asyncio.to_thread(self._find_voice, config.voice)
        voice = _Voice(config, model, sample)
        with contextlib.suppress(QueueTimeout):  # still starting, for which `hold` waits
            # What is wrong is named before a model is loaded for it.
            self._engine.prepare(voice.request("a", self._next_id(), self._scheduling))
        lease = await self._engine.hold(
            (model,), request_id=self._next_id(), scheduling=self._scheduling
        )
        if self._lease is not None:
            self._lease.release()
        self._lease, self._voice = lease, voice

    async def _on_text(self, event: dict[str, Any]) -> None:
        voice = self._configured()
        text = InputText.of(Fields(event, typed=True)).text
        if not text:
            return
        if self._text is None:
            self._text = _Cutter(voice.config.split_granularity)
        await self._enqueue(self._text.feed(text))

    async def _on_done(self) -> None:
        self._configured()
        if self._text is not None:
            await self._enqueue(self._text.finish())
        await self._jobs.put(_UtteranceEnd(self._utterance, self._sentence))
        self._text = None
        self._utterance, self._sentence = self._utterance + 1, 0

    def _configured(self) -> _Voice:
        if self._voice is None:
            raise InvalidRequest("The first message is session.config.", param="type")
        return self._voice

    async def _enqueue(self, clauses: Iterable[str]) -> None:
        voice = self._configured()
        for clause in clauses:
            if any(character.isalnum() for character in clause):
                place = {"utterance_index": self._utterance, "sentence_index": self._sentence}
                self._sentence += 1
                await self._jobs.put(_Clause(clause.strip(), place, voice))

    def _next_id(self) -> str:
        self._count += 1
        return f"{self._request_id}-{self._count}"

    # What the client gets

    async def _speak(self) -> None:
        while (job := await self._jobs.get()) is not None:
            self._speaking = True
            if isinstance(job, _Clause):
                await self._speak_clause(job)
            else:
                await self._emit(
                    {
                        "type": "session.done",
                        "utterance_index": job.index,
                        "total_sentences": job.count,
                    }
                )
            self._speaking = False

    async def _speak_clause(self, clause: _Clause) -> None:
        """Send a clause. If it fails, the client knows it, and the next is tried."""
        sent_bytes, failed = 0, False
        try:
            sent_bytes = await self._send_clause(clause)
        except ClientLeft:
            raise
        except Exception as error:
            failed = True
            expected = isinstance(error, EngineError)
            logger.error("%s: a clause failed: %s", self._request_id, error, exc_info=not expected)
            await self._refuse(error, clause.place)
        await self._emit(
            {
                "type": "audio.done",
                **clause.place,
                "total_bytes": sent_bytes,
                "error": failed,
            }
        )

    async def _send_clause(self, clause: _Clause) -> int:
        """Send the audio of a clause, and return its bytes."""
        config = clause.voice.config
        request = clause.voice.request(clause.text, self._next_id(), self._scheduling)
        session = await self._engine.open(request)
        whole, sent_bytes, began = bytearray(), 0, False
        try:
            async with aclosing(encoded_speech(config.response_format, session)) as pieces:
                async for piece in pieces:
                    if not began:
                        began = True
                        await self._emit(
                            {
                                "type": "audio.start",
                                **clause.place,
                                "sentence_text": clause.text,
                                "format": config.response_format,
                                "sample_rate": piece.sample_rate,
                                "channels": 1,
                            }
                        )
                    if not config.stream_audio:
                        whole += piece.data
                    elif piece.data:
                        sent_bytes += len(piece.data)
                        await self._send_audio(piece.data)
        finally:
            await session.close()
        if whole:
            await self._send_audio(bytes(whole))
        return sent_bytes + len(whole)

    async def _refuse(self, error: Exception, place: Mapping[str, int] | None = None) -> None:
        failure = Failure.of(error)
        await self._emit(
            {
                "type": "error",
                "message": failure.message,
                "code": failure.code,
                "param": failure.param,
                **(place or {}),
            }
        )

    async def _emit(self, event: Mapping[str, Any]) -> None:
        async with self._sending:
            await self._connection.send(json.dumps(event))

    async def _send_audio(self, audio: bytes) -> None:
        async with self._sending:
            await self._connection.send(audio)


class _Cutter:
    """The text of one utterance, cut where its configuration says."""

    def __init__(self, granularity: str) -> None:
        self._clauses = None
        self._whole = ""
        if granularity != "none":
            self._clauses = Clauses(whole_sentences=granularity == "sentence")

    def feed(self, text: str) -> Iterable[str]:
        """What can be spoken now, cut while it is asked for.

        Raises:
            InvalidRequest: there is too much text without a cut. What came before stays.

        """
        if self._clauses is not None:
            for start in range(0, len(text), _SLICE_CHARS):
                yield from self._clauses.feed(text[start : start + _SLICE_CHARS])
            return
        if len(self._whole) + len(text) > MAX_UNCUT_CHARS:
            raise InvalidRequest(
                f"With split_granularity none an utterance has {MAX_UNCUT_CHARS} characters"
                " at most.",
                param="text",
            )
        self._whole += text

    def finish(self) -> Iterable[str]:
        """What is left to speak."""
        return (self._whole,) if self._clauses is None else self._clauses.finish()
