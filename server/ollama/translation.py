"""Ollama's requests, as those of the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from engine.requests import SchedulingOptions, TextOperation, TextRequest
from server.ollama.abilities import Abilities, refuse
from server.ollama.messages import openai_messages, with_images
from server.ollama.sampling import client_names, sampling_fields
from server.schemas.ollama import (
    AnswerBody,
    OllamaChatBody,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaGenerateBody,
)

CHAT_LIMIT = "max_completion_tokens"
COMPLETION_LIMIT = "max_tokens"
_HEAD = re.compile(r"\w+")
_PICTURE = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\]\.image_url")
"""The pictures of a message are its first parts."""


@dataclass(frozen=True, slots=True)
class Translated:
    """The request for the engine, and the client's names of its fields."""

    request: TextRequest
    names: Mapping[str, str]

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The error, with the name of the field that the client sent."""
        error = _of_picture(error, self.names.get("messages") != "messages")
        head = _HEAD.match(error.param or "")
        name = self.names.get(head[0]) if head else None
        if head is None or name is None or error.param is None:
            return error
        other = error.reworded(re.sub(rf"\b{head[0]}\b", name, error.message, count=1))
        other.param = name + error.param[head.end() :]
        return other


def _of_picture(error: InvalidRequest, prompt: bool) -> InvalidRequest:
    """The error with the place of a picture in Ollama's `images`, if it names one."""
    match = _PICTURE.match(error.param or "")
    if match is None:
        return error
    name = f"images[{match[2]}]" if prompt else f"messages[{match[1]}].images[{match[2]}]"
    other = error.reworded(error.message.replace(match[0], name))
    other.param = name
    return other


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose request it is, and how it is scheduled."""

    request_id: str
    scheduling: SchedulingOptions


def chat_request(body: OllamaChatBody, abilities: Abilities, sender: Sender) -> Translated:
    """The request for `POST /api/chat`.

    Raises:
        InvalidRequest: naming what the model or this server cannot do.

    """
    for index, message in enumerate(body.messages):
        if message.images and abilities.vision is False:
            raise refuse(body.model, "images", f"messages[{index}].images")
    if body.tools and abilities.tools is False:
        raise refuse(body.model, "tools", "tools")
    fields: dict[str, Any] = {"messages": openai_messages(body.messages)}
    if body.tools:
        fields["tools"] = [{"type": "function", **tool} for tool in body.tools]
    last = body.messages[-1]
    if abilities.continues and last.role == "assistant" and last.content and not last.tool_calls:
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    return _conversation(body, fields, abilities, sender, {"messages": "messages"})


def generate_request(body: OllamaGenerateBody, abilities: Abilities, sender: Sender) -> Translated:
    """The request for `POST /api/generate`: a chat, or a completion if it is raw.

    Raises:
        InvalidRequest: naming what the model or this server cannot do.

    """
    if body.suffix:
        raise refuse(body.model, "insert", "suffix")
    if body.template:
        raise InvalidRequest("The template is the model's own.", param="template")
    if body.context:
        raise InvalidRequest("Send the conversation to /api/chat.", param="context")
    if body.images and (body.raw or abilities.vision is False):
        raise refuse(body.model, "images", "images")
    if body.raw and body.system:
        raise InvalidRequest("A raw prompt has no system message.", param="system")
    if body.raw or abilities.template is False:
        if body.think and not body.raw:
            raise refuse(body.model, "thinking", "think")
        return _completion(body, abilities, sender)
    content: Any = body.prompt
    if body.images:
        content = with_images(content, body.images, "images")
    messages = [{"role": "user", "content": content}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    return _conversation(body, {"messages": messages}, abilities, sender, {"messages": "prompt"})


def embed_request(body: OllamaEmbedBody, sender: Sender) -> Translated:
    """The request for `POST /api/embed`."""
    fields: dict[str, Any] = {"input": body.input}
    if body.truncate:
        fields["truncate_prompt_tokens"] = -1
    if body.dimensions is not None:
        fields["dimensions"] = body.dimensions
    names = {"truncate_prompt_tokens": "truncate"}
    return _translated(body.model, TextOperation.EMBEDDINGS, fields, sender, names)


def embeddings_request(body: OllamaEmbeddingsBody, sender: Sender) -> Translated:
    """The request for `POST /api/embeddings`."""
    fields = {"input": [body.prompt], "truncate_prompt_tokens": -1}
    return _translated(body.model, TextOperation.EMBEDDINGS, fields, sender, {"input": "prompt"})


def _conversation(
    body: AnswerBody,
    fields: dict[str, Any],
    abilities: Abilities,
    sender: Sender,
    names: dict[str, str],
) -> Translated:
    _check_not_cut(body)
    fields |= sampling_fields(body.options, CHAT_LIMIT, abilities.context)
    if body.think and abilities.thinking is False:
        raise refuse(body.model, "thinking", "think")
    if body.think is True:
        fields["chat_template_kwargs"] = {"enable_thinking": True}
    elif body.think is not None and abilities.thinking is not False:
        fields["reasoning_effort"] = body.think or "none"
    fields |= _format(body)
    if body.logprobs or body.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    # A whole answer is collected from a stream too, as that has the time of the first token. Calls
    # of tools are found more surely in a whole text.
    if body.stream or "tools" not in fields:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    names |= client_names(CHAT_LIMIT)
    names |= {"chat_template_kwargs": "think", "reasoning_effort": "think"}
    names["response_format"] = "format"
    return _translated(body.model, TextOperation.CHAT, fields, sender, names)


def _completion(body: OllamaGenerateBody, abilities: Abilities, sender: Sender) -> Translated:
    _check_not_cut(body)
    prompt = f"{body.system}\n\n{body.prompt}" if body.system else body.prompt
    # Null: as much as the context holds. OpenAI's default is 16.
    fields: dict[str, Any] = {"prompt": prompt, COMPLETION_LIMIT: None}
    fields |= sampling_fields(body.options, COMPLETION_LIMIT, abilities.context)
    fields |= _format(body)
    if body.logprobs or body.top_logprobs:
        fields["logprobs"] = body.top_logprobs
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    names = {**client_names(COMPLETION_LIMIT), "response_format": "format"}
    return _translated(body.model, TextOperation.COMPLETION, fields, sender, names)


def _check_not_cut(body: AnswerBody) -> None:
    for name in ("truncate", "shift"):
        if getattr(body, name):
            raise InvalidRequest("This server cuts no conversation.", param=name)


def _format(body: AnswerBody) -> dict[str, Any]:
    if not body.format:
        return {}
    if isinstance(body.format, str):
        return {"response_format": {"type": "json_object"}}
    schema = {"name": "format", "schema": body.format}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _translated(
    model: str,
    operation: TextOperation,
    fields: dict[str, Any],
    sender: Sender,
    names: Mapping[str, str],
) -> Translated:
    request = TextRequest(
        model=model,
        operation=operation,
        body={"model": model, **fields},
        request_id=sender.request_id,
        scheduling=sender.scheduling,
    )
    return Translated(request, names)
