"""OpenAI's Batch API."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from engine.units import parse_duration
from server.batches.batches import Batches
from server.forms import query_fields, read_json
from server.keys.access import access_of
from server.router import Router
from server.schemas.batches import BatchBody, BatchListQuery, batch_document
from server.settings import ServerSettings
from server.stored_files.record import viewer_of


def batches_router(batches: Batches, settings: ServerSettings) -> Router:
    """`/v1/batches`: create, list, retrieve, cancel."""
    router = Router("batches")

    @router.post("/v1/batches")
    async def create(request: Request) -> dict[str, Any]:
        body = BatchBody.of(await read_json(request, settings.max_body_bytes))
        batch = await batches.create(
            viewer_of(request),
            access_of(request),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            window_s=parse_duration(body.completion_window),
            metadata=body.metadata,
            output_expires_s=body.output_expires_after,
        )
        return batch_document(batch)

    @router.get("/v1/batches")
    async def list_batches(request: Request) -> dict[str, Any]:
        query = BatchListQuery.of(query_fields(request))
        found, has_more = await batches.list(
            viewer_of(request), limit=query.limit, after=query.after
        )
        document: dict[str, Any] = {
            "object": "list",
            "data": [batch_document(batch) for batch in found],
            "has_more": has_more,
        }
        if found:
            document |= {"first_id": found[0].id, "last_id": found[-1].id}
        return document

    @router.get("/v1/batches/{batch_id}")
    async def retrieve(batch_id: str, request: Request) -> dict[str, Any]:
        return batch_document(await batches.get(viewer_of(request), batch_id))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
        return batch_document(await batches.cancel(viewer_of(request), batch_id))

    return router
