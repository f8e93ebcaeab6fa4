"""What a route would choose for a request, and why."""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import Request

from engine.errors import InvalidRequest
from engine.requests import Priority, TextRequest
from engine.requests import Request as EngineRequest
from server.auth import ROUTE_PATH
from server.forms import Fields, read_json
from server.image_io import decode_pictures
from server.media import check_media_urls
from server.router import Router
from server.routes.text import TEXT_PATHS
from server.schemas.audio import SpeechBody
from server.schemas.engine import RouteBody
from server.schemas.fields import model_name
from server.schemas.images import GenerationBody
from server.schemas.scheduling_options import take_scheduling_options
from server.schemas.videos import VideoBody
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine
    from server.pictures import Pictures

_MEDIA: dict[str, tuple[type[GenerationBody | VideoBody | SpeechBody], Priority]] = {
    "/v1/images/generations": (GenerationBody, Priority.NORMAL),
    "/v1/videos": (VideoBody, Priority.BATCH),
    "/v1/audio/speech": (SpeechBody, Priority.INTERACTIVE),
}


def route_router(engine: Engine, settings: ServerSettings, pictures: Pictures) -> Router:
    """`POST /v1/engine/route`: the models for a request that came now. Nothing is run."""
    router = Router("engine")

    @router.post(ROUTE_PATH)
    async def route(request: Request) -> dict[str, Any]:
        asked = RouteBody.of(await read_json(request, settings.max_body_bytes))
        wanted = await _request_of(request, asked, settings)
        if isinstance(wanted, TextRequest):
            check_media_urls(wanted.body, settings.allowed_media_hosts)
            await pictures.settle(wanted)
        choice = await engine.route(wanted)
        return {
            "object": "engine.route",
            "route": choice.route,
            "model": next(iter(choice.models), None),
            "prefer": choice.prefer,
            "needed_quality": choice.needed_quality,
            "complexity": choice.complexity and asdict(choice.complexity),
            "options": [
                {
                    "model": option.model,
                    "capable": option.capable,
                    "reason": option.reason or None,
                    "quality": option.quality,
                    "price": _finite(option.price),
                    "seconds": option.seconds,
                    "cost": _finite(option.cost),
                }
                for option in choice.options
            ],
        }

    return router


def _finite(dollars: float | None) -> float | None:
    """None for a price that nobody knows."""
    return None if dollars is None or math.isinf(dollars) else dollars


async def _request_of(
    request: Request, asked: RouteBody, settings: ServerSettings
) -> EngineRequest:
    """The engine's form of the request that is asked about.

    Raises:
        InvalidRequest: naming the wrong field.

    """
    fields = Fields(dict(asked.body), typed=True)
    request_id: str = request.state.request_id
    if asked.endpoint in TEXT_PATHS:
        scheduling = take_scheduling_options(request, fields)
        model = model_name(fields.values.get("model"))
        return TextRequest(model, TEXT_PATHS[asked.endpoint], fields.values, request_id, scheduling)
    if asked.endpoint not in _MEDIA:
        known = ", ".join((*TEXT_PATHS, *_MEDIA))
        raise InvalidRequest(f"Of these endpoints a route can be told: {known}.", param="endpoint")
    kind, priority = _MEDIA[asked.endpoint]
    scheduling = take_scheduling_options(request, fields, priority)
    body = kind.of(fields)
    if isinstance(body, SpeechBody):
        return body.to_request(None, request_id=request_id, scheduling=scheduling)
    pictures = await asyncio.to_thread(decode_pictures, body.uploads(), settings.max_image_pixels)
    return body.to_request(pictures, request_id=request_id, scheduling=scheduling)
