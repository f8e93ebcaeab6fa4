"""Traces, as a real collector gets them over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mcp.client.client import Client
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from pydantic import SecretStr

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import ConfigError, RuntimeFailed
from engine.events import Document, Event, Frame, VideoResult
from engine.requests import Request, TextOperation, TextRequest, VideoRequest
from engine.runtimes.base import Prepared
from engine.usage import Usage
from server.app import create_app
from server.settings import ServerSettings, load_settings
from server.tracing import export, spans
from tests.engine.runtimes.remote.upstream import answers, upstream
from tests.server.fake import FakeRuntime, fake_engine, listening
from tests.server.tracing.collector import Collector, collecting

ROOT = Path(__file__).parents[3]
CHAT = "/v1/chat/completions"
KEY = "sk-a-very-secret-key"
PROMPT = "a very secret prompt"
BEARER = {"authorization": f"Bearer {KEY}"}
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
SERVER, CLIENT = 2, 3
ERROR = 2


async def work(request: Request) -> AsyncGenerator[Event, None]:
    if isinstance(request, VideoRequest):
        yield VideoResult(np.zeros((6, 64, 64, 3), np.uint8), 6, 0)
        return
    assert isinstance(request, TextRequest)
    if request.body["messages"] == "fail":
        raise RuntimeFailed(f"The model broke at {PROMPT}.")
    if request.body.get("stream"):
        yield Frame('data: {"choices": [{"finish_reason": null}]}\n\n')
        yield Frame('data: {"choices": [{"finish_reason": "length"}]}\n\n')
    else:
        yield Document(json.dumps({"choices": [{"finish_reason": "stop"}]}).encode())


class CountingRuntime(FakeRuntime):
    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if isinstance(request, VideoRequest):
            request = replace(request, fps=6, num_frames=6, width=64, height=64)
        return Prepared(request, None, usage=Usage(input_tokens=3, output_tokens=4))


@pytest.fixture
def runtime() -> FakeRuntime:
    runtime = CountingRuntime()
    runtime.answer = work
    return runtime


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    models = [
        {"id": name, "source": "none", "runtime": "fake", "options": {"nbytes": 6000}}
        for name in ("small", "other")
    ]
    return fake_engine(runtime, tmp_path, models=models)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@asynccontextmanager
async def traced(engine: Engine, collector: Collector) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with tracing. The collector has all spans at its end."""
    settings = ServerSettings(otlp_endpoint=collector.url, api_keys=(SecretStr(KEY),))
    async with (
        listening(create_app(engine, settings)) as url,
        httpx.AsyncClient(base_url=url, headers=BEARER, timeout=60) as client,
    ):
        yield client


