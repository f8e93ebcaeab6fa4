"""One request to `/v1/responses`: what came before it, what the model gets, and what is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineError, InvalidRequest, NotFound, Overloaded
from server.errors import Failure
from server.responses.errors import (
    ConversationLocked,
    PreviousResponseNotFound,
    no_conversation,
    no_item,
)
from server.responses.fields import ECHOED, OURS, KeepingFields, input_of, keeping_fields
from server.responses.ids import RESPONSE, new_id
from server.responses.items import (
    REFERENCE,
    Item,
    check_answered,
    expanded,
    for_model,
    kept_item,
    kind_of,
)
from server.responses.keeper import Keeper
from server.responses.records import COMPLETED, FAILED, INCOMPLETE, Kept
from server.responses.store import ResponseStore, is_unfinished

VALUE_OR_NOTHING = ("prompt", "text", "usage", "user")
"""Fields that the contract does not have as null."""

TOOL_NULLS = ("parameters", "strict")
"""Fields of a tool that the contract demands, and has as null."""

SPOKEN = (COMPLETED, INCOMPLETE)
"""A response of such a status is a turn of its conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn that was checked and begins."""

    id: str
    owner: str
    created_at: int
    fields: KeepingFields
    keeps: bool
    """Whether the response is kept."""
    thread: str
    seen: int
    """The last item of the conversation at this moment."""
    inputs: list[Item]
    """The items of the turn itself, as they are kept."""
    history: int
    """How many items of the model's input come from earlier turns."""
    body: dict[str, Any]
    """What the model gets."""
    echo: dict[str, Any] = field(default_factory=dict)
    """What every document of the response says."""

    def settled(self, document: Mapping[str, Any], *, stored: bool | None = None) -> dict[str, Any]:
        """A document of the response as its client gets it, with all fields that OpenAI requires.

        `stored` is False if it could not be kept, though it should be.
        """
        settled = {
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "status": COMPLETED,  # some providers leave it out
            **document,
        }
        settled |= self.echo
        settled["store"] = self.keeps if stored is None else stored
        for name in VALUE_OR_NOTHING:
            if settled.get(name) is None:
                settled.pop(name, None)
        settled.setdefault("text", {"format": {"type": "text"}})
        settled["tools"] = [_without_nulls(each, TOOL_NULLS) for each in settled.get("tools") or ()]
        settled["output"] = [answered_item(each) for each in settled.get("output") or ()]
        if settled.get("status") == COMPLETED:
            settled.setdefault("completed_at", int(time.time()))
        return settled

    def bare(self, status: str) -> dict[str, Any]:
        """The document of a response without an answer of the model."""
        body = self.body
        choice = body.get("tool_choice")
        return self.settled(
            {
                "object": "response",
                "status": status,
                "model": body.get("model"),
                "output": [],
                "instructions": body.get("instructions"),
                "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
                "temperature": body.get("temperature"),
                "top_p": body.get("top_p"),
                "tool_choice": "auto" if choice is None else choice,
                "tools": body.get("tools") or [],
                "max_output_tokens": body.get("max_output_tokens"),
                "reasoning": body.get("reasoning"),
                "text": body.get("text"),
                "truncation": body.get("truncation") or "disabled",
            }
        )

    def failed(self, error: Exception) -> dict[str, Any]:
        """The document of a response that an error ended."""
        code = "server_error"
        if isinstance(error, InvalidRequest):
            code = "invalid_prompt"
        elif isinstance(error, Overloaded):
            code = "rate_limit_exceeded"
        message = Failure.of(error).message
        return {**self.bare(FAILED), "error": {"code": code, "message": message}}

    def kept(self, document: Mapping[str, Any], job: dict[str, Any] | None = None) -> Kept:
        """The record of the response whose document this is."""
        return Kept(
            id=self.id,
            owner=self.owner,
            thread=self.thread,
            document={name: each for name, each in document.items() if name != "output"},
            created_at=self.created_at,
            previous=self.fields.previous,
            conversation=self.fields.conversation,
            seen=self.seen,
            background=self.fields.background,
            job=job,
        )

    def own_error(self, error: EngineError) -> EngineError:
        """The error of a model, with the place of an item in the client's own input."""
        if not self.history or error.param is None or not error.param.startswith("input["):
            return error
        number, bracket, rest = error.param.removeprefix("input[").partition("]")
        if not bracket or not number.isdecimal() or int(number) < self.history:
            return error
        param = f"input[{int(number) - self.history}]{rest}"
        own = error.reworded(error.message.replace(error.param, param))
        own.param = param
        return own


