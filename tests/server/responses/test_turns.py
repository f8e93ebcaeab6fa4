"""Turns that go on from one another, through the official client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from engine.errors import InvalidRequest, RuntimeFailed
from server.responses.store import FILE_NAME
from server.settings import ServerSettings
from tests.contract.openai import conforms
from tests.server.response_cache.conftest import until
from tests.server.responses.conftest import Model, Sdk, Serving, client_of

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}


async def ask(sdk: Sdk, text: Any, **more: Any) -> Any:
    return await sdk.responses.create(model="small", input=text, **more)


async def streamed(sdk: Sdk, text: str, **more: Any) -> list[Any]:
    stream = await sdk.responses.create(model="small", input=text, stream=True, **more)
    return [event async for event in stream]


async def test_a_chain_has_all_that_came_before(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one", instructions="Be brief")
    second = await ask(sdk, "two", previous_response_id=first.id)
    events = await streamed(sdk, "three", previous_response_id=second.id)
    third = events[-1].response
    assert {event.response.id for event in events if hasattr(event, "response")} == {third.id}
    await ask(sdk, "four", previous_response_id=third.id)
    assert model.inputs[-1] == [
        "one", "answer 1", "two", "answer 2", "three", "answer 3", "four",
    ]  # fmt: skip
    assert model.requests[-1].history == 6
    assert "instructions" not in model.bodies[-1], "they are not carried over"
    assert second.previous_response_id == first.id
    assert not {"previous_response_id", "background"} & model.bodies[-1].keys()


async def test_a_response_is_retrieved_as_it_was_given(sdk: Sdk, model: Model) -> None:
    made = await ask(
        sdk,
        "one",
        metadata={"a": "b"},
        user="somebody",
        prompt_cache_key="key",
        safety_identifier="safe",
    )
    assert made.store is True
    assert (made.metadata, made.user, made.prompt_cache_key) == ({"a": "b"}, "somebody", "key")
    found = await sdk.responses.retrieve(made.id)
    assert found.to_dict() == made.to_dict()
    assert conforms(found.to_dict(), "Response")
    last = (await streamed(sdk, "two"))[-1].response
    found = await sdk.responses.retrieve(last.id)
    assert found.to_dict() == last.to_dict()
    assert conforms(found.to_dict(), "Response")


async def test_not_stored(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    second = await ask(sdk, "two", previous_response_id=first.id, store=False)
    assert model.inputs[-1] == ["one", "answer 1", "two"]
    assert second.store is False
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, "three", previous_response_id=second.id)
    error = caught.value
    assert (error.param, error.code) == ("previous_response_id", "previous_response_not_found")


async def test_input_items_are_paged(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    second = await ask(
        sdk, [{"role": "user", "content": "two"}, {"role": "developer", "content": "hint"}],
        previous_response_id=first.id,
    )  # fmt: skip
    page = await sdk.responses.input_items.list(second.id, order="asc")
    texts = [item.content[0].text for item in page.data]
    assert texts == ["one", "answer 1", "two", "hint"]
    assert conforms(page.to_dict(), "ResponseItemList")
    every = [item async for item in sdk.responses.input_items.list(second.id, limit=1)]
    assert [item.content[0].text for item in every] == texts[::-1], "the newest first by default"
    assert len({item.id for item in every}) == 4
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.responses.input_items.list(second.id, after="msg_none")
    assert caught.value.param == "after"
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.responses.input_items.list(second.id, include=["web_search_call.action.sources"])
    assert refused.value.param == "include"
    await sdk.responses.input_items.list(second.id, include=["message.output_text.logprobs"])
    with pytest.raises(openai.BadRequestError) as limited:
        await sdk.responses.input_items.list(second.id, limit=101)
    assert limited.value.param == "limit"


async def test_deleting_in_the_middle_of_a_chain(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    second = await ask(sdk, "two", previous_response_id=first.id)
    third = await ask(sdk, "three", previous_response_id=second.id)
    await sdk.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.delete(second.id)
    with pytest.raises(openai.BadRequestError):
        await ask(sdk, "no", previous_response_id=second.id)
    await ask(sdk, "four", previous_response_id=third.id)
    assert model.inputs[-1][:4] == ["one", "answer 1", "two", "answer 2"]


async def test_what_is_deleted_leaves_the_file(
    serving: Serving, model: Model, tmp_path: Path
) -> None:
    async with serving() as url, client_of(url) as sdk:
        first = await ask(sdk, "a secret of one turn")
        second = await ask(sdk, "another", previous_response_id=first.id)
        await ask(sdk, "kept")
    async with serving() as url, client_of(url) as sdk:  # now it is in the file itself
        for each in (first, second):
            await sdk.responses.delete(each.id)
    content = (tmp_path / "data" / FILE_NAME).read_bytes()
    assert b"kept" in content
    assert b"a secret" not in content
    assert (tmp_path / "data" / FILE_NAME).stat().st_mode & 0o777 == 0o600


async def test_calls_and_their_outputs_round_trip(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "look", tools=[TOOL])
    call = first.output[0]
    with pytest.raises(openai.BadRequestError, match="No tool output found") as caught:
        await ask(sdk, "never mind", previous_response_id=first.id)
    assert caught.value.param == "input"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "a train"}
    second = await ask(sdk, [output], previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "answer 2"
    sent = model.bodies[-1]["input"]
    assert [item["type"] for item in sent] == ["message", "function_call", "function_call_output"]
    assert sent[2] == output
    page = await sdk.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in page.data] == [
        "message", "function_call", "function_call_output",
    ]  # fmt: skip
    assert conforms(page.to_dict(), "ResponseItemList")


async def test_references_to_items(sdk: Sdk, model: Model) -> None:
    """The AI SDK sends them in place of what was answered before."""
    first = await ask(sdk, "one")
    named = {"type": "item_reference", "id": first.output[0].id}
    await ask(sdk, [{"role": "user", "content": "one"}, named, {"role": "user", "content": "two"}])
    assert model.inputs[-1] == ["one", "answer 1", "two"]
    with pytest.raises(openai.NotFoundError) as caught:
        await ask(sdk, [{"role": "user", "content": "one"}, {**named, "id": "msg_none"}])
    assert caught.value.param == "input[1].id"


async def test_reasoning_round_trips(sdk: Sdk, model: Model) -> None:
    thought = {
        "type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }  # fmt: skip
    first = await ask(sdk, [{"role": "user", "content": "one"}, thought])
    await ask(sdk, "two", previous_response_id=first.id)
    sent = model.bodies[-1]["input"][1]
    assert sent == {name: each for name, each in thought.items() if each is not None}


async def test_wrong_fields_are_named(sdk: Sdk, model: Model) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"conversation": {"name": "x"}}, "conversation"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": "yes"}, "store"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"input": 5}, "input"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.post(
                "/responses",
                cast_to=httpx.Response,
                body={"model": "small", "input": "hi", **fields},
            )
        assert caught.value.param == param, fields
    assert not model.requests


async def test_a_key_sees_its_own_only(serving: Serving, model: Model) -> None:
    settings = ServerSettings(
        api_keys=(SecretStr("key-a"), SecretStr("key-b")), admin_keys=(SecretStr("admin"),)
    )
    async with serving(settings) as url:
        owner, other = client_of(url, "key-a"), client_of(url, "key-b")
        made = await ask(owner, "one")
        conversation = await owner.conversations.create()
        for refused in (
            other.responses.retrieve(made.id),
            other.responses.delete(made.id),
            other.responses.cancel(made.id),
            other.responses.input_items.list(made.id),
            other.conversations.retrieve(conversation.id),
            other.conversations.items.list(conversation.id),
            other.conversations.delete(conversation.id),
            ask(other, "two", conversation=conversation.id),
            ask(other, [{"type": "item_reference", "id": made.output[0].id}]),
        ):
            with pytest.raises(openai.NotFoundError):
                await refused
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(other, "two", previous_response_id=made.id)
        assert caught.value.code == "previous_response_not_found"
        assert (await client_of(url, "admin").responses.retrieve(made.id)).id == made.id


async def test_an_error_keeps_nothing(sdk: Sdk, model: Model) -> None:
    conversation = await sdk.conversations.create()
    model.error = RuntimeFailed("the device is on fire")
    with pytest.raises(openai.InternalServerError):
        await ask(sdk, "one", conversation=conversation.id)
    model.error = None
    await ask(sdk, "two", conversation=conversation.id)
    assert model.inputs[-1] == ["two"]


async def test_a_stream_that_breaks_has_failed(sdk: Sdk, model: Model) -> None:
    model.error = RuntimeFailed("the device is on fire")
    stream = await sdk.responses.create(model="small", input="one", stream=True)
    seen: list[Any] = []
    with pytest.raises(openai.APIError):
        async for event in stream:
            seen.append(event)
    found = await sdk.responses.retrieve(seen[0].response.id)
    assert found.status == "failed"
    assert found.error is not None
    assert "on fire" in found.error.message
    assert conforms(found.to_dict(), "Response")


async def test_a_client_that_leaves_finds_what_was_written(sdk: Sdk, model: Model) -> None:
    model.go_on.clear()
    stream = await sdk.responses.create(model="small", input="one", stream=True)
    async for event in stream:
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta":
            break
    await stream.close()

    async def is_kept() -> bool:
        try:
            return bool((await sdk.responses.retrieve(response_id)).status == "cancelled")
        except openai.NotFoundError:
            return False

    await until(is_kept)
    found = await sdk.responses.retrieve(response_id)
    assert found.output_text == "answer 1"
    assert found.output[0].status == "incomplete"
    assert conforms(found.to_dict(), "Response")


async def test_it_outlives_a_restart(serving: Serving, model: Model) -> None:
    async with serving() as url, client_of(url) as sdk:
        first = await ask(sdk, "one")
    async with serving() as url, client_of(url) as sdk:
        await ask(sdk, "two", previous_response_id=first.id)
    assert model.inputs[-1] == ["one", "answer 1", "two"]


async def test_nothing_is_kept_if_the_configuration_says_so(
    serving: Serving, model: Model, tmp_path: Path
) -> None:
    async with serving(ServerSettings(keep_responses=False)) as url, client_of(url) as sdk:
        made = await ask(sdk, "one")
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.conversations.create()
    assert not (tmp_path / "data" / FILE_NAME).exists()


async def test_a_store_that_is_damaged_stops_no_model(
    serving: Serving, model: Model, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE_NAME).write_bytes(b"no database" * 1000)
    async with serving() as url, client_of(url) as sdk:
        made = await ask(sdk, "one")
        assert (made.output_text, made.store) == ("answer 1", False)
        for refused in (
            sdk.responses.retrieve(made.id),
            ask(sdk, "two", previous_response_id=made.id),
            ask(sdk, "two", background=True),
            sdk.conversations.create(),
        ):
            with pytest.raises(openai.InternalServerError) as caught:
                await refused
            assert caught.value.status_code == 503
    assert (tmp_path / "data" / FILE_NAME).read_bytes().startswith(b"no database")


async def test_a_cached_answer_is_a_response_of_its_own(
    serving: Serving, model: Model, tmp_path: Path
) -> None:
    settings = ServerSettings(response_cache=str(tmp_path / "cache.db"))
    async with serving(settings) as url, client_of(url) as sdk:
        first = await ask(sdk, "one", temperature=0)
        again = await sdk.responses.with_raw_response.create(
            model="small", input="one", temperature=0
        )
        for _ in range(500):
            if again.headers["x-roundhouse-cache"] == "hit":
                break
            again = await sdk.responses.with_raw_response.create(
                model="small", input="one", temperature=0
            )
        assert again.headers["x-roundhouse-cache"] == "hit"
        second = again.parse()
        assert second.id != first.id
        assert (await sdk.responses.retrieve(second.id)).id == second.id


async def test_tokens_are_counted_with_what_came_before(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    counted = await sdk.responses.input_tokens.count(
        model="small", input="two", previous_response_id=first.id
    )
    assert counted.input_tokens == len("one" + "answer 1" + "two")
    assert conforms(counted.to_dict(), "TokenCountsResource")
    assert "store" not in model.bodies[-1]
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.input_tokens.count(
            model="small", input="two", previous_response_id="resp_none"
        )
    assert caught.value.param == "previous_response_id"


async def test_a_compaction_stands_for_what_came_before(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    compacted = await sdk.responses.compact(
        model="small", input="two", previous_response_id=first.id
    )
    assert model.inputs[-1][:3] == ["one", "answer 1", "two"]
    assert conforms(compacted.to_dict(), "CompactResource")
    assert [item.type for item in compacted.output] == ["message", "message", "compaction"]
    items = [item.to_dict() for item in compacted.output]
    second = await ask(sdk, [*items, {"role": "user", "content": "three"}])
    one, two, summary, three = model.inputs[-1]
    assert (one, two, three) == ("one", "two", "three")
    assert summary.endswith("answer 2"), "the summary of the model"
    await ask(sdk, "four", previous_response_id=second.id)
    assert model.inputs[-1][2] == summary


async def test_an_error_names_the_item_of_the_client(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    model.error = InvalidRequest("input[2].content: it is wrong.", param="input[2].content")
    with pytest.raises(openai.BadRequestError, match=r"input\[0\].content: it is wrong") as caught:
        await ask(sdk, "two", previous_response_id=first.id)
    assert caught.value.param == "input[0].content"


async def test_a_cut_response_can_be_gone_on_from(sdk: Sdk, model: Model) -> None:
    model.status = "incomplete"
    first = await ask(sdk, "one")
    model.status = "completed"
    await ask(sdk, "two", previous_response_id=first.id)
    assert model.inputs[-1] == ["one", "answer 1", "two"]
    assert model.bodies[-1]["input"][1]["status"] == "completed", "no model goes on with its text"