async def chat(client: httpx.AsyncClient, model: str = "small", **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    return await client.post(
        CHAT, json={"model": model, "messages": PROMPT, **more}, headers=headers
    )


async def test_a_request_is_a_trace_of_the_client(engine: Engine, collector: Collector) -> None:
    async with traced(engine, collector) as client:
        answer = await chat(client, headers=TRACEPARENT, temperature=0.5, max_tokens=7)
        assert answer.status_code == 200, answer.text
        request_id = answer.headers["x-request-id"]
        await client.get("/health")  # probes come every few seconds, and are no spans
    assert collector.paths == ["/v1/traces"]
    assert collector.resource["service.name"] == "roundhouse"
    assert [span.trace_id for span in collector.spans] == [TRACE_ID] * 5

    request = collector.named(f"POST {CHAT}")
    assert (request.kind, request.parent_id) == (SERVER, PARENT_ID)
    assert request.attributes["http.route"] == CHAT
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["roundhouse.request_id"] == request_id
    assert request.attributes["roundhouse.caller"] == "config-1"
    (served,) = collector.children(request)
    assert served.name == "chat small"
    assert served.attributes["gen_ai.request.model"] == "small"
    assert served.attributes["gen_ai.response.model"] == "small"
    assert served.attributes["gen_ai.operation.name"] == "chat"
    assert served.attributes["gen_ai.request.temperature"] == 0.5
    assert served.attributes["gen_ai.request.max_tokens"] == 7
    assert served.attributes["gen_ai.usage.input_tokens"] == 3
    assert served.attributes["gen_ai.usage.output_tokens"] == 4
    assert served.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert served.attributes["roundhouse.tier"] == "disk"
    queue, run = collector.children(served)
    assert (queue.name, run.name) == ("queue", "run")
    assert run.attributes["gen_ai.usage.output_tokens"] == 4
    assert request.began_ns <= served.began_ns <= run.ended_ns <= request.ended_ns + 10**6
    (load,) = collector.children(queue)
    assert load.name == "load small"
    assert load.attributes["roundhouse.bytes"] == 6000
    assert load.attributes["roundhouse.tier"] == "disk"
    for body in collector.bodies:
        assert PROMPT.encode() not in body and KEY.encode() not in body


async def test_a_swap_has_what_left_and_what_came(engine: Engine, collector: Collector) -> None:
    async with traced(engine, collector) as client:
        await chat(client, "small")
        await chat(client, "other")
        await chat(client, "other")
    first, again = (span for span in collector.spans if span.name == "chat other")
    queue, _ = collector.children(first)
    assert [span.name for span in collector.children(queue)] == ["unload small", "load other"]
    unload, load = collector.children(queue)
    assert unload.attributes["roundhouse.bytes"] == 6000
    assert unload.attributes["roundhouse.tier"] == "device"
    assert queue.began_ns <= unload.ended_ns <= load.ended_ns
    queue, _ = collector.children(again)
    assert collector.children(queue) == []
    assert again.attributes["roundhouse.tier"] == "device"


async def test_streams_and_failures(engine: Engine, collector: Collector) -> None:
    async with traced(engine, collector) as client:
        await chat(client, stream=True)
        assert (await chat(client, messages="fail")).status_code == 500
        assert (await chat(client, "nobody")).status_code == 404
        assert (await client.get("/v1/images/files/secret.png")).status_code == 404
    streamed, failed = (span for span in collector.spans if span.name == "chat small")
    assert streamed.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert streamed.attributes["gen_ai.request.stream"] is True
    assert failed.status == ERROR and failed.attributes["error.type"] == "runtime_failed"
    nobody = collector.named("chat nobody")
    assert nobody.attributes["error.type"] == "model_not_found"
    collector.named("GET /v1/images/files/{name}")
    for body in collector.bodies:
        assert PROMPT.encode() not in body, "messages of errors may quote it"
        assert b"secret.png" not in body


async def test_a_client_that_leaves(
    engine: Engine, runtime: FakeRuntime, collector: Collector
) -> None:
    begun = asyncio.Event()

    async def stuck(_: Request) -> AsyncGenerator[Event, None]:
        yield Frame("data: a\n\n")
        begun.set()
        await asyncio.Event().wait()

    runtime.answer = stuck
    async with traced(engine, collector) as client:
        call = asyncio.create_task(chat(client, stream=True))
        await begun.wait()
        call.cancel()
        async with asyncio.timeout(30):
            while any(model.leases for model in engine.status().models):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    assert collector.named("chat small").status != ERROR
    assert collector.named("run").parent_id == collector.named("chat small").span_id


async def test_attempts_at_a_provider_join_the_trace(
    runtime: FakeRuntime, tmp_path: Path, collector: Collector
) -> None:
    answer = {
        "choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6},
    }
    async with upstream() as provider:
        provider.script = [answers({"error": {"message": "busy"}}, 503, retry_after="0")]
        provider.usual = answers(answer)
        cloud = {
            "id": "cloud",
            "runtime": "remote",
            "source": provider.url,
            "options": {"model": "theirs", "api_key": KEY, "provider": "mine"},
        }
        engine = fake_engine(runtime, tmp_path, models=[cloud])
        async with traced(engine, collector) as client:
            answered = await chat(client, "cloud", headers=TRACEPARENT)
            assert answered.status_code == 200, answered.text
        sent = [request.headers["traceparent"] for request in provider.requests]
    tries = [span for span in collector.spans if span.kind == CLIENT]
    tries.sort(key=lambda span: span.began_ns)
    assert [span.trace_id for span in tries] == [TRACE_ID] * 2
    assert sent == [f"00-{TRACE_ID}-{span.span_id}-01" for span in tries]
    failed, served = tries
    assert (failed.status, failed.attributes["http.response.status_code"]) == (ERROR, 503)
    assert served.attributes["http.response.status_code"] == 200
    assert served.attributes["http.request.resend_count"] == 1
    whole = collector.named("chat cloud")
    assert whole.attributes["gen_ai.usage.output_tokens"] == 6
    for body in collector.bodies:
        assert PROMPT.encode() not in body and KEY.encode() not in body


async def test_a_job_is_in_the_trace_of_its_request(engine: Engine, collector: Collector) -> None:
    async with traced(engine, collector) as client:
        body = {"model": "small", "prompt": PROMPT}
        async with asyncio.timeout(60):
            while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110 - a request
                await asyncio.sleep(0.01)
        job = (await client.post("/v1/videos", json=body, headers=TRACEPARENT)).json()
        async with asyncio.timeout(60):
            while True:
                state = (await client.get(f"/v1/videos/{job['id']}")).json()
                if state["status"] in ("completed", "failed"):
                    break
                await asyncio.sleep(0.01)
    assert state["status"] == "completed", state
    made = collector.named("video_generation small")
    assert made.trace_id == TRACE_ID
    assert made.parent_id == collector.named("POST /v1/videos").span_id
    assert made.attributes["roundhouse.request_id"] == job["id"]
    collector_names = {span.name for span in collector.spans}
    assert "GET /v1/videos/{video_id}" in collector_names


def test_so_many_jobs_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "MOST_REMEMBERED", 2)
    tracer = spans.SpanTracer(trace.NoOpTracer(), lambda _: None)  # type: ignore[arg-type, return-value]
    for job in "abc":
        tracer.submitted(job)
    assert [*tracer._submitted] == ["b", "c"]


