"""Embeddings, as Ollama answers them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Send

from engine.errors import RuntimeFailed
from engine.events import Document
from server.headers import answer_headers
from server.ollama.answer import open_session
from server.ollama.translation import Translated
from server.router import json_response

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.session import Session


async def send_embeddings(
    engine: Engine, translated: Translated, named: str, _send: Send
) -> Response:
    """The answer of `POST /api/embed`. `named` is the name that the client used.

    Raises:
        EngineError: of the request.

    """
    began_s = time.perf_counter()
    session = await open_session(engine, translated)
    found = await _read(session)
    timings, usage = session.timings, found.get("usage") or {}
    document = {
        "model": named,
        "embeddings": _vectors(found),
        "total_duration": round((time.perf_counter() - began_s) * 1e9),
        "load_duration": round((timings.fetch_ms + timings.load_ms) * 1e6),
        "prompt_eval_count": int(usage.get("prompt_tokens") or session.usage.input_tokens),
    }
    return json_response(document, answer_headers(session))


async def send_embedding(engine: Engine, translated: Translated, _send: Send) -> Response:
    """The answer of `POST /api/embeddings`.

    Raises:
        EngineError: of the request.

    """
    session = await open_session(engine, translated)
    (vector,) = _vectors(await _read(session))
    return json_response({"embedding": vector}, answer_headers(session))


async def _read(session: Session) -> dict[str, Any]:
    await session.close()
    if not isinstance(session.first, Document):
        raise RuntimeFailed("The model gave no embeddings.")
    # A batch of long vectors is many megabytes of JSON.
    found = await asyncio.to_thread(from_json, session.first.body)
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise RuntimeFailed("The model gave no embeddings.")
    return found


def _vectors(found: dict[str, Any]) -> list[list[float]]:
    ordered = sorted(found["data"], key=lambda each: each["index"])
    return [each["embedding"] for each in ordered]
