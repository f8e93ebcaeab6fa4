"""`/v1/conversations`, and responses that are turns of one, through the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from server.settings import ServerSettings
from tests.contract.openai import conforms
from tests.server.responses.conftest import LIMIT_S, Model, Sdk, Serving, client_of
from tests.server.responses.test_turns import TOOL, ask, streamed
from tests.server.test_pictures import RED, host, response

HELLO: dict[str, Any] = {"type": "message", "role": "user", "content": "hello"}


async def test_a_conversation_grows_by_its_turns(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create(items=[HELLO], metadata={"a": "b"})
    assert made.object == "conversation"
    assert made.metadata == {"a": "b"}
    first = await ask(sdk, "one", conversation=made.id)
    assert first.conversation.id == made.id
    await streamed(sdk, "two", conversation={"id": made.id})
    assert model.inputs[-1] == ["hello", "one", "answer 1", "two"]
    await ask(sdk, "three", conversation=made.id, store=False)
    page = await sdk.conversations.items.list(made.id, order="asc")
    texts = [item.content[0].text for item in page.data]
    assert texts == ["hello", "one", "answer 1", "two", "answer 2", "three", "answer 3"]
    assert conforms(page.to_dict(), "ResponseItemList")
    found = await sdk.responses.input_items.list(first.id, order="asc")
    assert [item.content[0].text for item in found.data] == ["hello", "one"]
    await ask(sdk, "other", previous_response_id=first.id)
    assert model.inputs[-1] == ["hello", "one", "answer 1", "other"], "as it was at that turn"


async def test_a_conversation_is_changed_and_deleted(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create(metadata={"a": "b"})
    changed = await sdk.conversations.update(made.id, metadata={"c": "d"})
    assert (changed.id, changed.metadata) == (made.id, {"c": "d"})
    assert await sdk.conversations.retrieve(made.id) == changed
    turn = await ask(sdk, "one", conversation=made.id)
    deleted = await sdk.conversations.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "conversation.deleted")
    for gone in (
        sdk.conversations.retrieve(made.id),
        sdk.conversations.delete(made.id),
        sdk.conversations.items.list(made.id),
        ask(sdk, "two", conversation=made.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await gone
    await ask(sdk, "two", previous_response_id=turn.id)
    assert model.inputs[-1] == ["one", "answer 1", "two"], "the response still has its context"


async def test_items(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create()
    call = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "a train"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    added = await sdk.conversations.items.create(made.id, items=[HELLO, thought, call, output])
    assert [item.type for item in added.data] == [
        "message", "reasoning", "function_call", "function_call_output",
    ]  # fmt: skip
    assert conforms(added.to_dict(), "ResponseItemList")
    hello = added.data[0]
    assert await sdk.conversations.items.retrieve(hello.id, conversation_id=made.id) == hello
    pages = [item.id async for item in sdk.conversations.items.list(made.id, limit=1, order="asc")]
    assert pages == [item.id for item in added.data]
    newest = await sdk.conversations.items.list(made.id, limit=1)
    assert (newest.data[0].type, newest.has_more) == ("function_call_output", True)
    left = await sdk.conversations.items.delete(hello.id, conversation_id=made.id)
    assert left.id == made.id
    for gone in (
        sdk.conversations.items.retrieve(hello.id, conversation_id=made.id),
        sdk.conversations.items.delete(hello.id, conversation_id=made.id),
        sdk.conversations.items.list(made.id, after=hello.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await gone
    await ask(sdk, "go on", conversation=made.id)
    assert [item["type"] for item in model.bodies[-1]["input"]] == [
        "reasoning", "function_call", "function_call_output", "message",
    ]  # fmt: skip


async def test_wrong_items_are_named(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create()
    wrong: list[tuple[Any, str]] = [
        ([HELLO] * 21, "items"),
        ([], "items"),
        ([HELLO, {"type": "message", "content": "x"}], "items[1].role"),
        ([{"role": "user"}], "items[0].content"),
        ([{"role": "user", "content": 5}], "items[0].content"),
        ([{"role": "user", "content": [{"text": "x"}]}], "items[0].content[0].type"),
        ([{"role": "robot", "content": "x"}], "items[0].role"),
        ([{"type": "web_search_call", "id": "x"}], "items[0].type"),
        ([{"type": "function_call", "name": "x", "arguments": "{}"}], "items[0].call_id"),
        ([{"type": "function_call_output", "call_id": "x"}], "items[0].output"),
        ([{**HELLO, "id": "a"}, {**HELLO, "id": "a"}], "items"),
    ]
    for items, param in wrong:
        for path in ("/conversations", f"/conversations/{made.id}/items"):
            if not items and path == "/conversations":
                continue
            with pytest.raises(openai.BadRequestError) as caught:
                await sdk.post(path, cast_to=httpx.Response, body={"items": items})
            assert caught.value.param == param, items
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.conversations.create(metadata={"a": "b" * 513})
    assert refused.value.param == "metadata"
    assert not (await sdk.conversations.items.list(made.id)).data


async def test_two_turns_at_once(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create()
    other = await sdk.conversations.create()
    model.go_on.clear()
    running = asyncio.create_task(ask(sdk, "one", conversation=made.id))
    await model.begun.wait()
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, "two", conversation=made.id)
    error = caught.value
    assert (error.code, error.param) == ("conversation_locked", "conversation")
    model.go_on.set()
    await running
    await ask(sdk, "three", conversation=made.id)
    assert model.inputs[-1] == ["one", "answer 1", "three"]
    await ask(sdk, "elsewhere", conversation=other.id)


async def test_a_client_that_leaves_unlocks_its_conversation(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create()
    model.go_on.clear()
    running = asyncio.create_task(ask(sdk, "one", conversation=made.id))
    await model.begun.wait()
    running.cancel()
    await asyncio.wait((running,))
    await asyncio.wait_for(model.left.wait(), LIMIT_S)
    model.go_on.set()
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await ask(sdk, "two", conversation=made.id)
                break
            except openai.BadRequestError as error:
                assert error.code == "conversation_locked"
                await asyncio.sleep(0.01)
    assert model.inputs[-1] == ["two"], "a turn without an answer is none"


async def test_a_call_without_its_output(sdk: Sdk, model: Model) -> None:
    made = await sdk.conversations.create()
    turn = await ask(sdk, "look", conversation=made.id, tools=[TOOL])
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        await ask(sdk, "never mind", conversation=made.id)
    output = {"type": "function_call_output", "call_id": turn.output[0].call_id, "output": "it"}
    await ask(sdk, [output], conversation=made.id, tools=[TOOL])
    await ask(sdk, "two", conversation=made.id)


async def test_it_outlives_a_restart(serving: Serving, model: Model) -> None:
    async with serving() as url, client_of(url) as sdk:
        made = await sdk.conversations.create(items=[HELLO])
        await ask(sdk, "one", conversation=made.id)
    async with serving() as url, client_of(url) as sdk:
        await ask(sdk, "two", conversation=made.id)
    assert model.inputs[-1] == ["hello", "one", "answer 1", "two"]


async def test_media_behind_urls(serving: Serving, model: Model) -> None:
    """Nobody has the server fetch a URL by an item that it keeps."""

    async def show(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(response(RED))

    async with host(show) as (address, _):
        part = {"type": "input_image", "image_url": f"http://{address}/a.png", "detail": "auto"}
        item = {"role": "user", "content": [part]}
        allowed = ServerSettings(allowed_media_hosts=(address,), private_media_hosts=(address,))
        async with serving(allowed) as url, client_of(url) as sdk:
            made = await sdk.conversations.create(items=[item])
            await ask(sdk, "one", conversation=made.id)
            kept = await sdk.conversations.items.list(made.id, order="asc")
            assert kept.data[0].content[0].image_url == part["image_url"]
    async with serving() as url, client_of(url) as sdk:
        for refused in (
            sdk.conversations.create(items=[item]),
            sdk.conversations.items.create(made.id, items=[item]),
            ask(sdk, "two", conversation=made.id),
            ask(sdk, "again, as the conversation is not locked", conversation=made.id),
        ):
            with pytest.raises(openai.BadRequestError, match="data: URL"):
                await refused
    assert len(model.requests) == 1
