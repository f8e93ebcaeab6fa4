"""OpenAI's list of models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import Request

from server.documents import model_document, route_document
from server.keys.access import Access, access_of
from server.router import Router

if TYPE_CHECKING:
    from engine.engine import Engine


def models_router(engine: Engine) -> Router:
    """`GET /v1/models` and `GET /v1/models/{id}`.

    An alias is listed as a model of its own, as clients offer exactly the listed ids, and some
    accept no others. `alias_of` is the id of its model. So is a LoRA of a language model, whose
    `parent` is its model. A route is listed with the models that it chooses from. A key is shown
    what it may use.
    """
    router = Router("models")

    # Clients probe with HEAD, and some end their base address with a slash.
    @router.head("/v1/models", described=False)
    @router.head("/v1/models/", described=False)
    @router.get("/v1/models/", described=False)
    @router.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        access = access_of(request)
        return {
            "object": "list",
            "data": [
                model_document(model, name, inputs=engine.inputs(model.id))
                for model in engine.status().models
                for name in (model.id, *model.aliases)
                if access.may_use(name)
            ]
            + await asyncio.to_thread(_adapters, engine, access)
            + [route_document(route) for route in engine.config.routes if access.may_use(route.id)],
        }

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
        access_of(request).check_model(name)
        if name in engine.router:
            return route_document(engine.router.find(name))
        model, adapter = engine.config.find_adapter(name)
        if adapter is not None:
            name = f"{model.id}:{adapter}"
        inputs = engine.inputs(model.id)
        return model_document(engine.model_status(model.id), name, adapter=adapter, inputs=inputs)

    return router


def _adapters(engine: Engine, access: Access) -> list[dict[str, Any]]:
    """Each adapter of a language model as a model of its own."""
    return [
        model_document(
            engine.model_status(model.id),
            f"{model.id}:{name}",
            adapter=name,
            inputs=engine.inputs(model.id),
        )
        for model in engine.config.models
        for name in engine.loras.adapters(model)
        if access.may_use(f"{model.id}:{name}")
    ]
