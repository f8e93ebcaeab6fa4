"""The files of models: their sizes, pulls, deletion, and their LoRAs."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from starlette.datastructures import UploadFile
from starlette.types import Send

from engine.catalog import loras
from engine.catalog.downloads import NO_PROGRESS, sources_of
from engine.catalog.loras import MAX_LORA_BYTES
from engine.catalog.model_files import Files, files_of, removable, remove_all
from engine.errors import Conflict, EngineError, InvalidRequest
from engine.files.hub.fetch import FetchProgress
from server.body import stream_body
from server.connection import ConnectedResponse
from server.errors import Failure
from server.forms import is_form, parse_form
from server.router import Router
from server.schemas.fields import model_name
from server.sse import EventStream, event_frame

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.engine import Engine

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.5

MAX_IGNORED_BYTES = 2**16

SPOOL_BYTES = 2**20
"""A larger upload is kept on disk while it comes."""


def files_router(engine: Engine) -> Router:
    """`/v1/engine/files`, `/v1/engine/models/{id}/pull`, `…/files`, `…/loras`, and all LoRAs."""
    router = Router("engine")

    @router.get("/v1/engine/files")
    async def list_files() -> dict[str, Any]:
        return await asyncio.to_thread(_files_document, engine)

    @router.post("/v1/engine/models/{name:path}/pull")
    async def pull(name: str, request: Request) -> Response:
        model = engine.config.find(name)
        async for _ in stream_body(request, MAX_IGNORED_BYTES):
            pass  # the request has no fields, but some clients send an empty object
        request_id: str = request.state.request_id
        return ConnectedResponse(partial(_send_pull, engine, model, request_id))

    @router.delete("/v1/engine/models/{name:path}/files")
    async def delete_files(name: str) -> dict[str, Any]:
        model = engine.config.find(name)
        found = await asyncio.to_thread(removable, model, engine.config)
        freed = await engine.remove_files(model.id, partial(remove_all, found))
        return {
            "id": model.id,
            "object": "engine.files",
            "deleted": [each.source for each in found],
            "freed_bytes": freed,
        }

    @router.get("/v1/engine/loras")
    async def list_loras() -> dict[str, Any]:
        return await asyncio.to_thread(_loras_document, engine)

    @router.delete("/v1/engine/models/{name:path}/loras/{lora}")
    async def delete_lora(name: str, lora: str) -> dict[str, Any]:
        model = engine.config.find(name)
        path = await asyncio.to_thread(loras.find, model, lora)
        freed = await engine.loras.remove(model, lora, partial(loras.remove, path))
        return {
            "id": lora,
            "object": "engine.lora",
            "model": model.id,
            "deleted": True,
            "freed_bytes": freed,
        }

    @router.post("/v1/engine/loras")
    async def add_lora(request: Request) -> dict[str, Any]:
        return await _add_lora(request, engine)

    return router


async def _send_pull(engine: Engine, model: ModelConfig, request_id: str, send: Send) -> None:
    """Send the events of a pull: `pull.progress`, then `pull.completed` or `error`.

    The pull stops when the last client that follows it leaves. The hub is asked only after the
    stream has begun, so the last event reports an error.
    """

    def frame(kind: str, progress: FetchProgress) -> str:
        return event_frame({"type": kind, "model": model.id, **asdict(progress)}).data

    stream = EventStream(send)
    await stream.begin({})
    last = NO_PROGRESS
    try:
        async with aclosing(engine.pull(model.id, PROGRESS_INTERVAL_S)) as progress:
            async for last in progress:
                await stream.send(frame("pull.progress", last))
        await stream.send(frame("pull.completed", last))
    except EngineError as error:
        logger.warning("the pull of %s failed: %s", model.id, error)
        document = {"type": "error", **Failure.of(error).openai_document()}
        await stream.send(event_frame({**document, "request_id": request_id}).data)
    await stream.end()


async def _add_lora(request: Request, engine: Engine) -> dict[str, Any]:
    """Add the LoRA of a form with `model`, `file` and maybe `name`, by default the file's name.

    One for a language model has `config` as well, its adapter_config.json.
    """
    if not is_form(request):
        raise InvalidRequest("Send the file as multipart/form-data.", status=415)
    try:
        form = await parse_form(request, MAX_LORA_BYTES, 2, 2, spool_bytes=SPOOL_BYTES)
    except OSError as error:  # of the temporary file
        raise Conflict(f"The upload cannot be kept: {error}") from error
    try:
        unknown = next(
            (key for key in form if key not in ("model", "name", "file", "config")), None
        )
        if unknown is not None:
            raise InvalidRequest(f"Unknown parameter: '{unknown}'.", param=unknown)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("Missing required parameter: 'file'.", param="file")
        config = form.get("config")
        if config is not None and not isinstance(config, UploadFile):
            raise InvalidRequest("config: it is a file, adapter_config.json.", param="config")
        model = engine.config.find(model_name(form.get("model")))
        loras.folder_of(model)
        name = loras.check_name(str(form.get("name") or file.filename or ""))
        peft_config = None if config is None else config.file
        work = partial(loras.add, cache_dir=engine.config.cache_dir)
        nbytes = await asyncio.to_thread(work, model, name, file.file, peft_config)
    finally:
        await form.close()
    return {
        "id": name,
        "object": "engine.lora",
        "model": model.id,
        "nbytes": nbytes,
    }


def _loras_document(engine: Engine) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "engine.lora",
                "model": model.id,
                "nbytes": loras.size_of(model, name),
            }
            for model in engine.config.models
            for name in engine.loras.names(model)
        ],
    }


def _files_document(engine: Engine) -> dict[str, Any]:
    config = engine.config
    return {
        "object": "list",
        "data": [
            {
                "id": model.id,
                "object": "engine.files",
                "source": model.source,
                "hub": bool(sources_of(model)),
                "files": [_document(each) for each in files_of(model, config)],
            }
            for model in config.models
        ],
    }


def _document(files: Files) -> dict[str, Any]:
    document = asdict(files)
    del document["path"]  # clients need not know the folders of this machine
    return document
