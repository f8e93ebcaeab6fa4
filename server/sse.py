"""Server-sent events: one JSON document each, named by its `type`."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError
from server.errors import Failure

logger = logging.getLogger(__name__)


async def send_events(
    documents: AsyncGenerator[dict[str, Any], None],
    headers: Mapping[str, str],
    request_id: str,
    send: Send,
) -> None:
    """Send each document (there is one or more) as an event as soon as it is there.

    The response begins with the first document. What fails later is logged and told by a last
    event. The caller ends the response, once it has given back what it holds.

    Raises:
        Exception: what the first document raised; nothing has been sent then.

    """
    async with aclosing(documents):
        first = await anext(documents)
        head = Response(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del head.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": head.raw_headers})
        try:
            await _send(send, first["type"], first)
            async for document in documents:
                await _send(send, document["type"], document)
        except Exception as error:
            # The status is sent already: the stream itself must tell.
            expected = isinstance(error, EngineError)
            logger.error("stream %s failed: %s", request_id, error, exc_info=not expected)
            await _send(send, "error", Failure.of(error).openai_document())


async def _send(send: Send, name: str, document: dict[str, Any]) -> None:
    text = f"event: {name}\ndata: {json.dumps(document, allow_nan=False)}\n\n"
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
