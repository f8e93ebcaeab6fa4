"""Responses in the background: they outlive their connection, and the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr

from engine.errors import BudgetExceeded, InvalidRequest, QueueFull, RuntimeFailed
from engine.events import Event
from engine.requests import TextRequest
from server.responses import background
from server.responses.store import ResponseStore
from server.settings import ServerSettings
from tests.contract.openai import conforms
from tests.server.fake import FakeRuntime
from tests.server.responses.conftest import LIMIT_S, Model, Sdk, Serving, client_of, texts_of
from tests.server.responses.test_turns import ask

FINAL = ("completed", "failed", "cancelled", "incomplete")


async def ended(sdk: Sdk, response_id: str) -> Any:
    return await reached(sdk, response_id, *FINAL)


async def reached(sdk: Sdk, response_id: str, *statuses: str) -> Any:
    async with asyncio.timeout(LIMIT_S):
        while True:
            found = await sdk.responses.retrieve(response_id)
            if found.status in statuses:
                return found
            await asyncio.sleep(0.01)


async def begin(sdk: Sdk, text: str, **more: Any) -> Any:
    """Retried while the engine starts."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                return await ask(sdk, text, background=True, **more)
            except openai.InternalServerError as error:
                assert error.code == "queue_timeout"
                await asyncio.sleep(0.01)


