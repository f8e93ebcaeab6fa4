"""OpenAI's Conversations API: lists of items that responses go on from and add to."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from server.forms import read_json
from server.keys.access import access_of
from server.media import check_media_urls
from server.responses.fields import metadata_of
from server.responses.file_searches import RESULTS, shown
from server.responses.ids import CONVERSATION, new_id
from server.responses.items import kept_item
from server.responses.keeper import Keeper
from server.responses.records import Conversation, Page
from server.responses.store import ResponseStore
from server.router import Router
from server.routes.responses import items_document, reader_of
from server.schemas.responses import (
    ConversationBody,
    IncludeQuery,
    ItemsBody,
    ItemsQuery,
    MetadataBody,
    query_with_include,
)
from server.settings import ServerSettings


def conversation_document(conversation: Conversation) -> dict[str, Any]:
    """OpenAI's conversation."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_at,
        "metadata": conversation.metadata,
    }


def conversations_router(settings: ServerSettings, keeper: Keeper) -> Router:
    """Create, retrieve, change and delete conversations, and their items."""
    router = Router("conversations")

    @router.post("/v1/conversations")
    async def create(request: Request) -> dict[str, Any]:
        fields = await read_json(request, settings.max_body_bytes)
        check_media_urls(fields.values, settings.allowed_media_hosts)
        body = ConversationBody.of(fields)
        conversation = Conversation(
            new_id(CONVERSATION),
            access_of(request).caller.name,
            int(time.time()),
            metadata_of(fields.values),
        )
        items = [kept_item(item) for item in body.checked_items()]
        await keeper.write(ResponseStore.add_conversation, conversation, items)
        return conversation_document(conversation)

    @router.get("/v1/conversations/{conversation_id}")
    async def retrieve(conversation_id: str, request: Request) -> dict[str, Any]:
        found = await keeper.read(ResponseStore.conversation, conversation_id, reader_of(request))
        return conversation_document(found)

    @router.post("/v1/conversations/{conversation_id}")
    async def change(conversation_id: str, request: Request) -> dict[str, Any]:
        fields = await read_json(request, settings.max_body_bytes)
        MetadataBody.of(fields)
        changed = await keeper.write(
            ResponseStore.change_conversation,
            conversation_id,
            reader_of(request),
            metadata_of(fields.values),
        )
        return conversation_document(changed)

    @router.delete("/v1/conversations/{conversation_id}")
    async def delete(conversation_id: str, request: Request) -> dict[str, Any]:
        await keeper.write(ResponseStore.delete_conversation, conversation_id, reader_of(request))
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    @router.get("/v1/conversations/{conversation_id}/items")
    async def list_items(conversation_id: str, request: Request) -> dict[str, Any]:
        query = ItemsQuery.of(query_with_include(request))
        page = await keeper.read(
            ResponseStore.member_page,
            conversation_id,
            reader_of(request),
            query.limit,
            query.after,
            query.order,
        )
        return items_document(page, query.include)

    @router.post("/v1/conversations/{conversation_id}/items")
    async def add_items(conversation_id: str, request: Request) -> dict[str, Any]:
        query = IncludeQuery.of(query_with_include(request))
        fields = await read_json(request, settings.max_body_bytes)
        check_media_urls(fields.values, settings.allowed_media_hosts)
        body = ItemsBody.of(fields)
        items = [kept_item(item) for item in body.checked_items()]
        await keeper.write(ResponseStore.add_items, conversation_id, reader_of(request), items)
        return items_document(Page(items, has_more=False), query.include)

    @router.get("/v1/conversations/{conversation_id}/items/{item_id}")
    async def retrieve_item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
        query = IncludeQuery.of(query_with_include(request))
        item: dict[str, Any] = shown(
            await keeper.read(ResponseStore.member, conversation_id, item_id, reader_of(request)),
            with_results=RESULTS in query.include,
        )
        return item

    @router.delete("/v1/conversations/{conversation_id}/items/{item_id}")
    async def delete_item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
        found = await keeper.write(
            ResponseStore.delete_item, conversation_id, item_id, reader_of(request)
        )
        return conversation_document(found)

    return router
