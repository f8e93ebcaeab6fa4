"""A client's document, made into one that vLLM's schemas take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.chat_messages import check_messages
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.pooling_body import pooling_body
from engine.runtimes.vllm.refusals import invalid
from engine.runtimes.vllm.request_fields import check_fields
from engine.runtimes.vllm.tool_choice import narrow_to_allowed

RESPONSES = frozenset({TextOperation.RESPONSES, TextOperation.INPUT_TOKENS})
MAY_CALL = RESPONSES | {TextOperation.CHAT, TextOperation.MESSAGES}
CHATS = frozenset({TextOperation.CHAT, TextOperation.TOKENIZE})
WITHOUT_RUN = frozenset(
    {
        TextOperation.COUNT_TOKENS,
        TextOperation.INPUT_TOKENS,
        TextOperation.TOKENIZE,
        TextOperation.DETOKENIZE,
    }
)
"""Operations of the tokenizer alone, which is the same with any LoRA."""
LAZY = ("content", "tool_calls")
"""Parts of a message that pydantic checks when they are read."""
NO_CALLS = ("none", {"type": "none"})


def schema_fields(schema: Any) -> frozenset[str]:
    """The fields of a schema, or of all models of a union, with their aliases."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        fields = schema.model_fields
        return frozenset(fields) | {each.alias for each in fields.values() if each.alias}
    return frozenset().union(*(schema_fields(each) for each in get_args(schema)))


def number_fields(schema: Any) -> frozenset[str]:
    """The fields of a schema, or of all models of a union, that are numbers and never booleans.

    pydantic takes `true` for 1.
    """
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        kinds = {name: _kinds(each.annotation) for name, each in schema.model_fields.items()}
        return frozenset(
            name for name, own in kinds.items() if own & {int, float} and bool not in own
        )
    return frozenset().union(*(number_fields(each) for each in get_args(schema)))


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation offers, without those inside lists and maps."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}


def check_numbers(body: Mapping[str, Any], numbers: frozenset[str]) -> None:
    """Refuse `true` and `false` in the fields that are `numbers`.

    Raises:
        InvalidRequest: naming the field.

    """
    for name in numbers:
        if isinstance(body.get(name), bool):
            raise InvalidRequest(f"{name}: it is a number, not true or false.", param=name)


def prepared_body(
    request: TextRequest, model: ModelConfig, known: frozenset[str]
) -> dict[str, Any]:
    """The body for vLLM's schema, whose fields are `known`.

    Raises:
        InvalidRequest: naming a field that is not served, or that this model cannot serve.

    """
    options = model.options_as(VllmOptions)
    body = pooling_body(request.operation, request.body)
    body = check_fields(request.operation, body, known)
    body["model"] = model.id
    if request.adapter is not None and request.operation not in WITHOUT_RUN:
        body["model"] = f"{model.id}:{request.adapter}"
    narrow_to_allowed(body)
    if not isinstance(body.get("messages", []), list):
        raise InvalidRequest("messages: it is a list.", param="messages")
    if not isinstance(body.get("tools"), list | None):
        raise InvalidRequest("tools: it is a list.", param="tools")
    if body.get("truncation", "") is None:
        del body["truncation"]  # OpenAI has it as null, and vLLM's own answer does not
    if request.operation in CHATS:
        check_messages(body.get("messages"))
    chooses = request.operation in MAY_CALL and body.get("tool_choice") not in NO_CALLS
    if chooses and body.get("tools") and options.tool_call_parser is None:
        raise _without("tools", model, "tool_call_parser")
    budget = body.get("thinking_token_budget")
    if budget is not None and options.reasoning_parser is None:
        raise _without("thinking_token_budget", model, "reasoning_parser")
    if request.operation in RESPONSES and isinstance(body.get("input"), list):
        kept = _readable(body["input"][: request.history])
        body["input"] = [_with_type(item) for item in (*kept, *body["input"][request.history :])]
    return body


def settle_messages(payload: Any, body: Mapping[str, Any]) -> None:
    """Check the parts of a chat's messages, which pydantic would check when vLLM reads them.

    Raises:
        InvalidRequest: naming the part.

    """
    for index, message in enumerate(getattr(payload, "messages", None) or ()):
        for key in LAZY:
            value = message.get(key) if isinstance(message, dict) else None
            if value is None or isinstance(value, str | list):
                continue
            try:
                message[key] = list(value)
            except ValidationError as error:
                sent = body["messages"][index][key]
                raise invalid(error, sent, ("messages", index, key)) from error


def lazily_read(error: ValidationError, body: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where an error stands that one of vLLM's validators met while it read a message's part."""
    found = error.errors()
    if not found[0]["loc"] or not isinstance(found[0]["loc"][0], int):
        return ()  # a path from the body's own fields
    wrong = [each["input"] for each in found]
    wrong = [each for each in wrong if isinstance(each, Mapping | list)] or wrong
    for index, message in enumerate(body.get("messages") or ()):
        for key in LAZY:
            sent = message.get(key) if isinstance(message, Mapping) else None
            if isinstance(sent, list) and any(_holds(sent, each) for each in wrong):
                return ("messages", index, key)
    return ()


def _holds(value: Any, wanted: Any) -> bool:
    below = value.values() if isinstance(value, Mapping) else value
    if value is wanted or not isinstance(value, Mapping | list):
        return value is wanted
    return any(_holds(each, wanted) for each in below)


def _readable(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Items of earlier turns without what their provider encrypted, which no model here reads."""
    found: list[Mapping[str, Any]] = []
    for item in items:
        if item.get("type") == "reasoning" and item.get("encrypted_content"):
            if not (item.get("content") or item.get("summary")):
                continue
            item = {name: each for name, each in item.items() if name != "encrypted_content"}
        found.append(item)
    return found


def _with_type(item: Any) -> Any:
    """An item of the Responses API with the type that it may leave out.

    vLLM takes the assistant's own text only with it. Clients send it back without.
    """
    if isinstance(item, Mapping) and item.get("role") == "assistant" and "type" not in item:
        return {**item, "type": "message"}
    return item


def _without(param: str, model: ModelConfig, option: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}: the model {model.id!r} has no '{option}' in its options.", param=param
    )
