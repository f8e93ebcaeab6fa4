"""A realtime session: the client's events in, the server's events out.

One task reads events in order. What takes long, a transcript or a response, is a task of its own,
so that an interruption is seen at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import EngineError, InvalidRequest
from engine.media.voice_activity import VoiceActivity
from engine.memory.malloc import trim
from engine.requests import (
    Priority,
    SchedulingOptions,
    TextOperation,
    TextRequest,
)
from server.body import parse_object
from server.errors import Failure
from server.keys.access import Access
from server.realtime.conversation import Conversation, Item, messages, new_id, read_item
from server.realtime.input_audio import MAX_APPEND_BYTES
from server.realtime.response import Response, ResponsePlan
from server.realtime.session_reader import SessionReader, language_model, within
from server.realtime.spoken_turns import SpokenTurns
from server.schemas.fields import Body
from server.schemas.realtime import (
    RealtimeSession,
    ResponseOptions,
    Session,
    TranscriptionSession,
)

if TYPE_CHECKING:
    from pathlib import Path

    from engine.engine import Engine
    from engine.scheduling.lease import Lease

logger = logging.getLogger(__name__)

MAX_SESSION_S = 3_600
"""OpenAI's limit."""
MUCH_AUDIO_BYTES = 8 * 2**20
"""Audio of a session after which the C library is asked to give its free memory back. Otherwise it
grows by some 40 MB with each client that fills its buffer."""
MAX_BESIDE = 4
"""Responses outside the conversation at a time."""

BodyT = TypeVar("BodyT", bound=Body)

Send = Callable[[str], Awaitable[None]]
Receive = Callable[[], Awaitable[str | bytes | None]]


