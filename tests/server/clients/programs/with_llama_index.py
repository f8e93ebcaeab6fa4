"""LlamaIndex: `OpenAILike` and its embeddings."""

from __future__ import annotations

import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms import LLM
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from starter import EMBED, MODEL, URL, Person

HELLO = [ChatMessage(role="user", content="Hello")]


def llm(model: str = MODEL, max_tokens: int = 200, **more: object) -> LLM:
    return OpenAILike(
        model=model,
        api_base=f"{URL}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=2048,
        max_tokens=max_tokens,
        max_retries=0,
        **more,
    )


def test_chat() -> None:
    answer = llm(max_tokens=8).chat(HELLO)
    assert answer.message.content
    assert answer.raw.usage.completion_tokens > 0
    *_, last = llm(max_tokens=8).stream_chat(HELLO)
    assert last.message.content


async def test_chat_async() -> None:
    assert (await llm(max_tokens=8).achat(HELLO)).message.content
    stream = await llm(max_tokens=8).astream_chat(HELLO)
    assert [chunk async for chunk in stream]


def test_complete() -> None:
    assert llm(max_tokens=8).complete("Once").text


def test_tools() -> None:
    def get_weather(day: int) -> str:
        """The weather of a day"""
        return "Rain"

    tool = FunctionTool.from_defaults(get_weather)
    assert llm(max_tokens=8).chat_with_tools([tool], user_msg="Hello")
    answer = llm().chat_with_tools(
        [tool], user_msg="Hello", tool_required=True, allow_parallel_tool_calls=False
    )
    (call,) = llm().get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather"
    assert isinstance(call.tool_kwargs["day"], int)
    result = ChatMessage(
        role="tool", content="Rain", additional_kwargs={"tool_call_id": call.tool_id}
    )
    again = llm(max_tokens=8).chat([*HELLO, answer.message, result])
    assert again.message.content


@pytest.mark.parametrize("native", [False, True], ids=["tool", "json_schema"])
def test_structured_output(native: bool) -> None:
    model = llm(should_use_structured_outputs=native).as_structured_llm(Person)
    assert isinstance(model.chat(HELLO).raw, Person)


def test_embeddings() -> None:
    model = OpenAILikeEmbedding(model_name=EMBED, api_base=f"{URL}/v1", api_key="none")
    one, two = model.get_text_embedding_batch(["one", "two"])
    assert len(one) == len(two) > 1
    assert model.get_query_embedding("one")


def test_unknown_model() -> None:
    with pytest.raises(openai.NotFoundError, match="tiny-qwem"):
        llm("tiny-qwem").chat(HELLO)
