"""OpenAI's Files API: what clients upload, and results that were made for them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request, Response

from engine.errors import InvalidRequest
from server.file_answer import FileAnswer
from server.forms import query_fields, read_upload
from server.router import Router
from server.schemas.stored_files import MAX_NAME_CHARS, FileBody, FileListQuery, file_document
from server.stored_files.record import Purpose, viewer_of
from server.stored_files.store import FileStore

FORM_BYTES = 2**16
"""What a form has beside its file."""

_MEDIA_TYPES = {Purpose.BATCH: "application/jsonl", Purpose.BATCH_OUTPUT: "application/jsonl"}


def stored_files_router(files: FileStore) -> Router:
    """`/v1/files`: create, list, retrieve, content, delete."""
    router = Router("files")

    @router.post("/v1/files")
    async def create(request: Request) -> dict[str, Any]:
        viewer = viewer_of(request)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():  # before the bytes come
            nbytes = max(0, int(declared) - FORM_BYTES)
            files.check_size(nbytes)
            await asyncio.to_thread(files.check_room, viewer.name, nbytes)
        unfinished = await asyncio.to_thread(files.begin)
        try:
            fields, filename = await read_upload(
                request,
                files.limits.max_file_bytes + FORM_BYTES,
                "file",
                lambda: unfinished.file,
            )
            body = FileBody.of(fields)
            file = await asyncio.to_thread(
                files.adopt,
                unfinished,
                viewer.name,
                Purpose(body.purpose),
                check_filename(filename),
                expires_after_s=body.expires_after,
            )
        finally:
            await asyncio.to_thread(unfinished.discard)
        return file_document(file)

    @router.get("/v1/files")
    async def list_files(request: Request) -> dict[str, Any]:
        query = FileListQuery.of(query_fields(request))
        found, has_more = await asyncio.to_thread(
            files.list,
            viewer_of(request),
            limit=query.limit,
            after=query.after,
            order=query.order,
            purpose=query.purpose,
        )
        return {
            "object": "list",
            "data": [file_document(file) for file in found],
            # Texts in OpenAI's contract, also where there is none.
            "first_id": found[0].id if found else "",
            "last_id": found[-1].id if found else "",
            "has_more": has_more,
        }

    @router.get("/v1/files/{file_id}")
    async def retrieve(file_id: str, request: Request) -> dict[str, Any]:
        return file_document(await asyncio.to_thread(files.get, viewer_of(request), file_id))

    @router.route("/v1/files/{file_id}/content", "GET", "HEAD")
    async def content(file_id: str, request: Request) -> Response:
        file = await asyncio.to_thread(files.get, viewer_of(request), file_id)
        return FileAnswer(
            files.path(file),
            # Never the type of what was uploaded: a browser would run its scripts as this server's.
            media_type=_MEDIA_TYPES.get(file.purpose, "application/octet-stream"),
            filename=file.filename,
            headers={"cache-control": "private", "x-content-type-options": "nosniff"},
        )

    @router.delete("/v1/files/{file_id}")
    async def delete(file_id: str, request: Request) -> dict[str, Any]:
        await asyncio.to_thread(files.delete, viewer_of(request), file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def check_filename(name: str, param: str = "file") -> str:
    """The name of an uploaded file without folders. The field `param` gave it.

    Raises:
        InvalidRequest: it has none, or one that is too long.

    """
    name = name.replace("\\", "/").rpartition("/")[2]
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        rule = f"the file needs a name of at most {MAX_NAME_CHARS} printable characters."
        raise InvalidRequest(f"{param}: {rule}", param=param)
    return name
