"""OpenAI's Uploads API: a large file in parts."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from engine.errors import InvalidRequest
from server.forms import read_json, read_upload
from server.router import Router
from server.routes.stored_files import FORM_BYTES, check_filename
from server.schemas.stored_files import (
    CompleteBody,
    PartBody,
    UploadBody,
    part_document,
    upload_document,
)
from server.settings import ServerSettings
from server.stored_files.record import Purpose, viewer_of
from server.stored_files.uploads import MAX_PART_BYTES, Uploads


def uploads_router(uploads: Uploads, settings: ServerSettings) -> Router:
    """`/v1/uploads`: create, parts, complete, cancel."""
    router = Router("files")

    @router.post("/v1/uploads")
    async def create(request: Request) -> dict[str, Any]:
        body = UploadBody.of(await read_json(request, settings.max_body_bytes))
        upload = await asyncio.to_thread(
            uploads.create,
            viewer_of(request).name,
            Purpose(body.purpose),
            check_filename(body.filename, "filename"),
            body.mime_type,
            body.bytes,
            body.expires_after,
        )
        return upload_document(upload)

    @router.post("/v1/uploads/{upload_id}/parts")
    async def add_part(upload_id: str, request: Request) -> dict[str, Any]:
        viewer = viewer_of(request)
        await asyncio.to_thread(uploads.get, viewer, upload_id)  # before the bytes come
        unfinished = await asyncio.to_thread(uploads.files.begin)
        try:
            fields, _ = await read_upload(
                request, MAX_PART_BYTES + FORM_BYTES, "data", lambda: unfinished.file
            )
            PartBody.of(fields)
            if unfinished.nbytes > MAX_PART_BYTES:
                message = f"A part has {MAX_PART_BYTES} bytes at most."
                raise InvalidRequest(message, param="data", status=413)
            part = await asyncio.to_thread(uploads.add_part, viewer, upload_id, unfinished)
        finally:
            await asyncio.to_thread(unfinished.discard)
        return part_document(part)

    @router.post("/v1/uploads/{upload_id}/complete")
    async def complete(upload_id: str, request: Request) -> dict[str, Any]:
        body = CompleteBody.of(await read_json(request, settings.max_body_bytes))
        upload, file = await asyncio.to_thread(
            uploads.complete, viewer_of(request), upload_id, body.part_ids, body.md5
        )
        return upload_document(upload, file)

    @router.post("/v1/uploads/{upload_id}/cancel")
    async def cancel(upload_id: str, request: Request) -> dict[str, Any]:
        return upload_document(
            await asyncio.to_thread(uploads.cancel, viewer_of(request), upload_id)
        )

    return router
