"""OpenAI's Responses API: answers that are kept, and turns that go on from them."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from starlette.types import Send

from engine.errors import EngineError, InvalidRequest, RuntimeFailed
from engine.events import Document, Event
from engine.requests import Priority, SchedulingOptions, TextOperation, TextRequest
from server.answer import stream_answer, whole_answer
from server.connection import ConnectedResponse
from server.file_search.file_search import FileSearch
from server.file_search.tool import refuse_hosted
from server.forms import Fields, read_json
from server.keys.access import access_of
from server.media import check_media_urls
from server.pictures import Pictures
from server.response_cache.cache import ResponseCache, cached
from server.responses.background import Background
from server.responses.compaction import TASK, compaction_item
from server.responses.exchange import Answer, Exchange
from server.responses.file_searches import RESULTS, shown, shown_output
from server.responses.ids import RESPONSE, new_id
from server.responses.records import Page
from server.responses.store import ResponseStore
from server.responses.turn import Turn, Turns
from server.router import Router, json_response
from server.routes.text import RESPONSES_PATH, events_of, read_text_request
from server.schemas.fields import model_name
from server.schemas.responses import CompactBody, ItemsQuery, ResponseQuery, query_with_include
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine


def reader_of(request: Request) -> str | None:
    """Whose responses and conversations the sender may see: its own, and an admin everybody's."""
    access = access_of(request)
    return None if access.admin else access.caller.name


def items_document(page: Page, include: Collection[str]) -> dict[str, Any]:
    """OpenAI's list of items, with what `include` names."""
    ids = [item["id"] for item in page.items]
    return {
        "object": "list",
        "data": [shown(item, with_results=RESULTS in include) for item in page.items],
        "first_id": ids[0] if ids else "",
        "last_id": ids[-1] if ids else "",
        "has_more": page.has_more,
    }


def plain_responses_router(
    engine: Engine, settings: ServerSettings, pictures: Pictures, cache: ResponseCache | None
) -> Router:
    """`POST /v1/responses` of a server that keeps nothing."""
    router = Router("text")

    @router.post(RESPONSES_PATH)
    async def responses(request: Request) -> Response:
        fields, text_request = await read_text_request(request, TextOperation.RESPONSES, settings)
        refuse_hosted(text_request.body)
        await pictures.settle(text_request)
        answer = partial(
            stream_answer,
            engine,
            text_request,
            events_of,
            shows_wait=text_request.body.get("stream") is True,
        )
        return ConnectedResponse(cached(cache, request, fields, text_request, answer))

    return router


