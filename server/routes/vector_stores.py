"""OpenAI's vector stores: stores, their files, batches of files, and search."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from starlette.types import Send

from server.connection import ConnectedResponse
from server.forms import query_fields, read_json
from server.keys.access import access_of
from server.router import Router, json_response
from server.schemas.vector_stores import (
    AttributesBody,
    FileBatchBody,
    SearchBody,
    StoreFileBody,
    StoreFileListQuery,
    VectorStoreBody,
    VectorStoreChangeBody,
    VectorStoreListQuery,
    attachment_document,
    batch_document,
    content_document,
    page_document,
    search_document,
    store_document,
)
from server.settings import ServerSettings
from server.stored_files.record import viewer_of
from server.vector_stores.records import Counts, VectorStore
from server.vector_stores.stores import VectorStores

STORES = "/v1/vector_stores"
STORE = f"{STORES}/{{vector_store_id}}"
FILES = f"{STORE}/files"
BATCH = f"{STORE}/file_batches/{{batch_id}}"


def vector_stores_router(stores: VectorStores, settings: ServerSettings) -> Router:
    """All of `/v1/vector_stores`."""
    router = Router("vector stores")

    def document(store: VectorStore, counts: Counts) -> dict[str, Any]:
        return store_document(store, counts, expired=stores.is_expired(store))

    @router.post(STORES)
    async def create_store(request: Request) -> dict[str, Any]:
        body = VectorStoreBody.of(await read_json(request, settings.max_body_bytes))
        viewer = viewer_of(request)
        strategy, expires = body.chunking_strategy, body.expires_after
        store = await stores.create(
            viewer,
            access_of(request),
            name=body.name,
            description=body.description,
            metadata=body.metadata,
            expires_days=None if expires is None else expires.days,
            files=body.file_ids,
            chunking=None if strategy is None else strategy.chunking(),
        )
        return document(*await stores.get(viewer, store.id))

    @router.get(STORES)
    async def list_stores(request: Request) -> dict[str, Any]:
        query = VectorStoreListQuery.of(query_fields(request))
        found, more = await stores.page(viewer_of(request), **query.model_dump())
        return page_document([document(*each) for each in found], more=more)

    @router.get(STORE)
    async def retrieve_store(vector_store_id: str, request: Request) -> dict[str, Any]:
        return document(*await stores.get(viewer_of(request), vector_store_id))

    @router.post(STORE)
    async def update_store(vector_store_id: str, request: Request) -> dict[str, Any]:
        fields = await read_json(request, settings.max_body_bytes)
        body = VectorStoreChangeBody.of(fields)
        changes: dict[str, Any] = {}
        if body.name is not None:
            changes["name"] = body.name
        if body.metadata is not None:
            changes["metadata"] = body.metadata
        if "expires_after" in fields.values:
            expires = body.expires_after
            changes["expires_days"] = None if expires is None else expires.days
        return document(*await stores.update(viewer_of(request), vector_store_id, changes))

    @router.delete(STORE)
    async def delete_store(vector_store_id: str, request: Request) -> dict[str, Any]:
        await stores.delete(viewer_of(request), vector_store_id)
        return {"id": vector_store_id, "object": "vector_store.deleted", "deleted": True}

    @router.post(f"{STORE}/search")
    async def search_store(vector_store_id: str, request: Request) -> Response:
        body = SearchBody.of(await read_json(request, settings.max_body_bytes))
        search = body.search()

        async def answer(_send: Send) -> Response:
            results = await stores.search(
                viewer_of(request), access_of(request), vector_store_id, search
            )
            return json_response(search_document(body.query, results))

        return ConnectedResponse(answer)

    @router.post(FILES)
    async def attach_file(vector_store_id: str, request: Request) -> dict[str, Any]:
        body = StoreFileBody.of(await read_json(request, settings.max_body_bytes))
        strategy = body.chunking_strategy
        chunking = None if strategy is None else strategy.chunking()
        (attached, *_), _batch = await stores.attach(
            viewer_of(request),
            access_of(request),
            vector_store_id,
            [(body.file_id, chunking, body.attributes)],
            "file_id",
        )
        return attachment_document(attached)

    @router.get(FILES)
    async def list_store_files(vector_store_id: str, request: Request) -> dict[str, Any]:
        return await _files(vector_store_id, request)

    async def _files(store: str, request: Request, batch: str | None = None) -> dict[str, Any]:
        query = StoreFileListQuery.of(query_fields(request))
        found, more = await stores.attachments(
            viewer_of(request),
            store,
            batch=batch,
            limit=query.limit,
            after=query.after,
            before=query.before,
            order=query.order,
            status=query.filter,
        )
        return page_document([attachment_document(each) for each in found], more=more)

    @router.get(f"{FILES}/{{file_id}}")
    async def retrieve_store_file(
        vector_store_id: str, file_id: str, request: Request
    ) -> dict[str, Any]:
        return attachment_document(
            await stores.attachment(viewer_of(request), vector_store_id, file_id)
        )

    @router.post(f"{FILES}/{{file_id}}")
    async def update_store_file(
        vector_store_id: str, file_id: str, request: Request
    ) -> dict[str, Any]:
        body = AttributesBody.of(await read_json(request, settings.max_body_bytes))
        return attachment_document(
            await stores.set_attributes(
                viewer_of(request), vector_store_id, file_id, body.attributes
            )
        )

    @router.get(f"{FILES}/{{file_id}}/content")
    async def content_of_store_file(
        vector_store_id: str, file_id: str, request: Request
    ) -> dict[str, Any]:
        return content_document(await stores.content(viewer_of(request), vector_store_id, file_id))

    @router.delete(f"{FILES}/{{file_id}}")
    async def detach_file(vector_store_id: str, file_id: str, request: Request) -> dict[str, Any]:
        await stores.detach(viewer_of(request), vector_store_id, file_id)
        return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}

    @router.post(f"{STORE}/file_batches")
    async def attach_batch(vector_store_id: str, request: Request) -> dict[str, Any]:
        body = FileBatchBody.of(await read_json(request, settings.max_body_bytes))
        viewer = viewer_of(request)
        _, batch = await stores.attach(
            viewer,
            access_of(request),
            vector_store_id,
            body.wanted(),
            "file_ids" if body.files is None else "files",
            batched=True,
        )
        assert batch is not None
        return batch_document(*await stores.batch(viewer, vector_store_id, batch))

    @router.get(BATCH)
    async def retrieve_batch(
        vector_store_id: str, batch_id: str, request: Request
    ) -> dict[str, Any]:
        return batch_document(*await stores.batch(viewer_of(request), vector_store_id, batch_id))

    @router.post(f"{BATCH}/cancel")
    async def cancel_batch(vector_store_id: str, batch_id: str, request: Request) -> dict[str, Any]:
        return batch_document(
            *await stores.cancel_batch(viewer_of(request), vector_store_id, batch_id)
        )

    @router.get(f"{BATCH}/files")
    async def list_batch_files(
        vector_store_id: str, batch_id: str, request: Request
    ) -> dict[str, Any]:
        return await _files(vector_store_id, request, batch_id)

    return router
