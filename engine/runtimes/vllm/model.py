"""A model of text that vLLM has loaded, and how it answers.

vLLM's serving classes render the answers. So tools, reasoning, structured output, logprobs,
Responses and Anthropic Messages come from the library. Nothing here imports vLLM before there is a
model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, InvalidRequest, RuntimeFailed
from engine.events import Document, Event, Frame
from engine.memory.block import Block
from engine.requests import TextOperation, TextRequest
from engine.runtimes.base import LoadedModel, Prepared
from engine.runtimes.common.torch_errors import torch_error
from engine.runtimes.vllm.body import WITHOUT_RUN
from engine.runtimes.vllm.fill_mask import MaskFiller
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.pooling_answers import moderation_document, rerank_document
from engine.runtimes.vllm.pooling_body import DOCUMENTS, LIMITS, QUERIES, check_format
from engine.runtimes.vllm.prompts import DOCUMENT, QUERY, Prompts, prefixed
from engine.runtimes.vllm.refusals import plain, refusal
from engine.runtimes.vllm.rerank_format import RerankFormat
from engine.runtimes.vllm.stream_pace import PACE, READ_BY_PARSER
from engine.runtimes.vllm.wangchanberta import as_trained
from engine.usage import COUNTED, Usage

if TYPE_CHECKING:
    from engine.runtimes.vllm.adapters import Adapters
    from engine.runtimes.vllm.core_client import CoreClient
    from engine.runtimes.vllm.media_memory import MediaMemory
    from engine.runtimes.vllm.park import ModelMemory


SERVER_ERRORS = frozenset({"internal_error", "api_error", "overloaded_error"})
"""Types of Anthropic's errors that are not the client's."""


ERROR = '"error"'
"""In each event that is an error. Quotes inside a JSON string are escaped, so this finds keys and
whole strings only, and few events need to be parsed."""


ASKED, ASKED_OF = ("query", "queries"), ("documents", "items")
"""Fields by which a query is compared with documents. `text_1` and `text_2` have no such roles."""

_PAIRS = (*QUERIES, *DOCUMENTS)
READ: Mapping[TextOperation, Sequence[str]] = {
    TextOperation.EMBEDDINGS: ("input",),
    TextOperation.RERANK: _PAIRS,
    TextOperation.SCORE: _PAIRS,
    TextOperation.CLASSIFY: ("input",),
    TextOperation.MODERATION: ("input",),
    TextOperation.FILL_MASK: ("inputs",),
}
"""The fields with the texts that a model reads."""


class VllmModel(LoadedModel):
    """One `AsyncLLM` and the serving objects built on it."""

    def __init__(
        self,
        llm: Any,
        memory: ModelMemory,
        options: VllmOptions,
        prompts: Prompts = Prompts(),  # noqa: B008 - frozen
        rerank_format: RerankFormat | None = None,
        *,
        as_wangchanberta: bool = False,
    ) -> None:
        self.llm = llm
        self.client: CoreClient = llm.engine_core
        self.memory = memory
        self.serving: Any = None
        self.adapters: Adapters | None = None
        """None: it was loaded without room for LoRAs."""
        self.media: MediaMemory | None = None
        """None: it takes text only."""
        self.runs = 0
        """Answers under way."""
        self._options = options
        self._prompts = prompts
        self._format = rerank_format
        """Of a reranker."""
        self._as_wangchanberta = as_wangchanberta
        """Whether texts are rewritten before they are tokens."""
        self._filler: MaskFiller | None = None

    @property
    def max_concurrency(self) -> int:
        """vLLM does the batching. Requests beyond this number would only queue there."""
        return self._options.max_num_seqs

    def blocks(self) -> tuple[Block, ...]:
        """Weights and KV cache as measured at the load; the workspace as estimated."""
        return self.memory.blocks

    @property
    def takes_loras(self) -> bool:
        """Whether it was loaded with room for LoRAs."""
        return self._options.takes_loras

    @property
    def host_bytes(self) -> int:
        """Host memory of the weights' master copies, of LoRAs, and of images that are ready."""
        adapters = self.adapters.host_bytes if self.adapters else 0
        return self.memory.host_bytes + adapters + (self.media.host_bytes if self.media else 0)

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Answer through vLLM's serving class for the operation."""
        request = prepared.request
        assert isinstance(request, TextRequest)
        if parked := self.client.parked:
            raise RuntimeFailed(f"The model's blocks are parked: {', '.join(sorted(parked))}.")
        self.runs += 1
        READ_BY_PARSER.set(self._is_parsed(prepared))
        COUNTED.set(prepared.usage)
        try:
            async with self._adapter_of(request):
                payload = self._with_prompts(request, prepared.payload)
                if self._as_wangchanberta:
                    payload = await asyncio.to_thread(self._rewritten, request.operation, payload)
                answer = await self._answer(request, payload)
                if not hasattr(answer, "__aiter__"):
                    yield Document(self._document(answer, request, prepared.usage))
                    return
                PACE.streams += 1
                try:
                    async for text in self._texts(answer, request, prepared.usage):
                        if ERROR in text:
                            self._check(text, request.body)
                        yield Frame(text)
                finally:
                    PACE.streams -= 1
                    await answer.aclose()
        except EngineError:
            raise
        except Exception as error:
            raise self._translate(error, request.body) from error
        finally:
            self.runs -= 1

    def _adapter_of(self, request: TextRequest) -> AbstractAsyncContextManager[None]:
        """Keeps the LoRA that a run takes, if it takes one."""
        if request.adapter is None or request.operation in WITHOUT_RUN:
            return nullcontext()
        assert self.adapters is not None  # `prepare` knows the LoRAs of the options
        return self.adapters.held(request.adapter)

    def _texts(self, answer: Any, request: TextRequest, usage: Usage) -> AsyncIterator[str]:
        """The events of a streamed answer as texts, corrected."""
        from engine.runtimes.vllm.answers import (
            completed_chunks,
            completion_chunks,
            message_events,
            response_events,
        )

        match request.operation:
            case TextOperation.RESPONSES:
                return response_events(answer, request.body)
            case TextOperation.MESSAGES:
                return message_events(answer, usage)
            case TextOperation.COMPLETION:
                return completion_chunks(answer, usage)
            case TextOperation.CHAT if request.body.get("tools"):
                return completed_chunks(answer)
        return answer  # type: ignore[no-any-return]

    def _is_parsed(self, prepared: Prepared) -> bool:
        """Whether vLLM may look for thoughts or tool calls in the text."""
        request, payload = prepared.request, prepared.payload
        if request.operation is TextOperation.COMPLETION:
            return False
        return self._options.reasoning_parser is not None or bool(getattr(payload, "tools", None))

    async def _answer(self, request: TextRequest, payload: Any) -> Any:
        serving = self.serving
        match request.operation:
            case TextOperation.CHAT:
                return await serving.openai_serving_chat.create_chat_completion(payload)
            case TextOperation.COMPLETION:
                return await serving.openai_serving_completion.create_completion(payload)
            case TextOperation.RESPONSES:
                payload = await self._fitted(payload)
                return await serving.openai_serving_responses.create_responses(payload)
            case TextOperation.INPUT_TOKENS:
                return await self._count_input(payload)
            case TextOperation.MESSAGES:
                return await serving.anthropic_serving_messages.create_messages(payload)
            case TextOperation.COUNT_TOKENS:
                return await serving.anthropic_serving_messages.count_tokens(payload)
            case TextOperation.EMBEDDINGS:
                return await serving.serving_embedding(payload)
            case TextOperation.RERANK | TextOperation.SCORE:
                return await serving.serving_scores(payload)
            case TextOperation.CLASSIFY | TextOperation.MODERATION:
                return await serving.serving_classification(payload)
            case TextOperation.FILL_MASK:
                loras = serving.openai_serving_models.lora_requests
                return await self._mask_filler().answer(
                    payload, f"fill-mask-{request.request_id}", loras.get(payload.model)
                )
            case TextOperation.TOKENIZE:
                return await serving.serving_tokenization.create_tokenize(payload, None)
            case TextOperation.DETOKENIZE:
                self._check_tokens(payload.tokens)
                return await serving.serving_tokenization.create_detokenize(payload, None)

    async def _count_input(self, payload: Any) -> Any:
        """How many tokens the prompt of a response has: rendered, and not run."""
        rendered = await self._rendered(await self._fitted(payload))
        if not hasattr(rendered, "engine_input"):
            return rendered  # an error of vLLM's
        responses = self.serving.openai_serving_responses
        count = responses._extract_prompt_len(rendered.engine_input)
        document = {"object": "response.input_tokens", "input_tokens": count}
        return SimpleNamespace(body=json.dumps(document).encode())

    async def _fitted(self, payload: Any) -> Any:
        """The payload without its oldest items, where all are too long and `truncation` is auto.

        vLLM would cut tokens, and those of the newest item first. An output whose call is dropped
        is dropped as well.
        """
        items = payload.input
        if payload.truncation != "auto" or await self._fits(payload, items):
            return payload
        last = len(items) - 1 if isinstance(items, list) else 0
        first, fitting = min(1, last), last
        while first < fitting:
            middle = (first + fitting) // 2
            if await self._fits(payload, items[middle:]):
                fitting = middle
            else:
                first = middle + 1
        while fitting < last and _is_output(items[fitting]):
            fitting += 1
        if fitting and await self._fits(payload, items[fitting:]):
            return payload.model_copy(update={"input": items[fitting:]})
        # Not even the last item fits: an error says so.
        return payload.model_copy(update={"truncation": "disabled"})

    async def _fits(self, payload: Any, items: Any) -> bool:
        from vllm.exceptions import VLLMClientError

        update = {"input": items, "truncation": "disabled"}
        try:
            rendered = await self._rendered(payload.model_copy(update=update))
        except (ValueError, VLLMClientError):
            return False
        return hasattr(rendered, "engine_input")

    async def _rendered(self, payload: Any) -> Any:
        """The prompt of a response, or an error of vLLM's."""
        return await self.serving.openai_serving_responses.online_renderer.render_responses(
            payload,
            previous_messages=None,
            previous_response_outputs=None,
            tool_server=None,
            skip_mm_cache=True,
        )

    def _with_prompts(self, request: TextRequest, payload: Any) -> Any:
        """The payload with what this model wants before texts.

        Raises:
            InvalidRequest: the request asks for what the model has not.

        """
        match request.operation:
            case TextOperation.EMBEDDINGS:
                prompt = self._prompts.chosen(request.body)
                inputs = getattr(payload, "input", None)
                if prompt:
                    inputs = prefixed(inputs, prompt, request.body)
                    payload = payload.model_copy(update={"input": inputs})
            case TextOperation.RERANK | TextOperation.SCORE:
                payload = self._with_pair_prompts(request, payload)
        return payload

    def _rewritten(self, operation: TextOperation, payload: Any) -> Any:
        """The payload with its texts as WangchanBERTa was trained to read them."""
        mask = self._mask_filler().mask if operation is TextOperation.FILL_MASK else None
        update = {
            name: texts
            for name in READ.get(operation, ())
            if (texts := _as_trained(getattr(payload, name, None), mask)) is not None
        }
        return payload.model_copy(update=update)

    def _mask_filler(self) -> MaskFiller:
        """What fills masks, made when the first request asks for it.

        Raises:
            InvalidRequest: the model cannot.

        """
        if self._filler is None:
            filler = MaskFiller(self.llm)
            if not filler.mask:
                raise InvalidRequest("The model's tokenizer has no mask.", param="model")
            self._filler = filler
        return self._filler

    def _with_pair_prompts(self, request: TextRequest, payload: Any) -> Any:
        pair = self._format or RerankFormat()
        check_format(
            request.body,
            templated=pair.template is not None,
            takes_instruction=pair.takes_instruction,
        )
        # Longer than the context, a limit cuts nothing, and vLLM would refuse it.
        longest = self.llm.model_config.max_model_len
        update: dict[str, Any] = {name: 0 for name in LIMITS if getattr(payload, name) >= longest}
        if pair.takes_instruction and self._options.chat_template_kwargs:
            given = payload.chat_template_kwargs or {}
            update["chat_template_kwargs"] = {**self._options.chat_template_kwargs, **given}
        for names, role in ((ASKED, QUERY), (ASKED_OF, DOCUMENT)):
            prompt = "" if self._format else self._prompts.of(role)
            for name in names if prompt else ():
                if name in request.body:
                    update[name] = prefixed(getattr(payload, name), prompt, {})
        return payload.model_copy(update=update)

    def _labels(self) -> tuple[str, ...]:
        config = self.llm.model_config.hf_config
        return tuple(str(config.id2label[index]) for index in range(config.num_labels))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Refuse tokens beyond the vocabulary, which the tokenizer leaves out in silence."""
        size = len(self.serving.serving_tokenization.renderer.get_tokenizer())
        for index, token in enumerate(tokens):
            if token >= size:
                raise InvalidRequest(
                    f"tokens[{index}]: {token} is not in the vocabulary, whose last is {size - 1}.",
                    param="tokens",
                )

    def _check(self, text: str, body: Mapping[str, Any]) -> None:
        """Raise the error that an event is, if it is one: vLLM streams errors like answers.

        So a refusal fails before the first byte, and a stream that breaks ends with the error that
        a whole answer would get.
        """
        error = _streamed_error(text)
        if error is None:
            return
        code = error.get("code")
        if not isinstance(code, int):  # Anthropic's errors have a type only
            code = 500 if error.get("type") in SERVER_ERRORS else 400
        message = str(error.get("message", "The model gave an error."))
        info = SimpleNamespace(message=message, code=code, param=error.get("param"))
        raise self._refusal(SimpleNamespace(error=info), body)

    def _document(self, answer: Any, request: TextRequest, usage: Usage) -> bytes:
        from engine.runtimes.vllm.answers import complete_answer
        from vllm.entrypoints.anthropic.protocol import (
            AnthropicCountTokensResponse,
            AnthropicMessagesResponse,
        )
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        body = request.body
        if isinstance(answer, bytes):
            return answer
        if isinstance(answer, ErrorResponse):
            raise self._refusal(answer, body)
        if hasattr(answer, "body"):  # the pooling classes return a finished response
            return self._pooled(bytes(answer.body), request)
        complete_answer(answer, body, usage)
        if isinstance(answer, AnthropicMessagesResponse):
            fields = answer.model_dump(mode="json", by_alias=True, exclude_none=True)
            # Anthropic's documents always have this one, as its streams do.
            fields.setdefault("stop_sequence", None)
            return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        counted = isinstance(answer, AnthropicCountTokensResponse)
        text: str = answer.model_dump_json(by_alias=True, exclude_none=counted)
        return text.encode()

    def _pooled(self, answer: bytes, request: TextRequest) -> bytes:
        match request.operation:
            case TextOperation.RERANK:
                return rerank_document(answer, request.body)
            case TextOperation.MODERATION:
                assert self._options.moderation is not None  # otherwise it was refused
                kind = getattr(self.llm.model_config.hf_config, "problem_type", None)
                return moderation_document(
                    answer,
                    self._labels(),
                    self._options.moderation,
                    exclusive=kind != "multi_label_classification",
                )
        return answer

    def _translate(self, error: Exception, body: Mapping[str, Any]) -> EngineError:
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        return self._refusal(create_error_response(error), body)

    def _refusal(self, response: Any, body: Mapping[str, Any]) -> EngineError:
        info = response.error
        if self.client.error is not None:
            return torch_error(self.client.error)
        if 400 <= info.code < 500:
            return refusal(info.message, info.param, body, status=info.code)
        return RuntimeFailed(plain(info.message))


def _is_output(item: Any) -> bool:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind in ("function_call_output", "custom_tool_call_output")


def _as_trained(value: Any, mask: str | None) -> Any:
    """A text or texts, rewritten; None of anything else."""
    if isinstance(value, str):
        return as_trained(value, mask)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return [as_trained(each, mask) for each in value]
    return None


def _streamed_error(text: str) -> dict[str, Any] | None:
    """The `error` of an event that is an error; None of any other event."""
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        try:
            document = json.loads(line.removeprefix("data: "))
        except ValueError:
            continue
        error = document.get("error")
        if isinstance(error, dict):
            return error
        if document.get("type") == "error":  # the fields of the Responses API are at the top
            return {**document, "type": None}
    return None
