"""The voices of speech models and of clients: OpenAI's endpoint, with a list and a delete."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from fastapi import Request

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from server.forms import query_fields, read_fields
from server.keys.access import Access, access_of
from server.router import Router
from server.schemas.audio import (
    VoiceBody,
    VoicesQuery,
    cloned_voice_document,
    voice_choices,
    voice_document,
)
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.voices import VoiceStore

logger = logging.getLogger(__name__)


def voices_router(engine: Engine, voices: VoiceStore, settings: ServerSettings) -> Router:
    """`/v1/audio/voices`: create, list, delete."""
    router = Router("audio")

    def speech_models(name: str | None, access: Access) -> list[ModelConfig]:
        if name is None:
            models = (model for model in engine.config.models if model.task == "speech")
            return [model for model in models if access.may_use(model.id)]
        access.check_model(name)
        model = engine.config.find(name)
        if model.task != "speech":
            raise InvalidRequest(f"The model {model.id!r} does not speak.", param="model")
        return [model]

    @router.get("/v1/audio/voices")
    async def list_voices(request: Request) -> dict[str, Any]:
        query = VoicesQuery.of(query_fields(request))
        data = []
        for model in speech_models(query.model, access_of(request)):
            try:
                known = await engine.voices(model.id, fetch=query.model is not None)
            except LoadFailed as error:
                if query.model is not None:
                    raise
                # One broken model must not hide the voices of the others.
                logger.warning("cannot list the voices of %s: %s", model.id, error)
                continue
            data += [voice_document(voice, model.id) for voice in known]
        data += [
            {**cloned_voice_document(voice), "model": None, "language": None}
            for voice in await asyncio.to_thread(voices.list)
        ]
        return {"object": "list", "data": data, "voices": voice_choices(data)}

    @router.get("/v1/audio/models")
    async def list_models(request: Request) -> dict[str, Any]:
        models = speech_models(None, access_of(request))
        return {"models": [{"id": each} for model in models for each in model.names]}

    @router.post("/v1/audio/voices")
    async def create(request: Request) -> dict[str, Any]:
        body = VoiceBody.of(await read_fields(request, settings.max_body_bytes))
        voice = await asyncio.to_thread(voices.add, body.name, body.audio_sample)
        return cloned_voice_document(voice)

    @router.delete("/v1/audio/voices/{voice_id}")
    async def delete(voice_id: str) -> dict[str, Any]:
        await asyncio.to_thread(voices.delete, voice_id)
        return {"id": voice_id, "object": "audio.voice", "deleted": True}

    return router
