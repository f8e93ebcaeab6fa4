"""A provider that misbehaves: nothing is lost that may pass, and nothing is tried that may not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError, InvalidRequest, LoadFailed, ProviderBusy, ProviderFailed
from engine.events import Document, Frame
from engine.runtimes.remote import transport
from engine.runtimes.remote.breaker import FAILURES_IN_A_ROW, FIRST_OPEN_S
from engine.runtimes.remote.latency import LEAST_SAMPLES
from engine.runtimes.remote.options import RemoteOptions
from tests.engine.runtimes.remote.conftest import KEY, World, chat
from tests.engine.runtimes.remote.upstream import (
    Received,
    Wire,
    answers,
    hangs,
    hangs_after,
    resets,
    streams,
)

WAIT_S = 30.0
GOOD: dict[str, Any] = {"object": "chat.completion", "model": "their-model", "choices": []}
CHUNK = 'data: {"choices":[{"delta":{"content":"a"},"index":0}],"model":"their-model"}\n\n'
LAST = 'data: {"choices":[{"delta":{},"index":0,"finish_reason":"stop"}]}\n\n'
ERROR = {"error": {"message": "It is broken.", "type": "server_error"}}


async def fails(world: World, kind: type[EngineError], **options: Any) -> EngineError:
    with pytest.raises(kind) as raised:
        await world.run(chat(), **options)
    return raised.value


async def works(world: World, **options: Any) -> None:
    (event,) = await world.run(chat(), **options)
    assert isinstance(event, Document) and json.loads(event.body)["model"] == "asked"


@pytest.mark.parametrize(
    "trouble",
    [
        answers(ERROR, 500),
        answers("<html>Bad gateway</html>", 502),
        answers(ERROR, 503),
        answers(ERROR, 529),
        answers(ERROR, 429),
        answers(ERROR, 408),
        resets,
        streams('{"half": ', ends=False, kind="application/json"),
        answers("<html>"),
        answers("[1]"),
    ],
    ids=["500", "502", "503", "529", "429", "408", "reset", "half", "garbage", "list"],
)
async def test_what_may_pass_is_tried_again(world: World, trouble: Any) -> None:
    world.upstream.script = [trouble, trouble]
    world.upstream.usual = answers(GOOD)
    await works(world)
    assert len(world.upstream.requests) == 3
    first, second = world.clock.slept
    assert 0.25 <= first <= 0.5 and 0.5 <= second <= 1.0, "exponential backoff with jitter"
    assert world.provider.retries == 2


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422])
async def test_what_is_wrong_is_said_at_once(world: World, status: int) -> None:
    said = {"error": {"message": f"No good, {KEY}.", "param": "temperature", "code": "x"}}
    world.upstream.usual = answers(said, status)
    error = await fails(world, InvalidRequest)
    assert isinstance(error, InvalidRequest)
    assert error.status == status and error.param == "temperature"
    assert "No good, [key]." in error.message
    assert len(world.upstream.requests) == 1
    assert world.provider.breaker.error_rate == 0.0


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_a_refused_key_is_ours_to_mend(world: World, status: int) -> None:
    said = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    world.upstream.usual = answers(said, status)
    error = await fails(world, ProviderFailed)
    assert KEY not in error.message and "Incorrect" not in error.message
    assert len(world.upstream.requests) == 1


async def test_other_statuses_are_failures(world: World) -> None:
    world.upstream.usual = answers(ERROR, 418)
    await fails(world, ProviderFailed)
    assert len(world.upstream.requests) == 1


async def test_retry_after_is_honoured_up_to_a_bound(world: World) -> None:
    world.upstream.script = [answers(ERROR, 429, Retry_After="4")]
    world.upstream.usual = answers(GOOD)
    await works(world)
    assert 4.0 <= sum(world.clock.slept) <= 4.5
    world.upstream.script = [answers(ERROR, 429, Retry_After="30")]
    error = await fails(world, ProviderBusy)
    assert isinstance(error, ProviderBusy) and error.retry_after_s == 30
    sent = len(world.upstream.requests)
    error = await fails(world, ProviderBusy)
    assert isinstance(error, ProviderBusy) and 20 < error.retry_after_s < 31
    assert len(world.upstream.requests) == sent, "until then it is not asked"
    assert world.provider.breaker.error_rate == 0.0, "it works, it only has enough"
    world.clock.now += 31
    await works(world)


async def test_a_burst_of_429_loses_no_request(world: World) -> None:
    world.upstream.script = [answers(ERROR, 429, Retry_After="1")] * 3
    world.upstream.usual = answers(GOOD)
    config, loaded = await world.load(retries=10)

    async def one() -> Any:
        prepared = world.runtime.prepare(config, chat())
        return [event async for event in loaded.run(prepared)]

    found = await asyncio.gather(*(one() for _ in range(10)))
    assert [len(events) for events in found] == [1] * 10


async def test_no_quota_is_not_tried_again(world: World) -> None:
    said = {"error": {"message": "Pay!", "code": "insufficient_quota"}}
    world.upstream.usual = answers(said, 429)
    error = await fails(world, ProviderBusy)
    assert isinstance(error, ProviderBusy) and error.retry_after_s == 60
    assert len(world.upstream.requests) == 1


async def test_a_hang_before_the_head(world: World) -> None:
    world.upstream.usual = hangs
    error = await fails(world, ProviderFailed, timeout_s=0.05)
    assert "did not answer within 0.05 s" in error.message
    # On a busy machine even the first may not have arrived.
    assert len(world.upstream.requests) <= 1, "who waited so long should not wait again"
    assert world.provider.retries == 0


async def test_the_timeout_is_learned(world: World) -> None:
    world.upstream.usual = answers(GOOD)
    for _ in range(LEAST_SAMPLES):
        await works(world)
    world.upstream.usual = hangs
    options: dict[str, Any] = {"timeout_s": 3600, "least_timeout_s": 0.01}
    # The clock of the provider stands still, so each answer took no time.
    world.target.options = world.config(**options).options_as(RemoteOptions)
    async with asyncio.timeout(WAIT_S):
        await fails(world, ProviderFailed, **options)


async def test_a_slow_drip_ends_at_the_timeout(world: World) -> None:
    async def drip(_: Received, wire: Wire) -> None:
        await wire.head(transfer_encoding="chunked")
        while not wire.left.is_set():
            await wire.chunk(" ")
            await asyncio.sleep(0.01)

    world.upstream.usual = drip
    await fails(world, ProviderFailed, timeout_s=0.1)


async def test_a_huge_answer_is_not_read_to_its_end(world: World) -> None:
    async def flood(_: Received, wire: Wire) -> None:
        await wire.head(transfer_encoding="chunked")
        while not wire.left.is_set():
            await wire.chunk(b" " * 2**16)

    world.upstream.usual = flood
    error = await fails(world, ProviderFailed, max_answer="1MiB")
    assert "more than 1.0 MiB" in error.message
    world.upstream.usual = streams(*["data: " + "x" * 2**16] * 40)
    with pytest.raises(ProviderFailed, match="an event of more than"):
        await world.run(chat(stream=True), max_answer="1MiB")


async def test_nobody_listens(world: World, unused_tcp_port: int) -> None:
    error = await fails(world, ProviderFailed, source=f"http://127.0.0.1:{unused_tcp_port}/v1")
    assert "cannot be reached" in error.message
    assert len(world.clock.slept) == 2


async def test_a_tls_error_is_not_tried_again(world: World) -> None:
    async def speak_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 This is no TLS\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(speak_plainly, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await fails(world, ProviderFailed, source=f"https://127.0.0.1:{port}/v1")
    assert "TLS: " in error.message
    assert world.clock.slept == []


async def test_a_handshake_that_hangs_ends_at_the_timeout_of_a_connection(world: World) -> None:
    source = world.upstream.url.replace("http", "https")  # it waits for a request
    options: dict[str, Any] = {"source": source, "connect_timeout_s": 0.05}
    error = await fails(world, ProviderFailed, **options)
    assert "was not reached in time" in error.message
    assert len(world.clock.slept) == 2


async def test_a_redirect_is_not_followed(world: World) -> None:
    world.upstream.usual = answers("", 307, Location="http://169.254.169.254/latest/?token=secret")
    error = await fails(world, ProviderFailed)
    assert "redirects to 169.254.169.254" in error.message and "secret" not in error.message
    assert len(world.upstream.requests) == 1


class TestPrivateAddresses:
    @pytest.fixture(autouse=True)
    def resolver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def resolve(host: str, port: int, limit_s: float | None) -> list[str]:
            return {"ollama.example": ["127.0.0.1"]}[host]

        monkeypatch.setattr(transport, "_resolve", resolve)

    async def test_a_name_that_leads_to_one_is_refused(self, world: World) -> None:
        source = world.upstream.url.replace("127.0.0.1", "ollama.example")
        error = await fails(world, ProviderFailed, source=source)
        assert "the private address 127.0.0.1" in error.message
        assert "the option 'private' allows it" in error.message
        assert world.upstream.connections == 0 and world.clock.slept == []

    async def test_unless_the_configuration_allows_it(self, world: World) -> None:
        world.upstream.usual = answers(GOOD)
        source = world.upstream.url.replace("127.0.0.1", "ollama.example")
        await works(world, source=source, private=True)
        assert world.upstream.requests[0].headers["host"].startswith("ollama.example:")


async def test_a_stream_that_breaks(world: World) -> None:
    world.upstream.usual = streams(CHUNK, CHUNK, ends=False)
    config, loaded = await world.load()
    prepared = world.runtime.prepare(config, chat(stream=True))
    got = []
    with pytest.raises(ProviderFailed, match="in the middle of its answer"):
        async for event in loaded.run(prepared):
            got.append(event)
    assert len(got) == 2
    assert len(world.upstream.requests) == 1, "never again after the first byte"
    assert world.provider.breaker.error_rate == 1.0


async def test_a_stream_that_ends_too_soon(world: World) -> None:
    world.upstream.usual = streams(CHUNK)
    with pytest.raises(ProviderFailed, match="ends in the middle"):
        await world.run(chat(stream=True))


async def test_a_stream_without_its_last_event_is_whole(world: World) -> None:
    world.upstream.usual = streams(CHUNK, LAST)
    events = await world.run(chat(stream=True))
    assert events[-1] == Frame("data: [DONE]\n\n")


async def test_a_stream_that_breaks_before_its_first_event_is_tried_again(world: World) -> None:
    world.upstream.script = [streams(": wait\n\n", ends=False), streams(": wait\n\n")]
    world.upstream.usual = streams(": wait\n\n", CHUNK, LAST, "data: [DONE]\n\n")
    events = await world.run(chat(stream=True))
    assert len(events) == 3, "comments before the first event would begin the response"
    assert len(world.upstream.requests) == 3


async def test_a_hang_in_a_stream(world: World) -> None:
    world.upstream.usual = hangs_after(CHUNK)
    with pytest.raises(ProviderFailed, match="sent nothing more within"):
        await world.run(chat(stream=True), idle_timeout_s=0.05)
    async with asyncio.timeout(WAIT_S):
        await world.upstream.left.wait()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "No good.", "code": 400}, InvalidRequest),
        ({"message": "No good.", "type": "invalid_request_error"}, InvalidRequest),
        ({"message": "Enough.", "code": 429}, ProviderBusy),
        ({"message": "Bad key", "code": 401}, ProviderFailed),
        ({"message": "Broken.", "code": 502}, ProviderFailed),
    ],
)
async def test_an_error_as_the_first_event_fails_before_the_first_byte(
    world: World, error: Any, kind: type[EngineError]
) -> None:
    world.upstream.usual = streams(f"data: {json.dumps({'error': error})}\n\n")
    with pytest.raises(kind):
        await world.run(chat(stream=True), retries=0)


async def test_an_error_in_a_stream_ends_it(world: World) -> None:
    error = json.dumps({"error": {"message": f"Broken, {KEY}.", "code": 502}})
    world.upstream.usual = streams(CHUNK, f"data: {error}\n\n", CHUNK)
    with pytest.raises(ProviderFailed, match=r"Broken, \[key\]\."):
        await world.run(chat(stream=True))


async def test_a_page_in_the_place_of_a_stream(world: World) -> None:
    world.upstream.usual = answers("<html>Please log in</html>")
    with pytest.raises(ProviderFailed):
        await world.run(chat(stream=True), retries=0)
    world.upstream.usual = streams("<html>\n\n<body>", kind="text/html")
    with pytest.raises(ProviderFailed, match="a stream without an event"):
        await world.run(chat(stream=True), retries=0)


async def test_a_refusal_in_a_stream_shows_no_key(world: World) -> None:
    error = json.dumps({"error": {"message": f"No good, {KEY}.", "code": 400}})
    world.upstream.usual = streams(CHUNK, f"data: {error}\n\n")
    with pytest.raises(InvalidRequest, match=r"No good, \[key\]\."):
        await world.run(chat(stream=True))


async def test_outcomes_are_counted_once(world: World) -> None:
    world.upstream.script = [streams(CHUNK, ends=False), answers(ERROR, 400), answers(ERROR, 500)]
    world.upstream.usual = answers(GOOD)
    for request in (chat(stream=True), chat(), chat(), chat()):
        with contextlib.suppress(EngineError):
            await world.run(request, retries=0)
    assert world.provider.outcomes == {"broken": 1, "invalid": 1, "failed": 1, "ok": 1}


async def test_closing_a_run_closes_the_connection_at_once(world: World) -> None:
    world.upstream.usual = hangs_after(CHUNK)
    config, loaded = await world.load()
    run = loaded.run(world.runtime.prepare(config, chat(stream=True)))
    assert isinstance(await anext(run), Frame)
    client = world.provider._client
    assert client is not None
    pool: Any = client._transport
    assert len(pool._pool.connections) == 1
    await run.aclose()
    assert pool._pool.connections == [], "not only when its garbage is collected"
    async with asyncio.timeout(WAIT_S):
        await world.upstream.left.wait()
    assert world.provider.breaker.error_rate == 0.0, "the client left, the provider did nothing"


async def test_cancelling_before_the_answer_closes_the_connection(world: World) -> None:
    began = asyncio.Event()

    async def begin(received: Received, wire: Wire) -> None:
        began.set()
        await hangs(received, wire)

    world.upstream.usual = begin
    task = asyncio.create_task(world.run(chat()))
    async with asyncio.timeout(WAIT_S):
        await began.wait()
        task.cancel()
        await world.upstream.left.wait()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.provider.breaker.error_rate is None
    assert world.usage.input_tokens > 5, "the provider bills the prompt"


async def test_a_connection_is_kept(world: World) -> None:
    world.upstream.usual = streams(CHUNK, LAST, "data: [DONE]\n\n")
    for _ in range(3):
        await world.run(chat(stream=True))
    world.upstream.usual = answers(GOOD)
    await works(world)
    assert world.upstream.connections == 1


async def test_the_breaker_opens_and_closes(world: World) -> None:
    world.upstream.usual = answers(ERROR, 500)
    for _ in range(FAILURES_IN_A_ROW):
        await fails(world, ProviderFailed, retries=0)
    sent = len(world.upstream.requests)
    error = await fails(world, ProviderBusy)
    assert isinstance(error, ProviderBusy) and error.retry_after_s == FIRST_OPEN_S
    assert len(world.upstream.requests) == sent
    (status,) = world.runtime.providers()
    assert status.breaker == "open" and status.error_rate == 1.0
    world.clock.now += FIRST_OPEN_S
    world.upstream.usual = answers(GOOD)
    assert world.runtime.providers()[0].breaker == "half_open"
    await works(world)
    assert world.runtime.providers()[0].breaker == "closed"


async def test_a_probe_whose_client_leaves_makes_room_for_another(world: World) -> None:
    world.upstream.usual = answers(ERROR, 500)
    for _ in range(FAILURES_IN_A_ROW):
        await fails(world, ProviderFailed, retries=0)
    world.clock.now += FIRST_OPEN_S
    began = asyncio.Event()

    async def begin(received: Received, wire: Wire) -> None:
        began.set()
        await hangs(received, wire)

    world.upstream.script = [begin]
    world.upstream.usual = answers(GOOD)
    probe = asyncio.create_task(world.run(chat()))
    async with asyncio.timeout(WAIT_S):
        await began.wait()
    await fails(world, ProviderBusy)
    probe.cancel()
    await asyncio.wait([probe])
    await works(world)


async def test_models_of_one_provider_share_its_breaker(world: World) -> None:
    world.upstream.usual = answers(ERROR, 500)
    for _ in range(FAILURES_IN_A_ROW):
        await fails(world, ProviderFailed, retries=0)
    config = world.config(provider="cloud").model_copy(update={"id": "other"})
    loaded = await world.runtime.load(config, lambda reason: None)
    with pytest.raises(ProviderBusy):
        await anext(loaded.run(world.runtime.prepare(config, chat())))
    assert [each.model for each in world.runtime.providers()[0].models] == ["cloud", "other"]


async def test_limits_of_the_configuration(world: World) -> None:
    world.upstream.usual = answers(GOOD)
    options = {"requests_per_minute": 2, "max_wait_s": 10}
    await works(world, **options)
    await works(world, **options)
    error = await fails(world, ProviderBusy, **options)
    assert isinstance(error, ProviderBusy) and error.retry_after_s == 60
    world.clock.now += 55
    await works(world, **options)
    assert world.clock.slept == [5.0], "it waited for its turn"


async def test_tokens_of_the_configuration_are_those_that_were_used(world: World) -> None:
    world.upstream.usual = answers(
        {**GOOD, "usage": {"prompt_tokens": 900, "completion_tokens": 90}}
    )
    await works(world, tokens_per_minute=1000)
    assert world.runtime.providers()[0].models[0].tokens_left == 10
    await fails(world, ProviderBusy, tokens_per_minute=1000)


async def test_limits_that_the_provider_tells(world: World) -> None:
    world.upstream.usual = answers(
        GOOD,
        x_ratelimit_remaining_requests="0",
        x_ratelimit_reset_requests="3s",
        x_ratelimit_remaining_tokens="123",
    )
    await works(world)
    (model,) = world.runtime.providers()[0].models
    assert (model.requests_left, model.tokens_left, model.blocked_s) == (0, 123, 3.0)
    await works(world)
    assert world.clock.slept == [3.0]


class TestKeys:
    async def test_a_missing_key_is_a_failed_load(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CLOUD_KEY", raising=False)
        with pytest.raises(LoadFailed, match="the variable CLOUD_KEY holds no key"):
            await world.load(api_key="env:CLOUD_KEY")
        (status,) = world.runtime.providers()
        assert status.last_error == "the variable CLOUD_KEY holds no key"

    async def test_a_rotated_key_is_sent_at_once(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.upstream.usual = answers(GOOD)
        for key in ("sk-first", "sk-second"):
            monkeypatch.setenv("CLOUD_KEY", key)
            await works(world, api_key="env:CLOUD_KEY")
            assert world.upstream.requests[-1].headers["authorization"] == f"Bearer {key}"

    async def test_a_401_reads_the_file_once_more(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "key"
        path.write_text("sk-old-key")
        config, loaded = await world.load(api_key=f"file:{path}")
        secret = world.target._key
        assert secret is not None

        async def replaced(received: Received, wire: Wire) -> None:
            path.write_text("sk-new-key")
            found = path.stat()
            secret._stamp = (found.st_mtime_ns, found.st_size)  # within one tick of its time
            await answers(ERROR, 401)(received, wire)

        world.upstream.script = [replaced]
        world.upstream.usual = answers(GOOD)
        prepared = world.runtime.prepare(config, chat())
        assert [event async for event in loaded.run(prepared)]
        sent = [each.headers["authorization"] for each in world.upstream.requests]
        assert sent == ["Bearer sk-old-key", "Bearer sk-new-key"]
        assert world.clock.slept == []

    async def test_other_headers(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEAM", "team-seven")
        world.upstream.usual = answers(GOOD)
        await works(world, key_header="api-key", headers={"X-Team": "env:TEAM", "X-Title": "me"})
        headers = world.upstream.requests[-1].headers
        assert headers["api-key"] == KEY and "authorization" not in headers
        assert (headers["x-team"], headers["x-title"]) == ("team-seven", "me")
        assert headers["x-request-id"] == "req-1"

    async def test_no_key_sends_none(self, world: World) -> None:
        world.upstream.usual = answers(GOOD)
        await works(world, api_key=None)
        assert "authorization" not in world.upstream.requests[-1].headers

    async def test_it_is_nowhere(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        said = json.dumps({"error": {"message": f"You sent {KEY}", "code": 500}})
        world.upstream.script = [
            answers(said, 500),
            answers(f"garbage {KEY}"),
            streams(CHUNK, f"data: {said}\n\n"),
        ]
        world.upstream.usual = answers(said, 400)
        texts = [repr(world.config())]
        for request in (chat(), chat(), chat(stream=True), chat()):
            try:
                await world.run(request, retries=0)
            except EngineError as error:
                texts += [str(error), error.message, repr(error)]
        config, loaded = await world.load()
        texts += [repr(config), str(vars(loaded)), repr(world.target), str(vars(world.target))]
        texts += [str(world.runtime.providers()), caplog.text]
        assert world.runtime.metrics is not None
        texts += [str(metric.samples) for metric in world.runtime.metrics.collect()]
        assert len(world.upstream.requests) == 4
        assert all(KEY in each.headers["authorization"] for each in world.upstream.requests)
        assert not [text for text in texts if KEY in text]
