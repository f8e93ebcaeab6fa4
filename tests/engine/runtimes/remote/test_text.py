"""Text: what goes to a provider, what comes back, and what is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import InvalidRequest, ProviderFailed
from engine.events import Document, Event, Frame
from engine.requests import SpeechRequest, TextOperation, TextRequest
from tests.engine.runtimes.remote.conftest import KEY, World, chat
from tests.engine.runtimes.remote.upstream import answers, streams


def text(operation: TextOperation, **body: Any) -> TextRequest:
    return TextRequest("asked", operation, {"model": "asked", **body}, request_id="req-1")


def sse(*documents: Any) -> list[str]:
    return [f"data: {json.dumps(each)}\n\n" for each in documents]


def loaded(events: list[Event]) -> list[Any]:
    """The documents of frames."""
    found = []
    for event in events:
        assert isinstance(event, Frame)
        (line,) = [each for each in event.data.splitlines() if each.startswith("data:")]
        data = line.removeprefix("data:").strip()
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


COUNTS = {
    "prompt_tokens": 10,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 6},
}


@pytest.mark.parametrize(
    ("operation", "path", "usage"),
    [
        (TextOperation.CHAT, "/v1/chat/completions", COUNTS),
        (TextOperation.COMPLETION, "/v1/completions", COUNTS),
        (
            TextOperation.RESPONSES,
            "/v1/responses",
            {
                "input_tokens": 10,
                "output_tokens": 4,
                "input_tokens_details": {"cached_tokens": 6},
            },
        ),
        (
            TextOperation.MESSAGES,
            "/v1/messages",
            {
                "input_tokens": 3,
                "cache_read_input_tokens": 6,
                "cache_creation_input_tokens": 1,
                "output_tokens": 4,
            },
        ),
    ],
)
async def test_a_whole_answer(
    world: World, operation: TextOperation, path: str, usage: dict[str, Any]
) -> None:
    theirs = {
        "id": "x",
        "model": "their-model-2024",
        "new_field": {"model": "kept"},
        "usage": usage,
    }
    world.upstream.usual = answers(theirs)
    request = text(operation, temperature=0.5, something_new=[1])
    apis = ["chat", "completions", "responses", "messages"]
    (event,) = await world.run(request, apis=apis)
    assert isinstance(event, Document)
    assert json.loads(event.body) == {**theirs, "model": "asked"}
    (received,) = world.upstream.requests
    assert received.path == path
    assert received.json == {"model": "their-model", "temperature": 0.5, "something_new": [1]}
    counted = world.usage
    assert (counted.input_tokens, counted.cached_tokens, counted.output_tokens) == (10, 6, 4)


@pytest.mark.parametrize(
    "counts",
    [
        None,
        "many",
        {},
        {"prompt_tokens": -9, "completion_tokens": -9, "cost": -1},
        {"prompt_tokens": 10**23, "completion_tokens": 10**23, "cost": 1e300},
        {"prompt_tokens": "9", "completion_tokens": 1e5, "cost": float("nan")},
    ],
)
async def test_a_whole_answer_without_usable_counts_is_estimated(world: World, counts: Any) -> None:
    written = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "a" * 400}}]}
    world.upstream.usual = answers({**written, "usage": counts})
    await world.run(chat())
    usage = world.usage
    assert 5 < usage.input_tokens < 100 and 100 <= usage.output_tokens < 150
    assert usage.price is None


async def test_a_whole_answer_may_have_no_output(world: World) -> None:
    given = {"prompt_tokens": 10, "completion_tokens": 0}
    details = {"prompt_tokens_details": {"cached_tokens": 99}}
    choice = {"index": 0, "message": {"role": "assistant", "content": "a" * 400}}
    world.upstream.usual = answers({"choices": [choice], "usage": given | details})
    await world.run(chat())
    usage = world.usage
    assert (usage.input_tokens, usage.cached_tokens, usage.output_tokens) == (10, 10, 0)


async def test_embeddings(world: World) -> None:
    world.upstream.usual = answers({"data": [], "model": "x", "usage": {"prompt_tokens": 7}})
    await world.run(text(TextOperation.EMBEDDINGS, input="a"), task="embed")
    assert world.upstream.requests[0].path == "/v1/embeddings"
    assert world.usage.input_tokens == 7


async def test_messages_have_anthropics_headers(world: World) -> None:
    world.upstream.usual = answers({"input_tokens": 3})
    await world.run(text(TextOperation.COUNT_TOKENS), apis=["messages"])
    (received,) = world.upstream.requests
    assert received.path == "/v1/messages/count_tokens"
    assert received.headers["x-api-key"] == KEY and "authorization" not in received.headers
    assert received.headers["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize("asks", [True, False])
async def test_a_streamed_chat(world: World, asks: bool) -> None:
    chunks: list[dict[str, Any]] = [
        {"model": "theirs", "choices": [{"index": 0, "delta": {"content": "é\u2028"}}]},
        {"model": "theirs", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    extra: dict[str, Any] = {"model": "theirs", "choices": [], "usage": {**COUNTS, "cost": 0.25}}
    frames = [": processing\n\n", *sse(chunks[0]), ": alive\n\n", *sse(chunks[1], extra)]
    world.upstream.usual = streams(*frames, "data: [DONE]\n\n")
    body = {"stream_options": {"include_usage": True, "other": 1}} if asks else {}
    events = await world.run(chat(stream=True, **body))
    assert events[1] == Frame(": alive\n\n")
    got = loaded([*events[:1], *events[2:]])
    expected = [{**each, "model": "asked"} for each in [*chunks, *([extra] if asks else [])]]
    assert got == [*expected, "[DONE]"]
    sent = world.upstream.requests[0].json["stream_options"]
    assert sent == ({"include_usage": True, "other": 1} if asks else {"include_usage": True})
    usage = world.usage
    assert (usage.input_tokens, usage.cached_tokens, usage.output_tokens) == (10, 6, 4)
    assert usage.price == 0.25


async def test_an_answer_does_not_show_the_key(world: World) -> None:
    said = {"choices": [{"delta": {"content": f"you sent {KEY}."}, "finish_reason": "stop"}]}
    world.upstream.usual = answers(said)
    (document,) = await world.run(chat())
    assert isinstance(document, Document)
    world.upstream.usual = streams(f": {KEY}\n\n", *sse(said), f": {KEY}\n\n")
    frames = [each for each in await world.run(chat(stream=True)) if isinstance(each, Frame)]
    texts = [document.body.decode(), *(each.data for each in frames)]
    assert len(texts) > 2 and "you sent [key]." in texts[0] and "you sent [key]." in texts[1]
    assert not any(KEY in each for each in texts)


async def test_a_word_that_stands_for_a_key_stays_in_answers(world: World) -> None:
    world.upstream.usual = answers({"choices": [{"message": {"content": "ask ollama"}}]})
    site = "https://site.example.com/"
    (document,) = await world.run(chat(), api_key="ollama", headers={"http-referer": site})
    assert isinstance(document, Document) and b"ask ollama" in document.body


async def test_usage_is_not_asked_for_where_the_provider_refuses_it(world: World) -> None:
    world.upstream.usual = streams(*sse({"choices": [{"finish_reason": "stop"}]}))
    await world.run(chat(stream=True), stream_usage=False)
    assert "stream_options" not in world.upstream.requests[0].json


async def test_events_are_cut_anyhow_by_the_network(world: World) -> None:
    whole = "".join(sse(*({"choices": [{"delta": {"content": "ä" * n}}]} for n in range(1, 20))))
    raw = (whole + "data: [DONE]\n\n").replace("\n", "\r\n").encode()
    world.upstream.usual = streams(*(raw[at : at + 11] for at in range(0, len(raw), 11)))
    events = await world.run(chat(stream=True))
    contents = [each["choices"][0]["delta"]["content"] for each in loaded(events)[:-1]]
    assert contents == ["ä" * n for n in range(1, 20)]


async def test_a_stream_that_is_left_has_what_it_took(world: World) -> None:
    chunk = sse({"choices": [{"index": 0, "delta": {"content": "a"}}]})
    world.upstream.usual = streams(*chunk * 5)
    config, model = await world.load()
    prepared = world.runtime.prepare(config, chat(stream=True))
    run = model.run(prepared)
    for _ in range(3):
        await anext(run)
    await run.aclose()
    assert prepared.usage.output_tokens >= 3 and prepared.usage.input_tokens > 5


async def test_streamed_responses(world: World) -> None:
    inner = {"object": "response", "model": "theirs", "error": None}
    last = {**inner, "usage": {"input_tokens": 5, "output_tokens": 2}}
    created = json.dumps({"type": "response.created", "response": inner})
    frames = [
        f"event: response.created\ndata: {created}\n\n",
        'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}'
        "\n\n",
        f"event: response.completed\ndata: "
        f"{json.dumps({'type': 'response.completed', 'response': last})}\n\n",
    ]
    world.upstream.usual = streams(*frames)
    events = await world.run(text(TextOperation.RESPONSES, input="a", stream=True))
    assert events[1] == Frame(frames[1]), "what needs no change is not changed"
    first, _, end = loaded(events)
    assert first["response"]["model"] == end["response"]["model"] == "asked"
    assert (world.usage.input_tokens, world.usage.output_tokens) == (5, 2)
    assert "stream_options" not in world.upstream.requests[0].json
    world.upstream.usual = streams(*frames[:2])
    with pytest.raises(ProviderFailed, match="ends in the middle"):
        await world.run(text(TextOperation.RESPONSES, input="a", stream=True))


async def test_streamed_messages(world: World) -> None:
    start: dict[str, Any] = {
        "type": "message_start",
        "message": {"model": "theirs", "usage": {"input_tokens": 5, "output_tokens": 1}},
    }
    documents: list[dict[str, Any]] = [
        start,
        {"type": "content_block_delta", "delta": {"text": "a"}},
        {"type": "message_delta", "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]
    world.upstream.usual = streams(
        *(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in documents)
    )
    request = text(TextOperation.MESSAGES, stream=True)
    events = await world.run(request, apis=["messages"])
    got = loaded(events)
    assert got[0]["message"]["model"] == "asked" and got[1:] == documents[1:]
    assert isinstance(events[0], Frame) and events[0].data.startswith("event: message_start\n")
    assert (world.usage.input_tokens, world.usage.output_tokens) == (5, 9)


async def test_a_document_in_the_place_of_a_stream(world: World) -> None:
    world.upstream.usual = answers({"model": "x", "choices": []})
    (event,) = await world.run(chat(stream=True))
    assert isinstance(event, Document)


@pytest.mark.parametrize(
    ("task", "operation", "options"),
    [
        ("generate", TextOperation.EMBEDDINGS, {}),
        ("embed", TextOperation.CHAT, {}),
        ("generate", TextOperation.MESSAGES, {}),
        ("generate", TextOperation.TOKENIZE, {}),
        ("generate", TextOperation.RESPONSES, {"apis": ["chat"]}),
        ("image", TextOperation.CHAT, {}),
        ("generate", TextOperation.RERANK, {}),
        ("embed", TextOperation.FILL_MASK, {}),
    ],
)
def test_what_the_provider_does_not_have_is_refused(
    world: World, task: str, operation: TextOperation, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=f"does not support {operation.value}"):
        world.runtime.prepare(world.config(task, **options), text(operation))


def test_another_kind_of_request_is_refused(world: World) -> None:
    request = SpeechRequest(model="asked", text="a", request_id="r")
    with pytest.raises(InvalidRequest, match="does not support speech"):
        world.runtime.prepare(world.config(), request)


def test_tools_and_images_are_refused_where_the_configuration_says_so(world: World) -> None:
    tools = chat(tools=[{"type": "function", "function": {"name": "f"}}])
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    sees = chat(messages=[{"role": "user", "content": image}])
    for request in (tools, sees):
        world.runtime.prepare(world.config(), request)
    for request, param in ((tools, "tools"), (sees, "messages")):
        with pytest.raises(InvalidRequest) as raised:
            world.runtime.prepare(world.config(tools=False, vision=False), request)
        assert raised.value.param == param


async def test_half_a_pair_of_surrogates_is_passed_on(world: World) -> None:
    world.upstream.usual = answers('{"model":"x","text":"\\ud83d"}')
    (event,) = await world.run(chat(user="\ud83d"))
    assert isinstance(event, Document) and json.loads(event.body)["text"] == "\ud83d"
    assert world.upstream.requests[0].json["user"] == "\ud83d"


async def test_turns_that_the_server_kept(world: World) -> None:
    """No id of another provider goes on, and no thoughts that it has not encrypted itself."""
    world.upstream.usual = answers({"id": "x", "object": "response", "output": []})
    kept = [
        {"type": "message", "id": "msg_1", "role": "assistant", "content": []},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"text": "hm"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "xyz"},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
    ]
    own = [
        {"type": "reasoning", "id": "rs_3", "summary": []},
        {"type": "function_call_output", "id": "fco_1", "call_id": "c", "output": "it"},
    ]
    body = {"model": "asked", "input": [*kept, *own]}
    request = TextRequest("asked", TextOperation.RESPONSES, body, "req-1", history=len(kept))
    await world.run(request, apis=["responses"])
    (received,) = world.upstream.requests
    assert received.json["input"] == [
        {"type": "message", "role": "assistant", "content": []},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "xyz"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        *own,
    ]


async def test_tokens_of_a_response_are_counted_by_the_provider(world: World) -> None:
    world.upstream.usual = answers({"object": "response.input_tokens", "input_tokens": 7})
    (event,) = await world.run(text(TextOperation.INPUT_TOKENS, input="hi"), apis=["responses"])
    assert isinstance(event, Document)
    assert json.loads(event.body)["input_tokens"] == 7
    (received,) = world.upstream.requests
    assert received.path == "/v1/responses/input_tokens"