def responses_router(
    engine: Engine,
    settings: ServerSettings,
    pictures: Pictures,
    cache: ResponseCache | None,
    turns: Turns,
    background: Background,
    file_search: FileSearch,
) -> Router:
    """Create, retrieve, cancel and delete responses; their items; token counts and summaries."""
    router = Router("responses")
    keeper = turns.keeper

    async def begin(
        request: Request, operation: TextOperation, fields: Fields, scheduling: SchedulingOptions
    ) -> tuple[Turn, TextRequest]:
        """The turn, which the caller must release, and the engine's request for it."""
        model = model_name(fields.values.get("model"))
        check_media_urls(fields.values, settings.allowed_media_hosts)
        hosted = await file_search.check(fields.values, access_of(request))
        turn = await turns.begin(fields.values, scheduling.caller.name, reader_of(request))
        if hosted is not None:
            turn = hosted.offered(turn)
        text_request = TextRequest(
            model=model,
            operation=operation,
            body=turn.body,
            request_id=request.state.request_id,
            scheduling=scheduling,
            history=turn.history,
        )
        try:
            # Also what was kept: the hosts that are allowed now count.
            check_media_urls(turn.body, settings.allowed_media_hosts)
            await pictures.settle(text_request)
        except EngineError as error:
            turns.release(turn)
            raise turn.own_error(error) from error
        except BaseException:
            turns.release(turn)
            raise
        return turn, text_request

    @router.post(RESPONSES_PATH)
    async def create(request: Request) -> Response:
        fields = await read_json(request, settings.max_body_bytes)
        in_background = fields.values.get("background") is True
        default = Priority.BATCH if in_background else Priority.NORMAL
        scheduling = take_scheduling_options(request, fields, default)
        turn, text_request = await begin(request, TextOperation.RESPONSES, fields, scheduling)
        streams = turn.body.get("stream") is True
        if turn.fields.background:
            document = await background.submit(turn, text_request)
            if not streams:
                return json_response(document)
            return ConnectedResponse(partial(send_events, turn.id, reader_of(request), None))

        def ask(asked: TextRequest) -> Answer:
            once = partial(stream_answer, engine, asked, events_of, shows_wait=streams)
            return cached(cache, request, Fields(dict(asked.body), fields.typed), asked, once)

        try:
            answer = file_search.answer(turn, text_request, ask, access_of(request))
        except BaseException:
            turns.release(turn)
            raise
        return ConnectedResponse(Exchange(turns, turn, answer).run)

    async def send_events(
        response_id: str, reader: str | None, after: int | None, send: Send
    ) -> None:
        await background.send_events(response_id, reader, after, send)

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(request: Request) -> Response:
        fields = await read_json(request, settings.max_body_bytes)
        _refuse(fields, ("background", "store", "stream"))
        scheduling = take_scheduling_options(request, fields)
        turn, text_request = await begin(request, TextOperation.INPUT_TOKENS, fields, scheduling)
        turns.release(turn)  # it adds nothing
        body = {name: value for name, value in turn.body.items() if name != "store"}
        answer = partial(
            stream_answer, engine, replace(text_request, body=body), events_of, shows_wait=False
        )
        return ConnectedResponse(answer)

    @router.post("/v1/responses/compact")
    async def compact(request: Request) -> Response:
        fields = await read_json(request, settings.max_body_bytes)
        scheduling = take_scheduling_options(request, fields)
        asked = CompactBody.of(fields)
        values = {"model": asked.model, "input": asked.input, "store": False}
        if asked.previous_response_id is not None:
            values["previous_response_id"] = asked.previous_response_id
        turn, text_request = await begin(
            request, TextOperation.RESPONSES, Fields(values, typed=True), scheduling
        )
        items = turn.body["input"] or []
        if isinstance(items, str):
            items = [{"type": "message", "role": "user", "content": items}]
        if not items:
            raise InvalidRequest("input: there is nothing to summarise.", param="input")
        task = {"type": "message", "role": "user", "content": TASK}
        body = {**turn.body, "input": [*items, task]}
        if asked.instructions is not None:
            body["instructions"] = asked.instructions
        text_request = replace(text_request, body=body)
        kept = [*await _earlier(asked.previous_response_id), *turn.inputs]
        said = [each for each in kept if each.get("role") == "user"]

        async def answer(_send: Send) -> Response:
            return await whole_answer(engine, text_request, partial(_compacted, said))

        return ConnectedResponse(answer)

    async def _earlier(response_id: str | None) -> list[dict[str, Any]]:
        if response_id is None:
            return []
        return await keeper.read(ResponseStore.context, response_id)

    @router.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, request: Request) -> Response:
        query = ResponseQuery.of(query_with_include(request))
        reader = reader_of(request)
        if query.stream:
            return ConnectedResponse(
                partial(send_events, response_id, reader, query.starting_after)
            )
        if query.starting_after is not None:
            raise InvalidRequest("starting_after: it needs 'stream'.", param="starting_after")
        document = await keeper.read(ResponseStore.document, response_id, reader)
        return json_response(shown_output(document, with_results=RESULTS in query.include))

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> dict[str, Any]:
        await background.delete(response_id, reader_of(request))
        return {"id": response_id, "object": "response.deleted", "deleted": True}

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, request: Request) -> dict[str, Any]:
        document = await background.cancel(response_id, reader_of(request))
        return shown_output(document, with_results=False)

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(response_id: str, request: Request) -> dict[str, Any]:
        query = ItemsQuery.of(query_with_include(request))
        page = await keeper.read(
            ResponseStore.input_page,
            response_id,
            reader_of(request),
            query.limit,
            query.after,
            query.order,
        )
        return items_document(page, query.include)

    return router


def _refuse(fields: Fields, names: Sequence[str]) -> None:
    for name in names:
        if name in fields.values:
            raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name)


async def _compacted(said: list[dict[str, Any]], events: Sequence[Event]) -> Response:
    """OpenAI's compaction: what the user said, and the model's summary of all."""
    document = next((event for event in events if isinstance(event, Document)), None)
    if document is None:
        raise RuntimeFailed("The model gave no summary.")
    answer = json.loads(document.body)
    summary = "".join(
        part.get("text") or ""
        for item in answer.get("output") or ()
        if item.get("type") == "message"
        for part in item.get("content") or ()
    )
    return json_response(
        {
            "id": new_id(RESPONSE),
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*said, compaction_item(summary)],
            "usage": answer.get("usage"),
        }
    )
