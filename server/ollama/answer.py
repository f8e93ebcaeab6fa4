"""The answer of a model to one of Ollama's requests: a line a document, or one document."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError, InvalidRequest
from server.errors import Failure
from server.headers import answer_headers
from server.ollama.reply import Reply
from server.ollama.translation import Translated
from server.router import json_response
from server.sse import BodyStream

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/x-ndjson"


class LineStream(BodyStream):
    """A response of JSON documents, one a line."""

    def __init__(self, send: Send) -> None:
        super().__init__(send, MEDIA_TYPE)

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send the status and the headers, unless they are sent already."""
        await super().begin({**headers, "x-accel-buffering": "no"})

    async def send(self, document: Mapping[str, Any]) -> None:
        """Send a document."""
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        await self.send_bytes(f"{text}\n".encode())


async def open_session(engine: Engine, translated: Translated) -> Session:
    """Open a session for the request.

    Raises:
        EngineError: see `engine.engine.Engine.open`. It names the client's own fields.

    """
    try:
        return await engine.open(translated.request)
    except InvalidRequest as error:
        raise translated.renamed(error) from None


async def send_answer(
    engine: Engine, translated: Translated, reply: Reply, send: Send, *, streams: bool
) -> Response | None:
    """Run the request, and send its answer line by line. Without `streams` return it whole.

    An error after the first line is the last one.

    Raises:
        Exception: an error before the response began.

    """
    stream = LineStream(send)
    try:
        session = await open_session(engine, translated)
        try:
            async with aclosing(session.events()) as events:
                async for event in events:
                    for piece in reply.take(event):
                        if streams:
                            await stream.begin(answer_headers(session))
                            await stream.send(reply.document(piece))
        finally:
            # Before the last line is sent: see run_while_connected.
            await session.close()
        rest = reply.rest()
        if not streams:
            document = reply.end(reply.whole, session)
            return json_response(document, answer_headers(session))
        await stream.begin(answer_headers(session))
        if rest:
            await stream.send(reply.document(rest))
        await stream.send(reply.end(type(rest)(), session))
    except Exception as error:
        if isinstance(error, InvalidRequest):
            error = translated.renamed(error)
        if not stream.begun:
            raise error from None
        request_id = translated.request.request_id
        expected = isinstance(error, EngineError)
        logger.error("stream %s failed: %s", request_id, error, exc_info=not expected)
        await stream.send(Failure.of(error).ollama_document())
    await stream.end()
    return None
