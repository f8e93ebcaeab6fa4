"""The pull of a model, as Ollama reports it."""

from __future__ import annotations

import hashlib
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Send

from engine.errors import EngineError
from server.errors import Failure
from server.ollama.answer import LineStream
from server.router import json_response

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.engine import Engine
    from engine.files.hub.fetch import FetchProgress

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
SUCCESS = {"status": "success"}


async def send_pull(
    engine: Engine, model: ModelConfig, send: Send, *, streams: bool
) -> Response | None:
    """Fetch the files of a model, and send the progress line by line.

    The pull stops when the last client that follows it leaves. Without `streams` the answer comes
    at the end.

    Raises:
        EngineError: of a pull without `streams`. Otherwise the last line has it.

    """
    if not streams:
        async with aclosing(engine.pull(model.id, INTERVAL_S)) as progress:
            async for _ in progress:
                pass
        return json_response(SUCCESS)
    stream = LineStream(send)
    await stream.begin({})
    await stream.send({"status": "pulling manifest"})
    try:
        async with aclosing(engine.pull(model.id, INTERVAL_S)) as progress:
            async for each in progress:
                if each.total_bytes:
                    await stream.send(_document(each))
        await stream.send(SUCCESS)
    except EngineError as error:
        logger.warning("the pull of %s failed: %s", model.id, error)
        await stream.send(Failure.of(error).ollama_document())
    await stream.end()
    return None


def _document(progress: FetchProgress) -> dict[str, Any]:
    # Clients draw a bar for each digest: here one for all files of a model.
    digest = hashlib.sha256(progress.repo.encode()).hexdigest()
    return {
        "status": f"pulling {digest[:12]}",
        "digest": f"sha256:{digest}",
        "total": progress.total_bytes,
        "completed": progress.done_bytes,
    }
