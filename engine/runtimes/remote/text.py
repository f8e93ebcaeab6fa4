"""Text at a provider: the body goes on as it came, and the answer comes back as it is.

What changes is the name of the model, in both directions. Token counts are read in passing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Document, Event, Frame
from engine.requests import TextOperation, TextRequest
from engine.runtimes.remote.counts import dollars, token_count
from engine.runtimes.remote.failures import garbage, of_event
from engine.runtimes.remote.options import Api, RemoteOptions
from engine.runtimes.remote.provider import Answer, Call, Provider
from engine.runtimes.remote.reply import Reply
from engine.runtimes.remote.server_events import EventReader, ServerEvent
from engine.runtimes.remote.target import Target
from engine.usage import Usage

APIS: Mapping[TextOperation, tuple[Api, str]] = {
    TextOperation.CHAT: ("chat", "/chat/completions"),
    TextOperation.COMPLETION: ("completions", "/completions"),
    TextOperation.RESPONSES: ("responses", "/responses"),
    TextOperation.INPUT_TOKENS: ("responses", "/responses/input_tokens"),
    TextOperation.EMBEDDINGS: ("embeddings", "/embeddings"),
    TextOperation.MESSAGES: ("messages", "/messages"),
    TextOperation.COUNT_TOKENS: ("messages", "/messages/count_tokens"),
    TextOperation.TOKENIZE: ("tokenize", "/tokenize"),
    TextOperation.DETOKENIZE: ("detokenize", "/detokenize"),
}
"""The option that each operation needs, and its path below the base URL."""

EMBEDS = frozenset({TextOperation.EMBEDDINGS})
ANTHROPIC = frozenset({TextOperation.MESSAGES, TextOperation.COUNT_TOKENS})
CHUNKED = frozenset({TextOperation.CHAT, TextOperation.COMPLETION})
"""Their streams end with `[DONE]`, and count tokens only if they are asked to."""
STREAMING = CHUNKED | {TextOperation.RESPONSES, TextOperation.MESSAGES}

ANSWERS = ("choices", "output", "content")
"""Where a whole answer has what was written."""

LAST_TYPES = frozenset(
    {
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.cancelled",
        "message_stop",
    }
)
"""Types of the events that end a stream of responses or messages."""

DONE = "[DONE]"
DONE_FRAME = f"data: {DONE}\n\n"

IMAGE_PARTS = frozenset({"image_url", "input_image", "image"})

CHARS_PER_TOKEN = 4
"""A rule of thumb for English. It counts until the provider's own numbers come."""


@dataclass(frozen=True, slots=True)
class TextCall:
    """A text request for a provider."""

    path: str
    body: bytes
    streams: bool
    wants_usage: bool
    """Whether the client itself asked for the chunk with the token counts."""
    input_tokens: int
    """About how many there are."""
    tokens: int
    """The same and those that the answer may have."""