class Turns:
    """Begins the turns of all callers. Two turns of one conversation never run at once."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._busy: set[str] = set()
        """The conversations whose turn runs."""

    async def begin(self, body: Mapping[str, Any], owner: str, reader: str | None) -> Turn:
        """Check a request, and put what came before it in front of its input.

        The turn holds its conversation until `release`. `reader` is whose turns the caller may go
        on from; None: everybody's.

        Raises:
            InvalidRequest: naming the wrong field.
            NotFound: there is no such conversation, or no such item.
            Overloaded: nothing is kept at this moment, though the request needs it.

        """
        fields = keeping_fields(body)
        given = input_of(body)
        conversation = fields.conversation
        if conversation is not None:
            if conversation in self._busy:
                # The same for everybody: only a caller who may see it gets so far.
                await self._find_conversation(conversation, reader)
                raise ConversationLocked
            self._busy.add(conversation)
        try:
            return await self._begin(body, fields, given, owner, reader)
        except BaseException:
            self._free(conversation)
            raise

    def release(self, turn: Turn) -> None:
        """Let the next turn of the conversation begin."""
        self._free(turn.fields.conversation)

    def hold(self, conversation: str | None) -> None:
        """Hold the conversation of a turn that began before a restart."""
        if conversation is not None:
            self._busy.add(conversation)

    async def _begin(
        self,
        body: Mapping[str, Any],
        fields: KeepingFields,
        given: list[Any],
        owner: str,
        reader: str | None,
    ) -> Turn:
        response_id = new_id(RESPONSE)
        thread, seen = response_id, 0
        history: list[Item] = []
        if fields.previous is not None:
            previous, history = await self._previous(fields.previous, reader)
            thread, owner = previous.thread, previous.owner
        elif fields.conversation is not None:
            found = await self._find_conversation(fields.conversation, reader)
            thread = fields.conversation
            history, seen, owner = found
        given = await self._resolved(given, reader)
        earlier = for_model(history)
        check_answered(earlier, given)
        own = [expanded(item) for item in given]
        model_body = {name: value for name, value in body.items() if name not in OURS}
        if earlier or isinstance(body.get("input"), list):
            model_body["input"] = [*earlier, *own]
        keeps = fields.store and self.keeper.opened
        if fields.background and not keeps:
            raise Overloaded("Responses are not kept at this moment.", retry_after_s=5.0)
        if "store" in body or keeps:
            # The provider of a remote model need not keep what this server keeps.
            model_body["store"] = False
        created_at = int(time.time())
        return Turn(
            id=response_id,
            owner=owner,
            created_at=created_at,
            fields=fields,
            keeps=keeps,
            thread=thread,
            seen=seen,
            inputs=[kept_item(item) for item in given if isinstance(item, Mapping)],
            history=len(earlier),
            body=model_body,
            echo={
                **{name: body[name] for name in ECHOED if body.get(name) is not None},
                "id": response_id,
                "created_at": created_at,
                "metadata": fields.metadata,
                "background": fields.background,
                "previous_response_id": fields.previous,
                "conversation": fields.conversation and {"id": fields.conversation},
            },
        )

    async def _previous(self, response_id: str, reader: str | None) -> tuple[Kept, list[Item]]:
        try:
            previous = await self.keeper.read(ResponseStore.response, response_id, reader)
        except NotFound:
            raise PreviousResponseNotFound(response_id) from None
        if is_unfinished(previous):
            raise InvalidRequest(
                f"The previous response is still {previous.status}. Wait until it has ended.",
                param="previous_response_id",
            )
        return previous, await self.keeper.read(ResponseStore.context, response_id)

    async def _find_conversation(
        self, conversation_id: str, reader: str | None
    ) -> tuple[list[Item], int, str]:
        try:
            found, items, seen = await self.keeper.read(
                ResponseStore.members, conversation_id, reader
            )
        except NotFound:
            raise no_conversation(conversation_id, "conversation") from None
        return items, seen, found.owner

    async def _resolved(self, given: list[Any], reader: str | None) -> list[Any]:
        """The items, each reference replaced by the item that it names."""
        named = {
            index: item.get("id") for index, item in enumerate(given) if kind_of(item) == REFERENCE
        }
        if not named:
            return given
        for index, item_id in named.items():
            if not isinstance(item_id, str):
                param = f"input[{index}].id"
                raise InvalidRequest(f"{param}: it is the id of an item.", param=param)
        ids = [str(item_id) for item_id in named.values()]
        found = await self.keeper.read(ResponseStore.find_items, ids, reader)
        for index, item_id in named.items():
            if item_id not in found:
                raise no_item(str(item_id), f"input[{index}].id")
        resolved: list[Any] = []
        for index, item in enumerate(given):
            resolved += for_model([found[str(named[index])]]) if index in named else [item]
        return resolved

    def _free(self, conversation: str | None) -> None:
        if conversation is not None:
            self._busy.discard(conversation)


def answered_item(item: Any) -> Any:
    """An item of an answer as the contract has it: a null is a field that is not there."""
    item = _without_nulls(item)
    if isinstance(item, dict) and isinstance(item.get("content"), list):
        item["content"] = [_without_nulls(part) for part in item["content"]]
        for part in item["content"]:
            if isinstance(part, dict) and part.get("type") == "output_text":
                part.setdefault("logprobs", [])
    return item


def _without_nulls(value: Any, but: Sequence[str] = ()) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: each for name, each in value.items() if each is not None or name in but}


def outputs_of(document: Mapping[str, Any]) -> list[Item]:
    """The output of a response as items that are kept."""
    output = document.get("output")
    items: Sequence[Any] = output if isinstance(output, list) else ()
    return [kept_output(item) for item in items if isinstance(item, Mapping)]


def kept_output(item: Mapping[str, Any]) -> Item:
    """An item of an answer as it is kept: as it came, with an id."""
    return {**item, "id": item.get("id") or kept_item(item)["id"]}


def is_spoken(document: Mapping[str, Any]) -> bool:
    """Whether the response has become a turn of its conversation."""
    return document.get("status") in SPOKEN
