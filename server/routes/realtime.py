"""OpenAI's realtime protocol over WebSockets: voice in, voice out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from engine.errors import InvalidRequest, NotFound
from server.keys.access import EVERYTHING
from server.realtime.session import Conversing
from server.router import Router
from server.settings import ServerSettings
from server.websocket.connection import ClientLeft, WebSocketConnection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.voices import VoiceStore

SUBPROTOCOL = "realtime"


def realtime_router(engine: Engine, voices: VoiceStore, settings: ServerSettings) -> Router:
    """`/v1/realtime`, a WebSocket."""
    router = Router("realtime")

    def find_voice(voice: str) -> Path | None:
        try:
            return voices.sample(voice)
        except NotFound:
            return None  # then it is a name of the model's own, or a wrong one

    async def converse(scope: Scope, receive: Receive, send: Send) -> None:
        model, transcribes_only = _asked(scope)
        connection = WebSocketConnection(scope, receive, send, settings.write_timeout_s)
        session = Conversing(
            engine,
            scope["state"].get("access", EVERYTHING),
            connection.send,
            request_id=scope["state"]["request_id"],
            find_voice=find_voice,
            default_model=model,
            transcribes_only=transcribes_only,
        )
        try:
            # Before the connection is accepted, so that a lack of room has a status of its own.
            await session.begin()
            offered = scope.get("subprotocols", ())
            await connection.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            await session.run(connection.receive)
            await connection.close()
        except ClientLeft:
            pass
        finally:
            await session.end()

    router.websocket("/v1/realtime", converse)
    return router


def _asked(scope: Scope) -> tuple[str | None, bool]:
    """The model that the query names, and whether the session only transcribes.

    Raises:
        InvalidRequest: naming the wrong parameter.

    """
    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    for name, values in query.items():
        if name not in ("model", "intent"):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        if len(values) > 1:
            raise InvalidRequest("It is given more than once.", param=name)
    model = query.get("model", [None])[0]
    intent = query.get("intent", [None])[0]
    if intent not in (None, "transcription"):
        raise InvalidRequest("It is transcription, or left out.", param="intent")
    if model is None and intent is None:
        raise InvalidRequest("You must name a model, as in /v1/realtime?model=…", param="model")
    return model, intent == "transcription"
