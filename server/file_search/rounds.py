"""One response of several rounds: the model calls for a search, and is asked again with its output.

Its client sees one response. The events of all rounds are counted through, the usage is added up,
and a search is an item of its own in the place of the function call.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from starlette.responses import Response
from starlette.types import Message, Send

from engine.errors import EngineError, RuntimeFailed
from engine.requests import TextOperation, TextRequest
from engine.words import without_folders
from server.errors import Failure
from server.file_search.searcher import Searcher
from server.file_search.tool import HostedTools, free_choice, queries_of, without_function
from server.responses.exchange import Answer
from server.responses.file_searches import ERROR, FAILED, FUNCTION, KIND, shown
from server.responses.ids import new_item_id
from server.responses.items import CALLS, Item, as_items, for_model
from server.responses.records import COMPLETED
from server.responses.stream_reader import (
    ENDED,
    WHOLE,
    blocks_of,
    document_of,
    event_block,
    type_of,
)
from server.responses.turn import Turn, answered_item
from server.sse import FAILED as FAILED_MARK
from server.sse import event_frame

log = logging.getLogger(__name__)

MAX_ROUNDS = 4
"""After so many rounds with searches the model answers without the tool."""
MAX_SEARCHES = 16
"""Of one response."""

Ask: TypeAlias = Callable[[TextRequest], Answer]
"""Gives the answer of a model to a request."""

_ADDED, _DONE = "response.output_item.added", "response.output_item.done"
_ARGUMENTS = frozenset(
    {"response.function_call_arguments.delta", "response.function_call_arguments.done"}
)
_TEXT_DONE, _PART_DONE = "response.output_text.done", "response.content_part.done"


class Rounds:
    """The answer to one request that has the tool `file_search`. It is used once."""

    def __init__(
        self,
        turn: Turn,
        request: TextRequest,
        ask: Ask,
        hosted: HostedTools,
        searcher: Searcher | None,
    ) -> None:
        """Without a `searcher` every search fails: the key of the request is gone."""
        self._request = request
        self._ask = ask
        self._hosted = hosted
        self._searcher = searcher
        self.searches = turn.searches.copy()
        self._input = as_items(request.body.get("input"))
        self._body: dict[str, Any] = dict(request.body)
        self._left = min(hosted.max_calls or MAX_SEARCHES, MAX_SEARCHES)
        self.output: list[Item] = []
        """What the rounds before gave, with the passages."""
        self._usage: Any = None
        self._tools: Any = None

    async def answer(self, send: Send) -> Response | None:
        """Send the response, or return it.

        Raises:
            Exception: an error before the response began.

        """
        events = _Events(send, with_results=self._hosted.with_results)
        for number in range(MAX_ROUNDS + 1):
            if number == MAX_ROUNDS or not self._left:
                self._body = without_function(self._body)
            one = _Round(self, events)
            try:
                response = await self._ask(self._asked(number))(one.take)
            except Exception as error:
                if not events.begun:
                    raise
                await self._fail(events, error)
                return None
            if response is not None:
                document = _response_of(response)
                if document is None:
                    if not events.begun:
                        return response
                    await self._fail(events, RuntimeFailed("The model gave no response."))
                    return None
                await one.replay(document)
            elif one.document is None:
                await events.end(failed=one.failed)
                return None
            else:
                document = one.document
            searched = await self._take(document, one)
            if not searched:
                return await self._finish(document, response, events)
        raise AssertionError  # the last round has no function to call

    def _asked(self, number: int) -> TextRequest:
        if not number:
            return self._request
        # What the server has added is as little the client's as what came in earlier turns.
        return replace(self._request, body=self._body, history=len(self._body["input"]))

    async def _take(self, document: Mapping[str, Any], one: _Round) -> bool:
        """Take the output of a round and run its searches. Whether the model is asked again."""
        given = document.get("output")
        items: list[Item] = []
        ran = others = False
        calls = one.calls()
        offered = any(tool.get("name") == FUNCTION for tool in self._body.get("tools") or ())
        for item in given if isinstance(given, list) else ():
            if not is_search(item):
                others = others or item.get("type") in CALLS
                items.append(self.cited(item))
                continue
            call = next(calls, None) or await one.begin(len(items))
            runs = offered and self._left > 0 and document.get("status") == COMPLETED
            if runs:
                self._left -= 1
                ran = True
                search = await self._search(call, item, one)
            else:
                search = {**call.item, "status": "incomplete"}
            await one.events.send(
                _DONE, output_index=call.output_index, item=one.events.shown(search)
            )
            items.append(search)
        one.end(len(items))
        self.output += items
        self._usage = _sum(self._usage, document.get("usage"))
        if self._tools is None:
            self._tools = document.get("tools")
        if not ran or others:
            return False
        self._input += self.searches.for_model(for_model(items))
        choice = free_choice(self._body.get("tool_choice"))
        self._body = {**self._body, "input": [*self._input]}
        if choice is not None:
            self._body["tool_choice"] = choice
        return True

    async def _search(self, call: _Call, item: Mapping[str, Any], one: _Round) -> Item:
        try:
            queries = queries_of(json.loads(item.get("arguments") or "{}"))
        except ValueError as error:
            why = "The arguments are no JSON." if isinstance(error, json.JSONDecodeError) else error
            return {**call.item, "status": "failed", ERROR: f"{FAILED} {why}"}
        search = {**call.item, "queries": queries}
        await one.events.send_search("searching", call)
        try:
            if self._searcher is None:
                return {**search, "status": "failed", ERROR: FAILED}
            results = await self._searcher.run(self._hosted, queries)
        except EngineError as error:
            log.warning("%s: a file search failed: %s", self._request.request_id, error)
            message = without_folders(error.message)
            return {**search, "status": "failed", ERROR: f"{FAILED} {message}"}
        except Exception:
            log.exception("%s: a file search failed unexpectedly", self._request.request_id)
            return {**search, "status": "failed", ERROR: FAILED}
        await one.events.send_search("completed", call)
        return {**search, "status": "completed", "results": results}

    def cited(self, item: Item) -> Item:
        """An item of the model, with the citations of its text."""
        content = item.get("content")
        if item.get("type") != "message" or not isinstance(content, list):
            return item
        return {**item, "content": [self.cited_part(part) for part in content]}

    def cited_part(self, part: Any) -> Any:
        """A part of a message, with the citations of its text."""
        if not isinstance(part, Mapping) or part.get("type") != "output_text":
            return part
        citations = self.searches.citations(str(part.get("text") or ""))
        if not citations:
            return part
        return {**part, "annotations": [*(part.get("annotations") or ()), *citations]}

    async def _finish(
        self, document: Mapping[str, Any], response: Response | None, events: _Events
    ) -> Response | None:
        whole = {**document, "output": self.output, "usage": self._usage}
        if self._tools is not None:
            whole["tools"] = self._tools
        if events.begun:
            await events.send(f"response.{whole.get('status') or COMPLETED}", response=whole)
            await events.end()
            return None
        assert response is not None
        del response.headers["content-length"]
        return Response(json.dumps(whole).encode(), 200, dict(response.headers))

    async def _fail(self, events: _Events, error: Exception) -> None:
        expected = isinstance(error, EngineError)
        log.error("stream %s failed: %s", self._request.request_id, error, exc_info=not expected)
        text = Failure.of(error).frame(TextOperation.RESPONSES, self._request.request_id)
        await events.send_bytes(text.encode())
        await events.end(failed=True)


class _Call:
    """A search that the model asks for."""

    def __init__(self, output_index: int) -> None:
        self.output_index = output_index
        self.item: Item = {
            "id": new_item_id({"type": KIND}),
            "type": KIND,
            "status": "in_progress",
            "queries": [],
            "results": None,
        }


class _Events:
    """What the client gets: one stream, whose events are counted through."""

    def __init__(self, send: Send, *, with_results: bool) -> None:
        self._send = send
        self._with_results = with_results
        self._number = 0
        self.begun = False
        self.base = 0
        """How many items the rounds before gave."""

    async def begin(self, message: Message) -> None:
        """Send the head, unless it is sent already."""
        if not self.begun:
            self.begun = True
            await self._send(message)

    async def send(self, kind: str, **fields: Any) -> None:
        """Send an event of our own. Without a stream it sends nothing."""
        if self.begun:
            await self.send_bytes(
                event_frame({"type": kind, **self.numbered(fields)}).data.encode()
            )

    async def send_search(self, state: str, call: _Call) -> None:
        """Send how far a search is."""
        kind = f"response.{KIND}.{state}"
        await self.send(kind, output_index=call.output_index, item_id=call.item["id"])

    async def pass_on(self, block: bytes, event: dict[str, Any]) -> None:
        """Send an event of the model."""
        await self.send_bytes(event_block(block, self.numbered(event)))

    def numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        """The event with the next number."""
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return numbered

    def shown(self, item: Item) -> Any:
        """An item as the client gets it."""
        return shown(item, with_results=self._with_results)

    async def send_bytes(self, piece: bytes) -> None:
        """Send complete events or comments."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, *, failed: bool = False) -> None:
        """Complete the stream."""
        mark = {FAILED_MARK: True} if failed else {}
        await self._send({"type": "http.response.body", "body": b"", "more_body": False, **mark})


