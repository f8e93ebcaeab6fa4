"""OpenAI's realtime protocol over WebSockets: voice in, voice out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from starlette.datastructures import QueryParams

from engine.errors import InvalidRequest
from server.forms import read_json
from server.keys.access import EVERYTHING, access_of
from server.keys.client_secrets import REALTIME_PATH, ClientSecret, ClientSecrets
from server.realtime.conversation import new_id
from server.realtime.session import Conversing
from server.realtime.session_reader import SessionReader
from server.router import Router, json_response
from server.schemas.client_secrets import ClientSecretBody
from server.settings import ServerSettings
from server.websocket.connection import WebSocketConnection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.voices import VoiceStore


HANDSHAKE_S = 5.0
"""Seconds for the models, before the connection is accepted without them. Clients built upon the
library `websockets`, and OpenAI's is, give up a handshake after ten."""


def realtime_router(
    engine: Engine, voices: VoiceStore, secrets: ClientSecrets, settings: ServerSettings
) -> Router:
    """`/v1/realtime`, a WebSocket, and the secrets by which browsers open it."""
    router = Router("realtime")

    @router.websocket(REALTIME_PATH)
    async def realtime(connection: WebSocketConnection) -> None:
        secret: ClientSecret | None = getattr(connection.state, "client_secret", None)
        session = Conversing(
            engine,
            getattr(connection.state, "access", EVERYTHING),
            connection.send,
            request_id=connection.state.request_id,
            find_voice=voices.find_sample,
            document=_begin(connection.query, None if secret is None else secret.session),
        )
        beginning = asyncio.ensure_future(session.begin())
        try:
            # Before the connection is accepted, so that a lack of room has a status of its own.
            await asyncio.wait((beginning,), timeout=HANDSHAKE_S)
            if beginning.done():
                beginning.result()
            await connection.accept()
            await beginning
            await session.run(connection.receive)
        finally:
            if not beginning.done():
                beginning.cancel()
                await asyncio.wait((beginning,))
            await session.end()

    @router.post(f"{REALTIME_PATH}/client_secrets")
    async def make_client_secret(request: Request) -> Response:
        body = ClientSecretBody.of(await read_json(request, settings.max_body_bytes))
        access = access_of(request)
        reader = SessionReader(engine.config, access)
        session = reader.read(body.session, model_later=True)
        value, secret = secrets.make(access.digest, body.session, body.expires_after.seconds)
        document = {
            "value": value,
            "expires_at": secret.expires_at,
            "session": {"id": new_id("sess"), **reader.describe(session)},
        }
        return json_response(document, {"cache-control": "no-store"})

    return router


def _begin(query: QueryParams, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the session begins: as the query says, and `given` with the client's secret.

    Raises:
        InvalidRequest: naming the wrong parameter.

    """
    for name in query:
        if name not in ("model", "intent"):
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name)
        if len(query.getlist(name)) > 1:
            raise InvalidRequest("It is given more than once.", param=name)
    model, intent = query.get("model"), query.get("intent")
    if intent not in (None, "transcription"):
        raise InvalidRequest("It is transcription, or left out.", param="intent")
    document = dict(given or {})
    if given is None and intent == "transcription":
        document["type"] = "transcription"
    if document.get("type") == "transcription":
        return document
    if intent is not None:
        raise InvalidRequest("The client secret is for a conversation.", param="intent")
    if model is not None:
        document["model"] = model
    if document.get("model") is None:
        raise InvalidRequest("You must name a model, as in /v1/realtime?model=…", param="model")
    return document