async def test_a_tool_is_in_the_trace_of_its_call(engine: Engine, collector: Collector) -> None:
    settings = ServerSettings(otlp_endpoint=collector.url)
    async with (
        listening(create_app(engine, settings)) as url,
        Client(f"{url}/mcp") as client,
    ):
        await client.call_tool("list_models", {})
    inner = collector.named("GET /v1/models")
    outer = next(span for span in collector.spans if span.span_id == inner.parent_id)
    assert outer.name == "POST /mcp" and outer.trace_id == inner.trace_id


class TestCollectorIsDown:
    async def test_spans_are_dropped_with_one_line(
        self, engine: Engine, collector: Collector, caplog: pytest.LogCaptureFixture
    ) -> None:
        collector.status = 400
        with caplog.at_level(logging.INFO):
            async with traced(engine, collector) as client:
                for _ in range(3):
                    assert (await chat(client)).status_code == 200
        lines = [each for each in caplog.records if "collector" in each.getMessage()]
        assert [each.levelname for each in lines] == ["WARNING"]
        assert not [each for each in caplog.records if each.name.startswith("opentelemetry")]
        assert collector.spans == []

    def test_each_change_is_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        states = [False, False, True, True, False, True]

        class Unsteady(SpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                if states.pop(0):
                    return SpanExportResult.SUCCESS
                raise OSError("no collector")

        reporting = export._Reporting(Unsteady(), "host")
        with caplog.at_level(logging.INFO):
            while states:
                reporting.export([])
        levels = [each.levelname for each in caplog.records]
        assert levels == ["WARNING", "INFO", "WARNING", "INFO"]

    async def test_a_stop_does_not_wait_for_long(
        self, engine: Engine, collector: Collector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export, "FLUSH_S", 0.2)
        collector.may_answer.clear()
        async with traced(engine, collector) as client:
            assert (await chat(client)).status_code == 200
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 8, "its own timeout is 10 s, and it tries six times"


class TestOff:
    def test_nothing_is_imported(self, tmp_path: Path) -> None:
        code = """
import asyncio, sys
from pathlib import Path
from engine.runtimes.registry import REGISTRY
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine, listening
REGISTRY["fake"] = "tests.server.fake:FakeRuntime"
async def main():
    import httpx
    engine = fake_engine(FakeRuntime(), Path(sys.argv[1]))
    async with listening(create_app(engine, ServerSettings())) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            body = {"model": "small", "messages": []}
            (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    print(engine.tracer, [name for name in sys.modules if name.startswith("opentelemetry")],
          [name for name in sys.modules if name.startswith("server.tracing.")])
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "None [] ['server.tracing.open']"

    async def test_a_request_makes_no_calls_for_it(self, engine: Engine) -> None:
        """With a tracer these calls are there, so the test sees what it looks for."""
        app = create_app(engine, ServerSettings())
        assert app.outermost is app.requests
        async with app.router.lifespan_context(app):
            assert await calls_of_tracing(engine) == set()
            engine.tracer = _Nothing()
            assert await calls_of_tracing(engine) >= {
                "_Nothing.request", "_Nothing.opened", "_Nothing.gave", "_Nothing.ended",
                "_Nothing.moved", "Session.trace_by",
            }  # fmt: skip


class _Nothing:
    """A tracer that makes nothing."""

    def request(self, _: Any) -> Any:
        return self

    def moved(self, *_: Any) -> None: ...

    def submitted(self, _: str) -> None: ...

    def attempt(self, *_: Any) -> Any: ...

    def opened(self, *_: Any) -> None: ...

    def gave(self, _: Any) -> None: ...

    def ended(self, *_: Any) -> None: ...

    def failed(self, _: Any) -> None: ...


async def calls_of_tracing(engine: Engine) -> set[str]:
    """What a warm request calls of tracing."""
    request = TextRequest("small", TextOperation.CHAT, {"messages": PROMPT}, "r")
    found: set[str] = set()

    def observe(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            name = frame.f_code.co_qualname
            if "_Nothing." in name or "trace" in name or "tracing" in frame.f_code.co_filename:
                found.add(name)

    for round_number in range(2):
        if round_number == 1:
            found.clear()
            sys.setprofile(observe)
        try:
            session = await engine.open(request)
            async for _event in session.events():
                pass
        finally:
            sys.setprofile(None)
    return {name for name in found if "Nothing" in name or "trace_by" in name}


async def test_the_global_provider_is_left_alone(engine: Engine, collector: Collector) -> None:
    """Libraries in this process use it, and must not send their spans with ours."""
    before = trace.get_tracer_provider()
    async with traced(engine, collector) as client:
        await chat(client)
        with trace.get_tracer("a library").start_as_current_span("theirs"):
            pass
    assert trace.get_tracer_provider() is before
    assert "theirs" not in {span.name for span in collector.spans}


class TestSettings:
    def load(self, tmp_path: Path, **environ: str) -> ServerSettings:
        path = tmp_path / "config.yaml"
        path.write_text("models:\n  - {id: a, source: 'starter:tiny-llama'}\n")
        return load_settings(path, environ)[1]

    def test_the_collector_may_be_in_the_environment(self, tmp_path: Path) -> None:
        base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}
        assert self.load(tmp_path).otlp_endpoint is None
        assert self.load(tmp_path, **base).otlp_endpoint == "http://a:4318"
        whole = {**base, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:1/v1/traces"}
        assert self.load(tmp_path, **whole).otlp_endpoint == "http://b:1/v1/traces"
        own = {**base, "ROUNDHOUSE_OTLP_ENDPOINT": "http://c:4318"}
        assert self.load(tmp_path, **own).otlp_endpoint == "http://c:4318"
        assert self.load(tmp_path, **base, OTEL_SDK_DISABLED="true").otlp_endpoint is None
        assert self.load(tmp_path, **base, OTEL_TRACES_EXPORTER="none").otlp_endpoint is None

    @pytest.mark.parametrize(
        "wrong", ["localhost:4318", "grpc://a:4317", "http://", "http://me:secret@a", "http://a?b"]
    )
    def test_a_wrong_one_is_refused_without_its_words(self, wrong: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"server\.otlp_endpoint") as refused:
            self.load(tmp_path, ROUNDHOUSE_OTLP_ENDPOINT=wrong)
        assert "secret" not in str(refused.value)

    def test_the_path_is_added(self) -> None:
        for given in ("http://a:4318", "http://a:4318/", "http://a:4318/v1/traces"):
            assert export.traces_url(given) == "http://a:4318/v1/traces"

    def test_the_packages_are_missing(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [each for each in sys.modules if each.startswith("server.tracing.")]:
            if name != "server.tracing.open":
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
        with pytest.raises(ConfigError, match=r"pip install roundhouse\[tracing\]"):
            create_app(engine, ServerSettings(otlp_endpoint="http://localhost:4318"))
