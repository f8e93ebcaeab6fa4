"""The tool `file_search` of responses, by the official client."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr

from engine.errors import QueueTimeout, RuntimeFailed
from server.keys.record import Key, digest_of, new_secret
from server.keys.store import KeyStore
from tests.contract.openai import conforms
from tests.server.file_search.conftest import (
    BREAD,
    TRAINS,
    ScriptedRuntime,
    Serving,
    call,
    filled,
    say,
    tool,
)
from tests.server.response_cache.conftest import until
from tests.server.responses.conftest import Sdk, client_of
from tests.server.responses.test_background import reached

LOOK: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
INPUT, TOTAL = 3, 5
"""Tokens of each answer."""
RESULTS = ["file_search_call.results"]


async def ask(sdk: Sdk, text: Any, **more: Any) -> Any:
    return await sdk.responses.create(model="small", input=text, **more)


async def streamed(sdk: Sdk, text: Any, **more: Any) -> list[Any]:
    stream = await sdk.responses.create(model="small", input=text, stream=True, **more)
    return [event async for event in stream]


def kinds_of(items: Any) -> list[str]:
    return [item["type"] if isinstance(item, dict) else item.type for item in items]


async def test_a_search_becomes_an_item(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store = await filled(sdk)
    runtime.script = [[call(["trains", "turntable"])], [say("In the roundhouse.【1】")]]
    made = await ask(sdk, "Where?", tools=[tool(store)], include=RESULTS)
    assert conforms(made.to_dict(), "Response")
    search, message = made.output
    assert (search.type, search.status) == ("file_search_call", "completed")
    assert search.queries == ["trains", "turntable"]
    assert [each.filename for each in search.results] == ["trains.md", "bread.md"]
    assert search.results[0].text == TRAINS
    assert search.results[0].attributes == {"about": "trains"}
    assert search.results[0].score > search.results[1].score
    (citation,) = message.content[0].annotations
    assert (citation.type, citation.filename) == ("file_citation", "trains.md")
    assert made.output_text[citation.index :] == "【1】"
    assert citation.file_id == search.results[0].file_id
    assert made.tools[0].to_dict() == tool(store), "the tool as it came, not the function"
    assert (made.usage.input_tokens, made.usage.total_tokens) == (
        2 * INPUT, 2 * TOTAL,
    )  # fmt: skip

    first, second = runtime.bodies
    assert kinds_of(first["tools"]) == ["function"]
    assert first["include"] == []
    assert kinds_of(second["input"]) == ["message", "function_call", "function_call_output"]
    output = second["input"][2]["output"]
    assert f'【1】 trains.md {{"about": "trains"}}\n{TRAINS}' in output
    assert "【2】 bread.md" in output


async def test_passages_are_kept_and_shown_only_if_asked_for(
    serving: Serving, runtime: ScriptedRuntime
) -> None:
    async with serving() as url, client_of(url) as sdk:
        store = await filled(sdk)
        runtime.script = [[call()], [say("one【1】")], [say("two【1】 and 【9】")], [say("three")]]
        made = await ask(sdk, "Where?", tools=[tool(store)])
        assert made.to_dict()["output"][0]["results"] is None
        assert conforms(made.to_dict(), "Response")
        found = await sdk.responses.retrieve(made.id)
        assert found.to_dict() == made.to_dict()
        found = await sdk.responses.retrieve(made.id, include=RESULTS)
        assert found.output[0].results[0].text == TRAINS
    async with serving() as url, client_of(url) as sdk:
        later = await ask(sdk, "And?", previous_response_id=made.id)
        sent = runtime.bodies[2]["input"]
        assert kinds_of(sent) == [
            "message", "function_call", "function_call_output", "message", "message",
        ]  # fmt: skip
        assert sent[1:3] == runtime.bodies[1]["input"][1:3], "the prefix stays the same"
        assert later.output[0].content[0].annotations == [], "only a turn with the tool cites"
        for include in ([], RESULTS):
            page = await sdk.responses.input_items.list(later.id, order="asc", include=include)
            assert conforms(page.to_dict(), "ResponseItemList")
            assert kinds_of(page.data) == ["message", "file_search_call", "message", "message"]
            assert (page.data[1].results is None) == (not include)
        # A client that sends back what it got, as the Agents SDK does.
        items = [item.to_dict() for item in made.output]
        await ask(
            sdk, [{"role": "user", "content": "Where?"}, *items, {"role": "user", "content": "?"}]
        )
        assert runtime.bodies[3]["input"][1:3] == sent[1:3]


async def test_the_events_are_those_of_one_response(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store = await filled(sdk)
    runtime.script = [
        [say("Let me see."), call(["trains"])],
        [call(["bread"])],
        [say("Here【1】 and there【3】.")],
    ]
    events = await streamed(sdk, "Where?", tools=[tool(store)])
    kinds = kinds_of(events)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds.count("response.created") == kinds.count("response.completed") == 1
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert not [kind for kind in kinds if "function_call" in kind]
    for state, schema in (
        ("in_progress", "InProgress"), ("searching", "Searching"), ("completed", "Completed"),
    ):  # fmt: skip
        found = [each for each in events if each.type == f"response.file_search_call.{state}"]
        assert [each.output_index for each in found] == [1, 2]
        assert all(
            conforms(each.to_dict(), f"ResponseFileSearchCall{schema}Event") for each in found
        )
    for index, event in enumerate(events):
        if event.type == "response.file_search_call.searching":
            assert kinds[index + 1] == "response.file_search_call.completed"
            assert kinds[index + 2] == "response.output_item.done"
            assert events[index + 2].item.status == "completed"
            assert events[index + 2].to_dict()["item"]["results"] is None
    done = [each for each in events if each.type == "response.output_item.done"]
    assert [each.output_index for each in done] == [0, 1, 2, 3]
    last = events[-1].response
    assert conforms(last.to_dict(), "Response")
    assert [each.item.to_dict() for each in done] == [each.to_dict() for each in last.output]
    added = [each for each in events if each.type == "response.output_text.annotation.added"]
    assert all(conforms(each.to_dict(), "ResponseOutputTextAnnotationAddedEvent") for each in added)
    citations = last.output[3].content[0].annotations
    assert [each.to_dict()["annotation"] for each in added] == [
        each.to_dict() for each in citations
    ]
    assert [each.filename for each in citations] == ["trains.md", "bread.md"]
    assert last.usage.total_tokens == 3 * TOTAL
    assert (await sdk.responses.retrieve(last.id)).to_dict() == last.to_dict()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_of_the_client_is_returned(
    sdk: Sdk, runtime: ScriptedRuntime, stream: bool
) -> None:
    store = await filled(sdk)
    runtime.script = [[call(), call(name="look")], [say("done【1】")]]
    tools = [LOOK, tool(store)]
    if stream:
        made = (await streamed(sdk, "Where?", tools=tools))[-1].response
    else:
        made = await ask(sdk, "Where?", tools=tools)
    assert kinds_of(made.output) == ["file_search_call", "function_call"]
    assert conforms(made.to_dict(), "Response")
    assert kinds_of(made.tools) == ["function", "file_search"]
    assert len(runtime.bodies) == 1
    output = {
        "type": "function_call_output", "call_id": made.output[1].call_id, "output": "a train",
    }  # fmt: skip
    made = await ask(sdk, [output], previous_response_id=made.id, tools=tools)
    assert kinds_of(runtime.bodies[1]["input"]) == [
        "message", "function_call", "function_call_output", "function_call", "function_call_output",
    ]  # fmt: skip
    assert made.output[0].content[0].annotations[0].filename == "trains.md"


async def test_what_is_searched(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store, other = await filled(sdk), await filled(sdk, more=f"More. {TRAINS} {BREAD}")
    only_bread = {"type": "eq", "key": "about", "value": "bread"}
    for fields, names in (
        ({"max_num_results": 1}, ["trains.md"]),
        ({"filters": only_bread}, ["bread.md"]),
        ({"ranking_options": {"ranker": "none", "score_threshold": 0.9}}, []),
        ({"vector_store_ids": [store, other], "max_num_results": 2}, ["trains.md", "more.md"]),
    ):  # fmt: skip
        runtime.script, runtime.bodies = [[call()], [say("")]], []
        made = await ask(sdk, "Where?", tools=[tool(store, **fields)], include=RESULTS)
        assert [each.filename for each in made.output[0].results] == names
    runtime.script, runtime.bodies = [[call()], [say("")]], []
    both = [tool(store, filters=only_bread), tool(other), tool(store, filters=only_bread)]
    made = await ask(sdk, "Where?", tools=both, include=RESULTS)
    assert [each.filename for each in made.output[0].results] == ["more.md", "bread.md"]
    assert len(runtime.bodies[0]["tools"]) == 1
    assert [each.to_dict() for each in made.tools] == both


async def test_wrong_fields_are_named_before_anything_runs(
    sdk: Sdk, runtime: ScriptedRuntime
) -> None:
    store = await filled(sdk)
    asked = len(runtime.requests)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tools": [LOOK, {"type": "file_search"}]}, "tools[1].vector_store_ids"),
        ({"tools": [tool(store, vector_store_ids=[])]}, "tools[0].vector_store_ids"),
        ({"tools": [tool(store, vector_store_ids=[5])]}, "tools[0].vector_store_ids[0]"),
        ({"tools": [tool(store, max_num_results=51)]}, "tools[0].max_num_results"),
        ({"tools": [tool(store, color="red")]}, "tools[0].color"),
        ({"tools": [tool(store, filters={"type": "is"})]}, "tools[0].filters.type"),
        (
            {"tools": [tool(store, ranking_options={"hybrid_search": {}})]},
            "tools[0].ranking_options.hybrid_search",
        ),
        ({"tools": [tool(store), {**LOOK, "name": "file_search"}]}, "tools[1].name"),
        ({"tools": [tool(store)], "max_tool_calls": 0}, "max_tool_calls"),
        ({"tools": [LOOK], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(sdk, "one", **fields)
        assert caught.value.param == param
        assert param in str(caught.value)
    with pytest.raises(openai.NotFoundError) as missing:
        await ask(sdk, "one", tools=[LOOK, tool(store, vector_store_ids=[store, "vs_none"])])
    assert missing.value.param == "tools[1].vector_store_ids[1]"
    with pytest.raises(openai.NotFoundError):
        await ask(sdk, "one", tools=[tool("vs_none")], background=True)
    assert len(runtime.requests) == asked


async def test_the_rounds_are_bounded(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store = await filled(sdk)
    runtime.script = [*([call()] for _ in range(4)), [say("enough"), call()]]
    made = await ask(sdk, "Where?", tools=[LOOK, tool(store)], tool_choice="required")
    assert kinds_of(made.output) == [*(["file_search_call"] * 4), "message", "file_search_call"]
    assert [each.status for each in made.output] == ["completed"] * 5 + ["incomplete"]
    assert conforms(made.to_dict(), "Response")
    assert [len(body["tools"]) for body in runtime.bodies] == [2, 2, 2, 2, 1]
    assert [body["tool_choice"] for body in runtime.bodies] == ["required"] + ["auto"] * 4
    assert made.tool_choice == "required"
    assert kinds_of(made.tools) == ["function", "file_search"]

    runtime.script, runtime.bodies = [[call(), call()], [say("enough")]], []
    chosen = {"type": "file_search"}
    made = await ask(sdk, "?", tools=[tool(store)], tool_choice=chosen, max_tool_calls=1)
    assert [each.status for each in made.output] == ["completed", "incomplete", "completed"]
    assert runtime.bodies[0]["tool_choice"] == {"type": "function", "name": "file_search"}
    assert not {"tools", "tool_choice", "max_tool_calls"} & runtime.bodies[1].keys()
    assert (made.tool_choice.to_dict(), made.max_tool_calls) == (chosen, 1)

    runtime.script, runtime.bodies = [[call()], [say("enough")]], []
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [chosen]}
    made = await ask(sdk, "?", tools=[LOOK, tool(store)], tool_choice=allowed)
    function = {"type": "function", "name": "file_search"}
    assert [body["tool_choice"] for body in runtime.bodies] == [
        {**allowed, "tools": [function]},
        {**allowed, "tools": [function], "mode": "auto"},
    ]
    assert conforms(made.to_dict(), "Response")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_search_that_fails_ends_no_response(
    sdk: Sdk, runtime: ScriptedRuntime, stream: bool
) -> None:
    store = await filled(sdk)
    runtime.script = [
        [call(["unembeddable"]), call([]), {**call(), "arguments": "{"}],
        [say("I cannot tell.")],
        [say("Later.")],
    ]
    if stream:
        events = await streamed(sdk, "Where?", tools=[tool(store)])
        assert "response.file_search_call.completed" not in kinds_of(events)
        made = events[-1].response
    else:
        made = await ask(sdk, "Where?", tools=[tool(store)])
    assert conforms(made.to_dict(), "Response")
    assert made.status == "completed"
    assert [each.status for each in made.output] == ["failed"] * 3 + ["completed"]
    outputs = [each["output"] for each in runtime.bodies[1]["input"] if "output" in each]
    assert "cannot read it" in outputs[0]
    assert '"queries"' in outputs[1]
    assert "JSON" in outputs[2]
    assert not any("error" in each.to_dict() for each in made.output)
    await ask(sdk, "And?", previous_response_id=made.id)
    assert runtime.bodies[2]["input"][1:7] == runtime.bodies[1]["input"][1:]


async def test_an_error_of_a_later_round(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store = await filled(sdk)
    runtime.script = [[call()]]
    runtime.errors[1] = RuntimeFailed("The model is on fire.")
    with pytest.raises(openai.InternalServerError, match="on fire"):
        await ask(sdk, "Where?", tools=[tool(store)])
    runtime.bodies.clear()
    seen = []
    with pytest.raises(openai.APIError, match="on fire"):
        async for event in await sdk.responses.create(
            model="small", input="Where?", stream=True, tools=[tool(store)]
        ):
            seen.append(event)
    found = await sdk.responses.retrieve(seen[0].response.id)
    assert found.status == "failed"
    assert kinds_of(found.output) == ["file_search_call"]
    assert conforms(found.to_dict(), "Response")


async def test_a_cut_answer_searches_nothing(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store = await filled(sdk)
    runtime.script, runtime.status = [[call()]], "incomplete"
    made = await ask(sdk, "Where?", tools=[tool(store)])
    assert (made.status, made.output[0].status) == ("incomplete", "incomplete")
    assert len(runtime.bodies) == 1


async def test_in_the_background(serving: Serving, runtime: ScriptedRuntime) -> None:
    async def two_rounds() -> bool:
        return len(runtime.bodies) == 2

    async with serving() as url, client_of(url) as sdk:
        store = await filled(sdk)
        runtime.script = [[call()], [say("one【1】")], [call()], [say("two")]]
        made = await ask(sdk, "Where?", tools=[tool(store)], background=True, include=RESULTS)
        assert kinds_of(made.tools) == ["file_search"]
        found = await reached(sdk, made.id, "completed")
        assert kinds_of(found.output) == ["file_search_call", "message"]
        assert found.output[1].content[0].annotations[0].filename == "trains.md"
        events = await streamed(sdk, "Where?", tools=[tool(store)], background=True)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert kinds_of(events).count("response.created") == 1
        assert events[-1].response.to_dict()["output"][0]["results"] is None
        # A job that a restart interrupts still has its tools.
        runtime.script, runtime.bodies = [[call()], [], [call()], [say("three")]], []
        runtime.errors[1] = QueueTimeout("It is busy.", retry_after_s=1e6)
        left = await ask(sdk, "Where?", tools=[tool(store)], background=True)
        await until(two_rounds)
    async with serving() as url, client_of(url) as sdk:
        found = await reached(sdk, left.id, "completed")
        assert kinds_of(found.output) == ["file_search_call", "message"]
        assert found.output_text == "three"


async def test_tokens_and_conversations(sdk: Sdk, runtime: ScriptedRuntime) -> None:
    store = await filled(sdk)
    runtime.script = [[call()], [say("one")], [say("two")]]
    conversation = await sdk.conversations.create()
    await ask(sdk, "Where?", tools=[tool(store)], conversation=conversation.id)
    page = await sdk.conversations.items.list(conversation.id, order="asc", include=RESULTS)
    assert kinds_of(page.data) == ["message", "file_search_call", "message"]
    assert page.data[1].results[0].text == TRAINS
    plain = await sdk.conversations.items.retrieve(page.data[1].id, conversation_id=conversation.id)
    assert plain.results is None
    await ask(sdk, "And?", conversation=conversation.id)
    assert BREAD in runtime.bodies[2]["input"][2]["output"]
    await sdk.responses.input_tokens.count(model="small", input="one", tools=[tool(store)])
    assert kinds_of(runtime.bodies[3]["tools"]) == ["function"]


def add_key(folder: Path, name: str, **fields: Any) -> str:
    """A key of the store, which the server knows from its start."""
    secret = new_secret()
    store = KeyStore(folder)
    try:
        store.add(Key(name=name, digest=digest_of(secret), created_at=int(time.time()), **fields))
    finally:
        store.close()
    return secret


async def test_a_key_searches_what_it_may(
    serving: Serving, runtime: ScriptedRuntime, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    one, two = add_key(folder, "one"), add_key(folder, "two")
    boss = SecretStr("boss")
    async with (
        serving(admin_keys=(boss,)) as url,
        client_of(url, one) as sdk,
        client_of(url, two) as other,
        client_of(url, "boss") as admin,
    ):
        store = await filled(sdk)
        runtime.script = [[call()], [say("mine")]]
        made = await ask(sdk, "Where?", tools=[tool(store)], background=True)
        found = await reached(sdk, made.id, "completed")
        assert found.output[0].status == "completed"
        with pytest.raises(openai.NotFoundError) as missing:
            await ask(other, "Where?", tools=[tool(store)])
        assert missing.value.param == "tools[0].vector_store_ids[0]"
        runtime.script, runtime.bodies = [[call()], [say("all")]], []
        made = await ask(admin, "Where?", tools=[tool(store)])
        assert [each.status for each in made.output] == ["completed"] * 2
        # A search of another key's passages is nothing that an id gives.
        stolen = {**made.output[0].to_dict(), "results": None}
        runtime.script, runtime.bodies = [[say("nothing")]], []
        await ask(other, [stolen, {"type": "message", "role": "user", "content": "What?"}])
        assert kinds_of(runtime.bodies[0]["input"]) == ["message"]
    (folder / "keys.db").unlink()
    narrow = add_key(folder, "one", models=("small",))
    async with serving(admin_keys=(boss,)) as url, client_of(url, narrow) as sdk:
        with pytest.raises(openai.PermissionDeniedError, match="words"):
            await ask(sdk, "Where?", tools=[tool(store)])
    assert len(runtime.bodies) == 1


async def test_it_needs_kept_responses(serving: Serving, runtime: ScriptedRuntime) -> None:
    async with serving(keep_responses=False) as url, client_of(url) as sdk:
        with pytest.raises(openai.BadRequestError, match="keep_responses") as caught:
            await ask(sdk, "Where?", tools=[LOOK, tool("vs_1")])
        assert caught.value.param == "tools[1].type"
    assert not runtime.bodies