def prepare_text(model: ModelConfig, request: TextRequest, options: RemoteOptions) -> TextCall:
    """The body for the provider.

    Raises:
        InvalidRequest: the provider or the model does not have what the request asks for.

    """
    api, path = APIS.get(request.operation, (None, ""))
    embeds = model.task == "embed"
    served = request.operation in EMBEDS if embeds else request.operation not in EMBEDS
    if not served or api not in options.apis:
        raise InvalidRequest(
            f"The model {model.id!r} does not support {request.operation.value}.", param="model"
        )
    body: dict[str, Any] = dict(request.body)
    if options.tools is False and body.get("tools"):
        raise InvalidRequest(f"tools: the model {model.id!r} calls no tools.", param="tools")
    if options.vision is False:
        for name in ("messages", "input"):
            if _has_image(body.get(name)):
                raise InvalidRequest(f"{name}: the model {model.id!r} sees no images.", param=name)
    if request.history:
        kept = body["input"][: request.history]
        body["input"] = [*_of_earlier_turns(kept), *body["input"][request.history :]]
    body["model"] = options.model
    streams = request.operation in STREAMING and body.get("stream") is True
    given = body.get("stream_options")
    wants_usage = isinstance(given, Mapping) and given.get("include_usage") is True
    counts = streams and request.operation in CHUNKED and options.stream_usage
    if counts and (given is None or isinstance(given, Mapping)):
        body["stream_options"] = {**(given or {}), "include_usage": True}
    content = _dumped(body)
    input_tokens = max(1, len(content) // CHARS_PER_TOKEN)
    return TextCall(
        path=path,
        body=content,
        streams=streams,
        wants_usage=wants_usage,
        input_tokens=input_tokens,
        tokens=input_tokens + _most_output(body),
    )


def _of_earlier_turns(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items that this server kept, for a provider that has stored none of them.

    A provider looks for ids of its own, and reads no thoughts but those that it encrypted.
    """
    return [
        {name: each for name, each in item.items() if name != "id" or item["type"] == "reasoning"}
        for item in items
        if item.get("type") != "reasoning" or item.get("encrypted_content")
    ]


def _most_output(body: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _has_image(node: Any) -> bool:
    # The JSON parser of the server limits the depth.
    if isinstance(node, list):
        return any(_has_image(each) for each in node)
    if isinstance(node, Mapping):
        return node.get("type") in IMAGE_PARTS or _has_image(node.get("content"))
    return False


async def run_text(
    provider: Provider, target: Target, request: TextRequest, call: TextCall, usage: Usage
) -> AsyncGenerator[Event, None]:
    """One document, or the frames of a stream.

    Raises:
        EngineError: see `Provider.answer`. A stream that breaks off raises `ProviderFailed`.

    """
    reading = _Reading(provider.name, target, request, call, usage)
    sent = Call(
        target=target,
        path=call.path,
        kind=f"{request.operation} {call.streams}",
        request_id=request.request_id,
        streams=call.streams,
        json=call.body,
        anthropic=request.operation in ANTHROPIC,
        tokens=call.tokens,
        on_left=reading.count_prompt,
    )
    async with await provider.answer(sent, reading.begin) as answer:
        if reading.document is None:
            async for text in reading.frames(answer):
                yield Frame(text)
        answer.count_tokens(usage.input_tokens + usage.output_tokens)
    if reading.document is not None:
        # The connection is free while the document is sent.
        yield Document(reading.document)


class _Reading:
    """Reads the answer to one request."""

    def __init__(
        self, provider: str, target: Target, request: TextRequest, call: TextCall, usage: Usage
    ) -> None:
        self.document: bytes | None = None
        self._provider = provider
        self._target = target
        self._operation = request.operation
        self._model = request.model
        self._call = call
        self._usage = usage
        self._begin()

    def _begin(self) -> None:
        self._events = EventReader()
        self._first: list[str] = []
        self._counted = False
        """The provider has said how many tokens there were."""
        self._finished = False
        """An event has said that the answer is complete."""
        self._done = False
        """The last event was there."""
        self._usage.input_tokens = self._usage.output_tokens = 0

    async def begin(self, reply: Reply) -> None:
        """Read the whole document, or the first event that is one.

        Comments before it are left out: they would begin a response that may still fail.
        """
        self._begin()  # an earlier attempt may have left something
        if not self._call.streams or reply.media_type == "application/json":
            document = await reply.document()
            self._check(document)
            self._count(document.get("usage"))
            self._estimate(document)
            self._rename(document)
            self.document = self._target.hide_in_answer(_dumped(document).decode()).encode()
            return
        while not self._first and not self._done:
            chunk = await reply.next()
            events = self._events.end() if chunk is None else self._take(chunk, reply.most_bytes)
            for event in events:
                if self._first or event.data is not None:
                    self._read(event)
            if chunk is None:
                break
        if not self._first:
            raise garbage(self._provider, "a stream without an event")
        self.count_prompt()

    async def frames(self, answer: Answer[None]) -> AsyncGenerator[str, None]:
        """The texts of all events, from the first on."""
        while True:
            texts, self._first = self._first, []
            for text in texts:
                yield text
            if self._done:
                await answer.reply.finish()
                return
            chunk = await answer.next()
            events = (
                self._events.end() if chunk is None else self._take(chunk, answer.reply.most_bytes)
            )
            for event in events:
                self._read(event)
            if chunk is None and not self._done:
                for text in self._first:
                    yield text
                if not self._finished:
                    raise garbage(self._provider, "a stream that ends in the middle")
                if self._operation in CHUNKED:
                    yield DONE_FRAME  # clients wait for it, and some providers forget it
                return

    def _take(self, chunk: bytes, most: int) -> list[ServerEvent]:
        events = self._events.feed(chunk)
        if self._events.held_chars > most:
            raise garbage(self._provider, f"an event of more than {most} characters")
        return events

    def _read(self, event: ServerEvent) -> None:
        """Add what is sent of an event to `_first`."""
        data = event.data
        if self._done:
            return
        if data is None:
            self._first.append(self._target.hide_in_answer(event.text()))
            return
        if data.strip() == DONE:
            self._done = True
            self._first.append(DONE_FRAME)
            return
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            raise garbage(self._provider, "an event that is not JSON") from None
        if not isinstance(document, dict):
            raise garbage(self._provider, "an event that is no JSON object")
        self._check(document)
        if self._is_extra(document):
            self._count(document.get("usage"))
            return
        changed = self._follow(document)
        # What came in escapes stays so: some readers take U+2028 for the end of a line.
        written = _dumped(document, ascii_only=data.isascii()).decode() if changed else None
        self._first.append(self._target.hide_in_answer(event.text(written)))

    def _is_extra(self, document: Mapping[str, Any]) -> bool:
        """Whether it is the chunk of token counts that only we asked for."""
        return (
            self._operation in CHUNKED
            and not self._call.wants_usage
            and document.get("choices") == []
            and isinstance(document.get("usage"), Mapping)
        )

    def _follow(self, document: dict[str, Any]) -> bool:
        """Note what an event says; whether it was changed."""
        changed = self._rename(document)
        usage = document.get("usage")
        for name in ("response", "message"):
            part = document.get(name)
            if isinstance(part, dict):
                changed = self._rename(part) or changed
                usage = usage or part.get("usage")
        if not self._counted:
            self._usage.output_tokens += 1  # about; until the provider counts
        self._count(usage)
        kind = document.get("type")
        if kind in LAST_TYPES:
            self._finished = True
            self._done = True
        choices = document.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping) and choice.get("finish_reason"):
                self._finished = True
        return changed

    def _rename(self, document: dict[str, Any]) -> bool:
        if not isinstance(document.get("model"), str) or document["model"] == self._model:
            return False
        document["model"] = self._model
        return True

    def _check(self, document: Mapping[str, Any]) -> None:
        """Raise the error that a document is, if it is one."""
        error = document.get("error")
        if document.get("type") == "error":  # the Responses API has the fields at the top
            error = error if isinstance(error, Mapping) else document
        if isinstance(error, str) and error:
            error = {"message": error}
        if isinstance(error, Mapping) and error and document.get("object") != "response":
            raise of_event(self._provider, error)

    def count_prompt(self) -> None:
        """Count about what the prompt takes, unless the provider did."""
        if self._operation in STREAMING | EMBEDS:
            self._usage.input_tokens = self._usage.input_tokens or self._call.input_tokens

    def _estimate(self, document: Mapping[str, Any]) -> None:
        """Count about what a whole answer took, where the provider did not."""
        self.count_prompt()
        if self._operation in STREAMING and not (self._counted or self._usage.output_tokens):
            answer = {name: document[name] for name in ANSWERS if document.get(name)}
            self._usage.output_tokens = len(_dumped(answer)) // CHARS_PER_TOKEN if answer else 0

    def _count(self, usage: Any) -> None:
        """Take the counts of a provider. They are those of the whole request so far."""
        if not isinstance(usage, Mapping):
            return
        cached = token_count(usage.get("cache_read_input_tokens"))
        written = token_count(usage.get("cache_creation_input_tokens"))
        given = _first_count(usage, "prompt_tokens", "input_tokens")
        if given is not None:
            # Anthropic counts what came from its cache, or went there, beside the rest.
            self._usage.input_tokens = given + (cached or 0) + (written or 0)
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        if isinstance(details, Mapping):
            cached = token_count(details.get("cached_tokens"))
        if cached is not None:
            most = cached if given is None else self._usage.input_tokens
            self._usage.cached_tokens = min(cached, most)
        output = _first_count(usage, "completion_tokens", "output_tokens")
        if output is not None:
            self._usage.output_tokens = output
            # The first event of a message counts its output as well, though there is none yet.
            self._counted = self._operation is not TextOperation.MESSAGES or output > 1
        for name in ("cost", "estimated_cost"):  # OpenRouter's and DeepInfra's, in dollars
            price = dollars(usage.get(name))
            if price is not None:
                self._usage.price = price


def _first_count(values: Mapping[str, Any], *names: str) -> int | None:
    found = (token_count(values.get(name)) for name in names)
    return next((count for count in found if count is not None), None)


def _dumped(document: Mapping[str, Any], *, ascii_only: bool = False) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a pair, which only an escape can write
        return json.dumps(document, separators=(",", ":")).encode()
