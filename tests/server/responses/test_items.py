"""Items on their way to a model, and what is written of them."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest, NoSpaceLeft
from server.responses import compaction
from server.responses.compaction import MARK, compaction_item, summary_of
from server.responses.items import check_answered, for_model
from server.responses.keeper import Keeper
from server.responses.store import ResponseStore
from server.responses.stream_reader import Written
from tests.server.responses.conftest import LIMIT_S, Model, Sdk
from tests.server.responses.test_turns import ask


def call(**more: Any) -> dict[str, Any]:
    given = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    return {**given, "status": "completed", **more}


def test_a_summary_is_read_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    item = compaction_item("x" * 100)
    message = summary_of(item)
    assert message is not None and message["content"].endswith("x" * 100)
    foreign = [
        {**item, "type": "reasoning"},
        {**item, "encrypted_content": None},
        {**item, "encrypted_content": "of a provider"},
        {**item, "encrypted_content": base64.b64encode(zlib.compress(b"a")).decode()},
        {**item, "encrypted_content": MARK + "!"},
        {**item, "encrypted_content": MARK + base64.b64encode(b"no zlib").decode()},
        {**item, "encrypted_content": item["encrypted_content"][:-8]},
        {**item, "encrypted_content": MARK + base64.b64encode(zlib.compress(b"\xff")).decode()},
    ]
    assert [summary_of(each) for each in foreign] == [None] * len(foreign)
    monkeypatch.setattr(compaction, "MAX_BYTES", 99)
    assert summary_of(item) is None


def test_a_model_gets_what_it_can_read() -> None:
    text = {"type": "message", "role": "assistant", "content": "cut", "status": "incomplete"}
    items = [
        call(status="incomplete"),
        call(arguments='{"a": '),
        call(arguments="", id=None),
        {"type": "custom_tool_call", "call_id": "b", "name": "f", "input": "{", "status": "x"},
        text,
        {"type": "message", "role": "user", "content": "hi", "status": "completed", "id": "m"},
        compaction_item("all"),
    ]
    whole, custom, cut, user, summary = for_model(items)
    assert whole == call(arguments="") and custom == items[3]
    assert cut == {**text, "status": "completed"}
    assert user == {"type": "message", "role": "user", "content": "hi"}
    assert summary["content"].endswith("all")


def test_a_call_has_an_output() -> None:
    output = {"type": "function_call_output", "call_id": "a", "output": "1"}
    check_answered([call()], [output])
    check_answered([call(), output], [])
    check_answered([], [call()])
    with pytest.raises(InvalidRequest, match="call 'b'"):
        check_answered([call(), call(call_id="b")], [output])


def test_what_a_stream_wrote_is_there_once() -> None:
    def block(kind: str, **fields: Any) -> bytes:
        return b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"

    added, text = "response.output_item.added", "response.output_text.delta"
    done = "response.output_item.done"
    message = {"type": "message", "id": "m"}
    written = Written()
    for kind, fields in (
        (added, {"item": message}),
        (text, {"delta": "a"}),
        (done, {"item": {**message, "content": ["a"]}}),
    ):
        written.take(kind, block(kind, **fields))
    assert written.output() == [{**message, "content": ["a"]}]
    for kind, fields in (
        (added, {"item": message}),
        (text, {"delta": "b"}),
        (text, {"delta": "c"}),
    ):
        written.take(kind, block(kind, **fields))
    first, cut = written.output()
    assert first == {**message, "content": ["a"]}
    assert (cut["status"], cut["content"][0]["text"]) == ("incomplete", "bc")


async def test_an_error_of_an_earlier_item_is_told_as_it_is(sdk: Sdk, model: Model) -> None:
    first = await ask(sdk, "one")
    model.error = InvalidRequest("input[1].content: it is wrong.", param="input[1].content")
    with pytest.raises(Exception, match=r"input\[1\].content: it is wrong"):
        await ask(sdk, "two", previous_response_id=first.id)


async def test_an_answer_is_given_where_it_cannot_be_kept(
    sdk: Sdk, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResponseStore, "save", _full)
    made = await ask(sdk, "one")
    assert (made.output_text, made.store) == ("answer 1", False)
    with pytest.raises(Exception, match="no space left"):
        await ask(sdk, "two", background=True)


async def test_a_write_is_done_though_its_caller_leaves(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, 2**30, 1e9)
    await keeper.start()
    gate, ran = threading.Event(), []
    blocking = asyncio.create_task(keeper.write(lambda _store: gate.wait(LIMIT_S)))
    waiting = asyncio.create_task(keeper.write(lambda _store: ran.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    await blocking
    with pytest.raises(NoSpaceLeft):
        await keeper.write(_full)
    await keeper.close()
    assert ran == [1]


def _full(*_args: object, **_more: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error