class _Round:
    """Reads the stream of one round, and passes on what the client is to see."""

    def __init__(self, rounds: Rounds, events: _Events) -> None:
        self._rounds = rounds
        self.events = events
        self.document: dict[str, Any] | None = None
        """The response as the last event has it."""
        self.failed = False
        self._calls: dict[int, _Call] = {}
        """By their place in the round."""
        self._seen = 0
        """How many items have begun."""

    def calls(self) -> Iterator[_Call]:
        """The searches that have begun, in order."""
        return iter([self._calls[index] for index in sorted(self._calls)])

    async def begin(self, index: int) -> _Call:
        """Tell the client of a search. `index` is its place in the round."""
        call = self._calls[index] = _Call(self.events.base + index)
        self._seen = max(self._seen, index + 1)
        await self.events.send(_ADDED, output_index=call.output_index, item=call.item)
        await self.events.send_search("in_progress", call)
        return call

    def end(self, count: int) -> None:
        """The round gave so many items."""
        self.events.base += max(count, self._seen)

    async def take(self, message: Message) -> None:
        """Take a message of the answer, in the place of the client."""
        if message["type"] == "http.response.start":
            await self.events.begin(message)
            return
        for block in blocks_of(message.get("body", b"")):
            await self._read(block)
        self.failed = self.failed or bool(message.get(FAILED_MARK))

    async def replay(self, document: Mapping[str, Any]) -> None:
        """Send the items of a round that came as a whole, if the client reads a stream."""
        if not self.events.begun:
            return
        for index, item in enumerate(document.get("output") or ()):
            if is_search(item):
                await self.begin(index)
                continue
            self._seen = index + 1
            place, item = self.events.base + index, answered_item(self._rounds.cited(item))
            await self.events.send(_ADDED, output_index=place, item=item)
            await self.events.send(_DONE, output_index=place, item=item)

    async def _read(self, block: bytes) -> None:
        kind = type_of(block)
        event = document_of(block)
        if event is None or kind == "error":
            await self.events.send_bytes(block)
            return
        if kind in ENDED:
            found = event.get("response")
            self.document = found if isinstance(found, dict) else None
            return
        if kind in WHOLE:
            if not self._rounds.output:
                await self.events.pass_on(block, event)
            return
        index = event.get("output_index")
        if not isinstance(index, int):
            await self.events.pass_on(block, event)
            return
        item = event.get("item")
        if kind == _ADDED and is_search(item):
            await self.begin(index)
            return
        if index in self._calls and (kind in _ARGUMENTS or kind == _DONE):
            return
        self._seen = max(self._seen, index + 1)
        event["output_index"] = self.events.base + index
        if kind == _TEXT_DONE:
            await self._cite(event)
        elif kind == _PART_DONE:
            event["part"] = self._rounds.cited_part(event.get("part"))
        elif kind == _DONE and isinstance(item, dict):
            event["item"] = self._rounds.cited(item)
        await self.events.pass_on(block, event)

    async def _cite(self, event: Mapping[str, Any]) -> None:
        citations = self._rounds.searches.citations(str(event.get("text") or ""))
        for index, citation in enumerate(citations):
            await self.events.send(
                "response.output_text.annotation.added",
                item_id=event.get("item_id"),
                output_index=event["output_index"],
                content_index=event.get("content_index", 0),
                annotation_index=index,
                annotation=citation,
            )


def is_search(item: Any) -> bool:
    """Whether an item of a model asks for a search of files."""
    return (
        isinstance(item, Mapping)
        and item.get("type") == "function_call"
        and item.get("name") == FUNCTION
    )


def _response_of(response: Response) -> dict[str, Any] | None:
    """The response that a model gave as a whole; None if it is something else."""
    if response.status_code != 200:
        return None
    try:
        document = json.loads(bytes(response.body))
    except ValueError:
        return None
    is_response = isinstance(document, dict) and document.get("object") == "response"
    return document if is_response else None


def _sum(one: Any, other: Any) -> Any:
    """The counts of two rounds, added up."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = dict.fromkeys((*one, *other))
        return {name: _sum(one.get(name), other.get(name)) for name in names}
    if _is_count(one) and _is_count(other):
        return one + other
    return one if other is None else other


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