class Conversing:
    """One connection of a client, from `session.created` to its end."""

    def __init__(
        self,
        engine: Engine,
        access: Access,
        send: Send,
        *,
        request_id: str,
        find_voice: Callable[[str], Path | None],
        document: Mapping[str, Any],
    ) -> None:
        """`find_voice` gives the sample of a cloned voice. The session begins as `document`.

        Raises:
            InvalidRequest: no model is named, or the configuration lacks one that is needed.
            ModelForbidden: the key may not use one of the models.

        """
        self._engine = engine
        self._access = access
        self._send_text = send
        self._sending = asyncio.Lock()
        self._request_id = request_id
        self._find_voice = find_voice
        self._count = 0
        self._audio_bytes = 0
        self.id = new_id("sess")
        self._expires_at = int(time.time()) + MAX_SESSION_S
        self._reader = SessionReader(engine.config, access)
        self._document = dict(document)
        self._document.setdefault("type", "realtime")
        self._session = self._reader.read(self._document)
        self._lease: Lease | None = None
        self._held: tuple[str, ...] = ()
        self._conversation = Conversation()
        self._turns = SpokenTurns(
            engine.open,
            self._emit,
            self._start,
            listener=self,
            conversation=self._conversation,
            new_request_id=self._new_request_id,
            scheduling=self._scheduling(),
        )
        self._prefill: asyncio.Task[None] | None = None
        self._active: tuple[Response, asyncio.Task[None]] | None = None
        self._beside: dict[str, tuple[Response, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handlers: dict[str, Callable[[Mapping[str, Any]], Awaitable[None]]] = {
            "session.update": self._on_session_update,
            "input_audio_buffer.append": self._on_append,
            "input_audio_buffer.commit": self._on_commit,
            "input_audio_buffer.clear": self._on_clear,
            "conversation.item.create": self._on_item_create,
            "conversation.item.retrieve": self._on_item_retrieve,
            "conversation.item.truncate": self._on_item_truncate,
            "conversation.item.delete": self._on_item_delete,
            "response.create": self._on_response_create,
            "response.cancel": self._on_response_cancel,
        }

    # The session and its models

    async def begin(self) -> None:
        """Make ready for the first event, and hold the models.

        Raises:
            EngineError: they cannot be held, or turns cannot be detected.

        """
        await self._configure_turns(self._session)
        await self.hold()

    async def _configure_turns(self, session: Session) -> None:
        if session.audio.input.turn_detection is not None:
            await VoiceActivity.load()
        self._turns.configure(session.audio.input, self._reader.hearing_model(session))

    async def hold(self) -> None:
        """Keep the models of the session on the device, all or none.

        Raises:
            EngineError: they cannot be kept. What was kept before still is.

        """
        names = self._reader.names(self._session)
        if names == self._held:
            return
        lease = await self._engine.hold(
            names, request_id=self._new_request_id(), scheduling=self._scheduling()
        )
        if self._lease is not None:
            self._lease.release()
        self._lease, self._held = lease, names

    def _scheduling(self) -> SchedulingOptions:
        return SchedulingOptions(priority=Priority.INTERACTIVE, caller=self._access.caller)

    def _new_request_id(self) -> str:
        self._count += 1
        return f"{self._request_id}-{self._count}"

    # The life of the connection

    async def run(self, receive: Receive) -> None:
        """Serve the client until it leaves. Call `end` after it."""
        try:
            async with asyncio.timeout(MAX_SESSION_S):
                await self._emit({"type": "session.created", "session": self._described()})
                while (text := await receive()) is not None:
                    await self._on_message(text)
        except TimeoutError:
            error = InvalidRequest("Your session reached its limit of 60 minutes.")
            await self._emit(_error_event(error, None, code="session_expired"))

    async def end(self) -> None:
        """Cancel what still runs, and let the models go."""
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:  # the wait may be cancelled, as the client has left
            if self._lease is not None:
                self._lease.release()
                self._lease = None
            if self._audio_bytes > MUCH_AUDIO_BYTES:
                asyncio.get_running_loop().run_in_executor(None, trim)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it too

    async def _emit(self, event: dict[str, Any]) -> None:
        async with self._sending:
            await self._send_text(json.dumps({"event_id": new_id("event"), **event}))

    async def _on_message(self, text: str | bytes) -> None:
        event_id = None
        try:
            event = parse_object(text, "event")
            event_id = event.get("event_id")
            if event_id is not None and not (isinstance(event_id, str) and len(event_id) <= 512):
                event_id = None
                raise InvalidRequest("It is a text of at most 512 characters.", param="event_id")
            handler = self._handlers.get(str(event.get("type")))
            if handler is None:
                known = ", ".join(self._handlers)
                raise InvalidRequest(f"There is no such event. There are {known}.", param="type")
            if isinstance(self._session, TranscriptionSession) and not str(
                event["type"]
            ).startswith(("session", "input_audio_buffer")):
                raise InvalidRequest("A transcription session has no conversation.", param="type")
            await handler(event)
        except EngineError as error:
            await self._emit(_error_event(error, event_id))

    def _described(self) -> dict[str, Any]:
        document = self._reader.describe(self._session)
        return {"id": self.id, "expires_at": self._expires_at, **document}

    # Events of the client

    async def _on_session_update(self, event: Mapping[str, Any]) -> None:
        given = event.get("session")
        if not isinstance(given, dict):
            raise InvalidRequest("It is an object.", param="session")
        if given.get("type", self._document["type"]) != self._document["type"]:
            raise InvalidRequest("The type of a session cannot change.", param="session.type")
        document = _merged(self._document, given)
        session = self._reader.read(document)
        before = self._session
        await self._configure_turns(session)
        self._session = session
        try:
            await self.hold()
        except BaseException:
            self._session = before
            self._turns.configure(before.audio.input, self._reader.hearing_model(before))
            raise
        self._document = document
        await self._emit({"type": "session.updated", "session": self._described()})

    async def _on_append(self, event: Mapping[str, Any]) -> None:
        text = event.get("audio")
        if not isinstance(text, str):
            raise InvalidRequest("It is audio in base64.", param="audio")
        if len(text) > MAX_APPEND_BYTES * 4 // 3 + 4:
            raise InvalidRequest(
                f"One append has {MAX_APPEND_BYTES // 2**20} MiB of audio at most.", param="audio"
            )
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest("It is no base64.", param="audio") from error
        self._audio_bytes += len(data)
        await self._turns.append(data)

    async def _on_commit(self, _event: Mapping[str, Any]) -> None:
        await self._turns.commit()

    async def _on_clear(self, _event: Mapping[str, Any]) -> None:
        self._turns.clear()
        await self._emit({"type": "input_audio_buffer.cleared"})

    async def _on_item_create(self, event: Mapping[str, Any]) -> None:
        previous = event.get("previous_item_id")
        if previous is not None and not isinstance(previous, str):
            raise InvalidRequest("It is an id.", param="previous_item_id")
        item = read_item(event.get("item"))
        self._conversation.check_room(item)
        await self._add(item, previous)

    async def _add(self, item: Item, previous: str | None = None) -> None:
        before = self._conversation.add(item, previous)
        place = {"previous_item_id": before, "item": item.document}
        await self._emit({"type": "conversation.item.added", **place})
        await self._emit({"type": "conversation.item.done", **place})

    async def _on_item_retrieve(self, event: Mapping[str, Any]) -> None:
        item = self._conversation.find(event.get("item_id"))
        await self._emit({"type": "conversation.item.retrieved", "item": item.document})

    async def _on_item_truncate(self, event: Mapping[str, Any]) -> None:
        item = self._conversation.find(event.get("item_id"))
        if item.document.get("role") != "assistant":
            raise InvalidRequest("Only what was answered can be truncated.", param="item_id")
        index, end_ms = event.get("content_index"), event.get("audio_end_ms")
        if index != 0:
            raise InvalidRequest("There is one part, with the index 0.", param="content_index")
        if isinstance(end_ms, bool) or not isinstance(end_ms, int) or end_ms < 0:
            raise InvalidRequest("It is a number of milliseconds.", param="audio_end_ms")
        if item.spoken and end_ms > item.spoken[-1].end_ms + 1_000:
            raise InvalidRequest(
                f"The audio is {item.spoken[-1].end_ms:.0f} ms long.", param="audio_end_ms"
            )
        item.cut(end_ms)
        await self._emit(
            {
                "type": "conversation.item.truncated",
                "item_id": item.id,
                "content_index": 0,
                "audio_end_ms": end_ms,
            }
        )

    async def _on_item_delete(self, event: Mapping[str, Any]) -> None:
        self._conversation.remove(event.get("item_id"))
        await self._emit({"type": "conversation.item.deleted", "item_id": event["item_id"]})

    async def _on_response_create(self, event: Mapping[str, Any]) -> None:
        given = event.get("response")
        if given is not None and not isinstance(given, dict):
            raise InvalidRequest("It is an object.", param="response")
        options = within("response", ResponseOptions, given or {})
        if options.conversation == "auto" and self._active is not None:
            raise InvalidRequest(
                "The conversation has a response under way. Wait for response.done, or cancel it.",
            )
        if len(self._beside) >= MAX_BESIDE:
            raise InvalidRequest(f"{MAX_BESIDE} responses outside the conversation are under way.")
        self._begin_response(options)

    async def _on_response_cancel(self, event: Mapping[str, Any]) -> None:
        response_id = event.get("response_id")
        if response_id is None:
            if self._active is None:
                raise InvalidRequest("There is no response under way.")
            self._interrupt("client_cancelled")
            return
        under_way = [each for each in (self._active, *self._beside.values()) if each is not None]
        for response, task in under_way:
            if response.id == response_id:
                response.cancel(task, "client_cancelled")
                return
        raise InvalidRequest("No response of this id is under way.", param="response_id")

    # Turns, as `TurnListener`

    def on_speech_started(self) -> None:
        """Interrupt the response under way, and read the conversation ahead."""
        detection = self._session.audio.input.turn_detection
        if detection is not None and detection.interrupt_response:
            self._interrupt("turn_detected")
        self._prefill_prompt()

    async def on_turn(self, item: Item) -> None:
        """Keep what was said."""
        await self._add(item)

    def on_turn_end(self) -> None:
        """Respond, if the session does so on its own."""
        detection = self._session.audio.input.turn_detection
        if isinstance(self._session, TranscriptionSession) or detection is None:
            return
        if detection.create_response and self._active is None:
            self._begin_response(ResponseOptions())

    # Responses

    def _prefill_prompt(self) -> None:
        """Read the conversation so far into the KV cache, while the user speaks."""
        session = self._session
        if isinstance(session, TranscriptionSession) or self._active is not None:
            return
        if self._prefill is not None and not self._prefill.done():
            return
        given = messages(self._conversation.items, session.instructions)
        if not given:
            return
        plan = self._plan(ResponseOptions())
        body = plan.chat_body(self._conversation.items)
        body |= {"max_tokens": 1, "stream": False}
        del body["stream_options"]
        request = TextRequest(
            model=language_model(session),
            operation=TextOperation.CHAT,
            body=body,
            request_id=self._new_request_id(),
            scheduling=self._scheduling(),
        )
        self._prefill = self._start(self._read_ahead(request))

    async def _read_ahead(self, request: TextRequest) -> None:
        try:
            session = await self._engine.open(request)
            await session.close()
        except EngineError as error:
            logger.debug("nothing was read ahead: %s", error)

    def _plan(self, options: ResponseOptions) -> ResponsePlan:
        session = self._session
        assert isinstance(session, RealtimeSession)
        output = session.audio.output
        own = None if options.audio is None else options.audio.output
        voice = output.voice if own is None or own.voice is None else own.voice
        form = output.format if own is None or own.format is None else own.format
        modalities = options.output_modalities or session.output_modalities
        speaks = "audio" in modalities
        tools = session.tools if options.tools is None else options.tools
        parallel = options.parallel_tool_calls
        return ResponsePlan(
            model=language_model(session),
            speech_model=self._reader.speech_model(session) if speaks else "",
            instructions=(
                session.instructions if options.instructions is None else options.instructions
            ),
            speaks=speaks,
            voice=voice,
            voice_sample=None if voice is None else self._find_voice(voice),
            speed=output.speed,
            codec=form.codec,
            tools=tools,
            tool_choice=options.tool_choice or session.tool_choice,
            parallel_tool_calls=session.parallel_tool_calls if parallel is None else parallel,
            max_output_tokens=options.max_output_tokens or session.max_output_tokens,
            metadata=options.metadata,
            scheduling=self._scheduling(),
            request_id=self._request_id,
            conversation_id=self._conversation.id if options.conversation == "auto" else None,
        )

    def _begin_response(self, options: ResponseOptions) -> None:
        marks = self._turns.take_marks()
        given: Sequence[Item] | None = None
        if options.input is not None:
            given = [self._given(each, n) for n, each in enumerate(options.input)]
        within = options.conversation == "auto"
        plan = self._plan(options)
        plan.check_choice()
        response = Response(
            self._engine.open, self._emit, plan, marks, self._kept if within else _not_kept
        )
        self._turns.cancel_wait()
        task = self._start(self._respond(response, given))
        if within:
            self._active = (response, task)
        else:
            self._beside[response.id] = (response, task)

    def _given(self, document: Any, index: int) -> Item:
        if isinstance(document, Mapping) and document.get("type") == "item_reference":
            return self._conversation.find(document.get("id"), f"response.input[{index}].id")
        return read_item(document, f"response.input[{index}]")

    def _kept(self, item: Item) -> None:
        before = self._conversation.add(item)
        place = {"previous_item_id": before, "item": dict(item.document)}
        self._start(self._emit({"type": "conversation.item.added", **place}))

    async def _respond(self, response: Response, given: Sequence[Item] | None) -> None:
        try:
            await response.run(partial(self._items, given))
        finally:
            self._beside.pop(response.id, None)
            if self._active is not None and self._active[0] is response:
                self._active = None
                self._turns.wait_for_speech(response.left_to_hear_ms())

    async def _items(self, given: Sequence[Item] | None) -> Sequence[Item]:
        if given is not None:
            return given
        await self._conversation.known()
        return list(self._conversation.items)

    def _interrupt(self, reason: str) -> None:
        """Cancel the response under way. The next may begin at once."""
        if self._active is not None:
            (response, task), self._active = self._active, None
            response.cancel(task, reason)


def _not_kept(_item: Item) -> None:
    """The response is outside the conversation."""


def _merged(document: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The document with what is given. Objects are merged; of turn detection a new type is new."""
    merged = dict(document)
    for name, value in given.items():
        old = merged.get(name)
        renewed = name in ("turn_detection", "format", "tool_choice")
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not renewed:
            merged[name] = _merged(old, value)
        else:
            merged[name] = value
    return merged


def _error_event(
    error: Exception, event_id: str | None, *, code: str | None = None
) -> dict[str, Any]:
    failure = Failure.of(error)
    return {
        "type": "error",
        "error": {
            "type": failure.type,
            "code": code or failure.code,
            "message": failure.message,
            "param": failure.param,
            "event_id": event_id,
        },
    }