async def test_it_is_polled(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    model.go_on.clear()
    made = await begin(sdk, "two", previous_response_id=first.id, metadata={"a": "b"})
    assert (made.status, made.background, made.output) == ("queued", True, [])
    assert conforms(made.to_dict(), "Response")
    found = await reached(sdk, made.id, "in_progress")
    assert conforms(found.to_dict(), "Response")
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, "three", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    model.go_on.set()
    found = await ended(sdk, made.id)
    assert (found.status, found.output_text) == ("completed", "answer 2")
    assert (found.metadata, found.background) == ({"a": "b"}, True)
    assert conforms(found.to_dict(), "Response")
    assert model.inputs[-1] == ["one", "answer 1", "two"]
    await ask(sdk, "three", previous_response_id=made.id)
    assert model.inputs[-1] == ["one", "answer 1", "two", "answer 2", "three"]


async def test_a_wrong_request_is_refused_at_once(
    sdk: Sdk, model: Model, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InvalidRequest("temperature: it is too hot.", param="temperature")

    await begin(sdk, "one")
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.create(model="smal", input="one", background=True)
    monkeypatch.setattr(runtime, "prepare", refuse)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(sdk, "two", background=True)
    assert caught.value.param == "temperature"


async def test_it_is_cancelled(sdk: Sdk, model: Model) -> None:
    conversation = await sdk.conversations.create()
    model.go_on.clear()
    made = await begin(sdk, "one", conversation=conversation.id)
    await reached(sdk, made.id, "in_progress")
    with pytest.raises(openai.BadRequestError) as locked:
        await ask(sdk, "two", conversation=conversation.id)
    assert locked.value.code == "conversation_locked"
    cancelled = await sdk.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert conforms(cancelled.to_dict(), "Response")
    assert (await sdk.responses.cancel(made.id)).status == "cancelled"
    model.go_on.set()
    done = await ask(sdk, "two", conversation=conversation.id)
    assert model.inputs[-1] == ["two"]
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await sdk.responses.cancel(done.id)
    other = await begin(sdk, "three")
    await ended(sdk, other.id)
    with pytest.raises(openai.BadRequestError, match="completed"):
        await sdk.responses.cancel(other.id)


async def test_it_is_deleted_while_it_runs(sdk: Sdk, model: Model) -> None:
    model.go_on.clear()
    made = await begin(sdk, "one")
    await reached(sdk, made.id, "in_progress")
    await sdk.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made.id)
    model.go_on.set()
    await ask(sdk, "two")


async def test_errors_are_told(sdk: Sdk, model: Model) -> None:
    for error, code in (
        (RuntimeFailed("the device is on fire"), "server_error"),
        (InvalidRequest("input: too long", param="input"), "invalid_prompt"),
        (BudgetExceeded("nothing is left", retry_after_s=3600), "rate_limit_exceeded"),
    ):
        model.error = error
        made = await begin(sdk, "one")
        found = await ended(sdk, made.id)
        assert found.status == "failed"
        assert (found.error.code, found.error.message) == (code, error.message)
        assert conforms(found.to_dict(), "Response")


async def test_a_busy_engine_is_asked_again(sdk: Sdk, model: Model, runtime: FakeRuntime) -> None:
    asked = 0

    async def busy_once(request: TextRequest) -> AsyncGenerator[Event, None]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise QueueFull("too many wait", retry_after_s=0.0)
        async for event in model(request):
            yield event

    await ended(sdk, (await begin(sdk, "first")).id)
    runtime.answer = busy_once
    made = await begin(sdk, "one")
    assert (await ended(sdk, made.id)).status == "completed"
    assert asked == 2


async def test_its_events_can_be_read_again(sdk: Sdk, model: Model) -> None:
    await ended(sdk, (await begin(sdk, "first")).id)
    model.go_on.clear()
    stream = await sdk.responses.create(model="small", input="one", background=True, stream=True)
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    assert [event.sequence_number for event in seen] == [*range(len(seen))]
    assert [event.type for event in seen[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip
    response_id = seen[0].response.id
    resumed = await sdk.responses.retrieve(response_id, stream=True, starting_after=2)
    model.go_on.set()
    rest = [event async for event in resumed]
    assert rest[0].sequence_number == 3
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.id == response_id
    again = await sdk.responses.retrieve(response_id, stream=True)
    every = [event.to_dict() async for event in again]
    assert every == [event.to_dict() for event in (*seen[:3], *rest)]
    found = await sdk.responses.retrieve(response_id)
    assert found.to_dict() == rest[-1].response.to_dict(), "kept before its last event is sent"


async def test_other_responses_have_no_events(sdk: Sdk, model: Model) -> None:
    plain = await ask(sdk, "one")
    unstreamed = await begin(sdk, "two")
    for response_id in (plain.id, unstreamed.id):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.responses.retrieve(response_id, stream=True)
        assert caught.value.param == "stream"
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve("resp_none", stream=True)


async def test_a_failure_ends_the_events(sdk: Sdk, model: Model) -> None:
    await ended(sdk, (await begin(sdk, "first")).id)
    model.error = RuntimeFailed("the device is on fire")
    stream = await sdk.responses.create(model="small", input="one", background=True, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the device is on fire"


async def test_it_goes_on_after_a_restart(serving: Serving, model: Model) -> None:
    async with serving() as url, client_of(url) as sdk:
        conversation = await sdk.conversations.create()
        model.go_on.clear()
        made = await begin(sdk, "one", conversation=conversation.id)
        await reached(sdk, made.id, "in_progress")
    model.go_on.set()
    async with serving() as url, client_of(url) as sdk:
        found = await ended(sdk, made.id)
        assert (found.status, found.output_text) == ("completed", "answer 2")
        page = await sdk.conversations.items.list(conversation.id, order="asc")
        assert [item.content[0].text for item in page.data] == ["one", "answer 2"]


async def test_a_restart_keeps_whose_a_job_is(serving: Serving, model: Model) -> None:
    keys = ServerSettings(api_keys=(SecretStr("key-a"), SecretStr("key-b")))
    async with serving(keys) as url, client_of(url, "key-a") as sdk:
        first = await ask(sdk, "one")
        conversation = await sdk.conversations.create()
        model.go_on.clear()
        made = await begin(sdk, "two", previous_response_id=first.id, stream=True)
        async for event in made:
            if event.type == "response.in_progress":
                break
        await made.close()
        response_id = event.response.id
        turn = await begin(sdk, "three", conversation=conversation.id)
        await reached(sdk, turn.id, "in_progress")
        callers = {request.scheduling.caller for request in model.requests}
        async with client_of(url, "key-b") as other:
            with pytest.raises(openai.NotFoundError):
                await other.responses.retrieve(response_id, stream=True)
    assert len(callers) == 1
    before = len(model.requests)
    async with serving(keys) as url, client_of(url, "key-a") as sdk:
        for each in (response_id, turn.id):
            await reached(sdk, each, "in_progress")
        with pytest.raises(openai.BadRequestError) as locked:
            await ask(sdk, "four", conversation=conversation.id)
        assert locked.value.code == "conversation_locked"
        model.go_on.set()
        assert (await ended(sdk, response_id)).status == "completed"
        assert (await ended(sdk, turn.id)).status == "completed"
    again = model.requests[before:]
    assert {request.scheduling.caller for request in again} == callers
    assert {(*texts_of(each.body["input"]), each.history) for each in again} == {
        ("one", "answer 1", "two", 2),
        ("three", 0),
    }


async def test_a_job_that_ends_the_process_again_and_again(
    serving: Serving, model: Model, tmp_path: Path
) -> None:
    async with serving() as url, client_of(url) as sdk:
        model.go_on.clear()
        made = await begin(sdk, "one")
        await reached(sdk, made.id, "in_progress")
    store = ResponseStore(tmp_path / "data", 2**30, 1e9)
    (kept,) = store.unfinished()
    assert kept.attempts == 0, "an orderly stop does not count"
    store.begin_run(made.id, kept.document, background.MAX_ATTEMPTS)
    store.close()
    async with serving() as url, client_of(url) as sdk:
        found = await ended(sdk, made.id)
    assert found.status == "failed"
    assert "3 times" in found.error.message


async def test_too_many_are_refused(
    sdk: Sdk, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MAX_UNFINISHED", 1)
    model.go_on.clear()
    await begin(sdk, "one")
    with pytest.raises(openai.RateLimitError):
        await ask(sdk, "two", background=True)
    model.go_on.set()
