"""One turn on its way: the answer of a model, made into a kept response while it is sent.

It is outside of the response cache. So an answer that the cache gives again is a response of its
own, with a new id.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from starlette.responses import Response
from starlette.types import Message, Send

from engine.errors import EngineError
from server.responses.records import CANCELLED
from server.responses.store import ResponseStore
from server.responses.stream_reader import (
    ENDED,
    WHOLE,
    Written,
    blocks_of,
    document_of,
    event_block,
    type_of,
)
from server.responses.turn import Turn, Turns, is_spoken, outputs_of

log = logging.getLogger(__name__)

Answer: TypeAlias = Callable[[Send], Awaitable[Response | None]]
"""Sends an answer, or returns one to send. Raises what goes wrong before the answer begins."""


class Exchange:
    """Answers a turn, keeps the response, and lets the next turn of the conversation begin."""

    def __init__(self, turns: Turns, turn: Turn, answer: Answer) -> None:
        """`answer` has the model run once, for `turn.body`."""
        self._turns = turns
        self._turn = turn
        self._answer = answer
        self.ended: dict[str, Any] | None = None
        """The last document of the response; None before."""

    async def run(self, send: Send) -> Response | None:
        """Send the response, or return it.

        Raises:
            EngineError: an error before the response began. Nothing is kept then.

        """
        try:
            return await self.attempt(send)
        finally:
            self._turns.release(self._turn)

    async def attempt(self, send: Send) -> Response | None:
        """The same, and the turn keeps its conversation.

        A tool of the server's own runs within `_answer`: see `server.file_search`.

        Raises:
            EngineError: see `run`.

        """
        sender = _Sender(self, send)
        try:
            response = await self._answer(sender)
            return None if response is None else await self._whole(response)
        except EngineError as error:
            own = self._turn.own_error(error)
            if own is error:
                raise
            raise own from error
        finally:
            sender.leave()

    async def _whole(self, response: Response) -> Response:
        document = _response_of(bytes(response.body))
        if response.status_code != 200 or document is None:
            return response
        settled = await self.end(document)
        body = _dumped(settled)
        del response.headers["content-length"]
        return Response(body, 200, dict(response.headers))

    async def end(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the response as it ended, and return it as its client gets it."""
        return self._turn.shown(await self._kept(document))

    async def _kept(self, document: Mapping[str, Any]) -> dict[str, Any]:
        settled = self._turn.settled(document)
        self.ended = settled
        turn, keeper = self._turn, self._turns.keeper
        outputs = outputs_of(settled)
        try:
            # Before it is sent: its client may go on from it at once. A job is kept by its queue.
            if turn.keeps and not turn.fields.background:
                await keeper.write(
                    ResponseStore.save,
                    turn.kept(settled),
                    turn.inputs,
                    outputs,
                    spoken=is_spoken(settled),
                )
            elif turn.fields.conversation is not None and not turn.keeps and is_spoken(settled):
                items = [*turn.inputs, *outputs]
                await keeper.write(
                    ResponseStore.extend, turn.fields.conversation, turn.owner, items
                )
        except EngineError as error:
            # The answer is there, and worth more than its record.
            log.error("%s is not kept: %s", turn.id, error)
            return turn.settled(document, stored=False)
        return settled

    def leave(self, written: Written) -> None:
        """Keep what a stream gave whose client left, or that broke off. It can be looked up."""
        turn = self._turn
        if self.ended is not None or written.document is None or turn.fields.background:
            return
        document = {**written.document, "status": CANCELLED}
        self.ended = document
        if turn.keeps:
            outputs = outputs_of({"output": written.output()})
            self._turns.keeper.write_soon(
                ResponseStore.save, turn.kept(document), turn.inputs, outputs, spoken=False
            )

    async def fail(self, written: Written, error: Mapping[str, Any]) -> None:
        """Keep a response that an error ended in the middle of its stream."""
        turn = self._turn
        if self.ended is not None:
            return
        failure = {
            "code": "server_error",
            "message": str(error.get("message") or "The response failed."),
        }
        began = written.document or turn.bare("failed")
        await self.end({**began, "status": "failed", "error": failure, "output": written.output()})

    @property
    def turn(self) -> Turn:
        """The turn that is answered."""
        return self._turn


class _Sender:
    """Passes the messages of an answer on, with the documents of the kept response."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange = exchange
        self._send = send
        self._streams = False
        self._written = Written()

    async def __call__(self, message: Message) -> None:
        """Take and send a message of the answer."""
        if message["type"] == "http.response.start":
            self._streams = message["status"] == 200
        elif self._streams:
            piece = message.get("body", b"")
            if piece:
                blocks = [await self._changed(block) for block in blocks_of(piece)]
                message = {**message, "body": b"".join(blocks)}
        await self._send(message)

    def leave(self) -> None:
        """Nothing more is sent."""
        if self._streams:
            self._exchange.leave(self._written)

    async def _changed(self, block: bytes) -> bytes:
        kind = type_of(block)
        if kind == "error":
            # Before it is sent, as the last event of any other response.
            await self._exchange.fail(self._written, document_of(block) or {})
        if kind not in WHOLE:
            self._written.take(kind, block)
            return block
        event = document_of(block)
        if event is None or not isinstance(event.get("response"), dict):
            return block
        if kind in ENDED:
            event["response"] = await self._exchange.end(event["response"])
        else:
            event["response"] = self._exchange.turn.settled(event["response"])
            self._written.document = event["response"]
        return event_block(block, event)


def _response_of(body: bytes) -> dict[str, Any] | None:
    """The response that a body is; None if it is something else."""
    try:
        document = json.loads(body)
    except ValueError:
        return None
    is_response = isinstance(document, dict) and document.get("object") == "response"
    return document if is_response else None


def _dumped(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a pair, which only an escape can write
        return json.dumps(document, separators=(",", ":")).encode()
