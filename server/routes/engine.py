"""The engine itself: what it holds, and the orders an admin may give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from server.wire import engine_document, model_document

if TYPE_CHECKING:
    from engine.engine import Engine


def engine_router(engine: Engine) -> APIRouter:
    """`GET /v1/engine` and `POST /v1/engine/models/{id}/load|unload|pin|unpin`.

    An order answers with the model as it is once the order is carried out.
    """
    router = APIRouter(tags=["engine"])

    def model(name: str) -> dict[str, Any]:
        return model_document(engine.model_status(name), name)

    @router.get("/v1/engine")
    async def status() -> dict[str, Any]:
        return engine_document(engine.status())

    @router.post("/v1/engine/models/{name:path}/load")
    async def load(name: str) -> dict[str, Any]:
        await engine.load(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/unload")
    async def unload(name: str) -> dict[str, Any]:
        await engine.unload(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/pin")
    async def pin(name: str) -> dict[str, Any]:
        engine.pin(name)
        return model(name)

    @router.post("/v1/engine/models/{name:path}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        engine.unpin(name)
        return model(name)

    return router
