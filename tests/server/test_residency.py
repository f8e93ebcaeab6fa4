"""What a request may say about the residency of its model, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Collection
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import SecretStr

from engine import admission
from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import RuntimeFailed
from engine.events import Event, ImageResult, WorkingMemory
from engine.memory.block import Block, Estimate
from engine.requests import Priority, Request, SchedulingOptions
from engine.runtimes.base import LoadedModel, Prepared
from engine.status import ModelState
from server.app import create_app
from server.settings import ServerSettings
from server.start import Start
from tests.server.fake import DEVICE_BYTES, FakeLoaded, FakeRuntime, fake_engine

CHAT = "/v1/chat/completions"
PLAN = "/v1/engine/plan"
TIMEOUT_S = 60
HALF_BYTES = DEVICE_BYTES // 2 + 1
"""Two of them do not fit."""
MODELS: list[dict[str, Any]] = [
    {"id": "small", "source": "none", "runtime": "fake", "options": {"nbytes": HALF_BYTES}},
    {"id": "other", "source": "none", "runtime": "fake", "options": {"nbytes": HALF_BYTES}},
    {"id": "big", "source": "none", "runtime": "fake", "options": {"nbytes": 10 * DEVICE_BYTES}},
]
RECORDING = ("a.wav", b"RIFF", "audio/wav")


class Parkable(FakeLoaded):
    """A model whose one block has a host copy, where it can be parked."""

    def __init__(self, model: ModelConfig, runtime: FakeRuntime, *, parkable: bool) -> None:
        super().__init__(model, runtime)
        self._parkable = parkable

    def blocks(self) -> tuple[Block, ...]:
        (block,) = super().blocks()
        return (Block(block.name, block.nbytes, parkable=self._parkable),)


class ResidencyRuntime(FakeRuntime):
    """Parks if it may, and measures what its runs take."""

    parkable = True
    shape = ""
    working_bytes = 0

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        return Prepared(request, None, self.working_bytes, self.shape)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        return Parkable(model, self, parkable=self.parkable)

    async def park(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        pass

    async def wake(self, loaded: LoadedModel, blocks: Collection[str]) -> None:
        pass


@pytest.fixture
def runtime() -> ResidencyRuntime:
    return ResidencyRuntime()


@pytest.fixture
def engine(runtime: ResidencyRuntime, tmp_path: Path) -> Engine:
    return fake_engine(runtime, tmp_path, models=MODELS)


@pytest.fixture
def start(engine: Engine) -> Start:
    return Start(engine)


@pytest.fixture
def app(engine: Engine, settings: ServerSettings, start: Start) -> FastAPI:
    return create_app(engine, settings, start)


@pytest.fixture
async def started(client: httpx.AsyncClient, start: Start) -> None:
    """The jobs are served as well."""
    async with asyncio.timeout(TIMEOUT_S):
        await start.done.wait()


def state(engine: Engine, model: str) -> ModelState:
    return engine.model_status(model).state


Send = Callable[..., Any]
"""Sends extra fields and headers to an endpoint."""


def as_json(path: str, **fields: object) -> Send:
    def send(client: httpx.AsyncClient, extra: dict[str, Any], headers: dict[str, str]) -> Any:
        return client.post(path, json={"model": "small", **fields, **extra}, headers=headers)

    return send


def as_form(path: str, **files: tuple[str, bytes, str]) -> Send:
    def send(client: httpx.AsyncClient, extra: dict[str, Any], headers: dict[str, str]) -> Any:
        texts = {name: str(value).lower() for name, value in extra.items()}
        return client.post(path, data={"model": "small", **texts}, files=files, headers=headers)

    return send


ENDPOINTS: dict[str, tuple[Send, Priority]] = {
    "chat": (as_json(CHAT), Priority.NORMAL),
    "messages": (as_json("/v1/messages"), Priority.NORMAL),
    "embeddings": (as_json("/v1/embeddings"), Priority.NORMAL),
    "image": (as_json("/v1/images/generations", prompt="a"), Priority.NORMAL),
    "speech": (as_json("/v1/audio/speech", input="a"), Priority.INTERACTIVE),
    "transcription": (
        as_form("/v1/audio/transcriptions", file=RECORDING),
        Priority.INTERACTIVE,
    ),
    "video": (as_json("/v1/videos", prompt="a"), Priority.BATCH),
}

every_endpoint = pytest.mark.parametrize(
    ("send", "default"), ENDPOINTS.values(), ids=ENDPOINTS.keys()
)


@pytest.fixture
async def opened(started: None, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the engine; nothing runs."""
    requests: list[Any] = []

    def prepare(request: Request) -> None:
        requests.append(request)
        raise RuntimeFailed("It got as far as the test wanted.")

    async def open_session(request: Request, _waiting: object = None) -> None:
        prepare(request)

    monkeypatch.setattr(engine, "open", open_session)
    monkeypatch.setattr(engine, "prepare", prepare)
    return requests


class TestTerms:
    @every_endpoint
    async def test_fields_of_the_body(
        self, client: httpx.AsyncClient, opened: list[Any], send: Send, default: Priority
    ) -> None:
        await send(client, {}, {})
        await send(
            client,
            {
                "keep_alive": "10m",
                "if_loaded_only": True,
                "no_evict": True,
                "priority": "normal",
                "timeout": 2.5,
            },
            {},
        )
        assert [request.scheduling for request in opened] == [
            SchedulingOptions(priority=default),
            SchedulingOptions(
                keep_alive_s=600,
                if_loaded_only=True,
                no_evict=True,
                priority=Priority.NORMAL,
                timeout_s=2.5,
            ),
        ]
        if hasattr(opened[1], "body"):
            assert opened[1].body == {"model": "small"}, "the library was sent what it knows not"

    @every_endpoint
    async def test_headers_hold_where_the_body_says_nothing(
        self, client: httpx.AsyncClient, opened: list[Any], send: Send, default: Priority
    ) -> None:
        headers = {
            "x-roundhouse-keep-alive": "-1",
            "x-roundhouse-if-loaded-only": "true",
            "x-roundhouse-no-evict": "1",
            "x-roundhouse-priority": "Batch",
            "x-roundhouse-timeout": "90s",
        }
        await send(client, {}, headers)
        await send(client, {"keep_alive": 5, "no_evict": False, "priority": "interactive"}, headers)
        assert [request.scheduling for request in opened] == [
            SchedulingOptions(
                keep_alive_s=float("inf"),
                if_loaded_only=True,
                no_evict=True,
                priority=Priority.BATCH,
                timeout_s=90,
            ),
            SchedulingOptions(
                keep_alive_s=5,
                if_loaded_only=True,
                no_evict=False,
                priority=Priority.INTERACTIVE,
                timeout_s=90,
            ),
        ]

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            (0, 0),
            (1.5, 1.5),
            ("0", 0),
            ("90s", 90),
            ("10m", 600),
            ("24h", 86_400),
            (-1, float("inf")),
            ("-1", float("inf")),
            ("-1m", float("inf")),
        ],
    )
    async def test_keep_alive_is_written_as_for_ollama(
        self, client: httpx.AsyncClient, opened: list[Any], value: object, seconds: float
    ) -> None:
        await client.post(CHAT, json={"model": "small", "keep_alive": value})
        assert opened[0].scheduling.keep_alive_s == seconds

    @every_endpoint
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("keep_alive", "soon"),
            ("keep_alive", True),
            ("if_loaded_only", "maybe"),
            ("no_evict", "never"),
            ("priority", "urgent"),
            ("priority", 0),
            ("timeout", 0),
            ("timeout", "soon"),
        ],
    )
    async def test_a_wrong_value_is_named_before_anything_is_loaded(
        self,
        client: httpx.AsyncClient,
        opened: list[Any],
        send: Send,
        default: Priority,
        field: str,
        value: object,
    ) -> None:
        header = f"x-roundhouse-{field.replace('_', '-')}"
        for extra, headers, param in (
            ({field: value}, {}, field),
            ({}, {header: str(value)}, header),
        ):
            answer = await send(client, extra, headers)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert param in error["message"]
            assert error.get("param", param) == param  # Anthropic's envelope has none
        assert opened == []


class TestIfLoadedOnly:
    async def test_a_model_on_disk_is_refused_with_what_it_would_cost(
        self, client: httpx.AsyncClient, engine: Engine, runtime: FakeRuntime
    ) -> None:
        answer = await client.post(CHAT, json={"model": "small", "if_loaded_only": True})
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_loaded", "if_loaded_only")
        assert error["residency"] == {"tier": "disk", "load_seconds": 0.1, "evicts": []}
        assert answer.headers["x-should-retry"] == "false"
        assert state(engine, "small") is ModelState.ABSENT
        assert runtime.requests == []

    async def test_who_would_leave_is_told(self, client: httpx.AsyncClient, engine: Engine) -> None:
        await client.post(CHAT, json={"model": "other"})
        answer = await client.post(CHAT, json={"model": "small", "if_loaded_only": True})
        assert answer.json()["error"]["residency"]["evicts"] == ["other"]
        assert state(engine, "other") is ModelState.RESIDENT

    async def test_a_loaded_model_serves(self, client: httpx.AsyncClient) -> None:
        await client.post(CHAT, json={"model": "small"})
        answer = await client.post(CHAT, json={"model": "small", "if_loaded_only": True})
        assert answer.status_code == 200

    async def test_a_parked_model_is_refused(self, client: httpx.AsyncClient) -> None:
        await client.post(CHAT, json={"model": "small"})
        await client.post("/v1/engine/models/small/park")
        answer = await client.post(CHAT, json={"model": "small", "if_loaded_only": True})
        assert answer.status_code == 409
        assert answer.json()["error"]["residency"]["tier"] == "host"

    async def test_official_clients(self, url: str) -> None:
        wanted = {"tier": "disk", "load_seconds": 0.1, "evicts": []}
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
            with pytest.raises(openai.ConflictError) as caught:
                await sdk.chat.completions.create(
                    model="small",
                    messages=[{"role": "user", "content": "hello"}],
                    extra_body={"if_loaded_only": True},
                )
        assert caught.value.code == "model_not_loaded"
        assert caught.value.body["residency"] == wanted  # type: ignore[index]
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as claude:
            with pytest.raises(anthropic.ConflictError) as other:
                await claude.messages.create(
                    model="small",
                    max_tokens=1,
                    messages=[{"role": "user", "content": "hello"}],
                    extra_headers={"x-roundhouse-if-loaded-only": "true"},
                )
        assert other.value.body["error"]["residency"] == wanted  # type: ignore[index]

    async def test_files_that_still_come_are_not_waited_for(
        self,
        client: httpx.AsyncClient,
        runtime: ResidencyRuntime,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fetched = threading.Event()

        def estimate(model: ModelConfig) -> Estimate:
            fetched.wait(TIMEOUT_S)
            return Estimate((Block("weights", HALF_BYTES),), 0.1)

        monkeypatch.setattr(admission, "SIZE_TIMEOUT_S", 0.01)
        monkeypatch.setattr(runtime, "estimate", estimate)
        runtime.working_bytes = 1
        body = {"model": "small", "if_loaded_only": True, "timeout": 5}
        answer = await client.post(CHAT, json=body)
        fetched.set()
        assert answer.status_code == 409
        assert answer.json()["error"]["residency"]["load_seconds"] is None

    async def test_a_job_is_not_taken(self, client: httpx.AsyncClient, started: None) -> None:
        body = {"model": "small", "prompt": "a", "if_loaded_only": True}
        answer = await client.post("/v1/videos", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_not_loaded")
        assert (await client.get("/v1/videos")).json()["data"] == []


class TestKeepAlive:
    async def test_zero_lets_the_model_leave_at_once(
        self, client: httpx.AsyncClient, engine: Engine
    ) -> None:
        await client.post(CHAT, json={"model": "small", "keep_alive": 0})
        async with asyncio.timeout(TIMEOUT_S):
            while engine.model_status("small").tier == "device":
                await engine.events.wait(engine.events.last_id)

    async def test_below_zero_is_for_ever(self, client: httpx.AsyncClient) -> None:
        for keep_alive, told in ((-1, None), ("10m", 600)):
            await client.post(CHAT, json={"model": "small", "keep_alive": keep_alive})
            assert (await client.get("/v1/models/small")).json()["keep_alive_s"] == told


class TestNoEvict:
    async def test_it_waits_until_the_other_leaves_by_itself(
        self, url: str, engine: Engine
    ) -> None:
        body = {"model": "small", "no_evict": True}
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            await client.post(CHAT, json={"model": "other"})
            waiting = asyncio.create_task(client.post(CHAT, json=body))
            while engine.model_status("small").estimated_bytes is None:  # then it was decided
                await client.get("/v1/engine")
            assert [ticket.model for ticket in engine.status().queue] == ["small"]
            assert state(engine, "other") is ModelState.RESIDENT
            await client.post("/v1/engine/models/other/unload")
            assert (await waiting).status_code == 200

    async def test_its_timeout_passes_and_nobody_left(
        self, client: httpx.AsyncClient, engine: Engine
    ) -> None:
        await client.post(CHAT, json={"model": "other"})
        body = {"model": "small", "no_evict": True, "timeout": 0.05}
        answer = await client.post(CHAT, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(answer.headers["retry-after"]) >= 1
        assert state(engine, "other") is ModelState.RESIDENT
        assert (await client.post(CHAT, json={"model": "small"})).status_code == 200
        assert state(engine, "other") is not ModelState.RESIDENT


class TestPlan:
    async def test_an_empty_device(self, client: httpx.AsyncClient, engine: Engine) -> None:
        plan = (await client.post(PLAN, json={"model": "small"})).json()
        assert (plan["model"], plan["fits"], plan["tier"]) == ("small", True, "disk")
        assert (plan["wanted_bytes"], plan["free_bytes"]) == (HALF_BYTES, DEVICE_BYTES)
        assert (plan["move_s"], plan["evictions"]) == (0.1, [])
        assert plan["reason"]
        assert state(engine, "small") is ModelState.ABSENT

    async def test_which_of_several_models_is_unknown(self, client: httpx.AsyncClient) -> None:
        body = {"model": "small", "further_models": ["other", "nobody"]}
        answer = await client.post(PLAN, json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "further_models[1]"
        answer = await client.post(PLAN, json={**body, "model": "nobody"})
        assert answer.json()["error"]["param"] == "model"

    async def test_who_leaves(self, client: httpx.AsyncClient, engine: Engine) -> None:
        await client.post(CHAT, json={"model": "other"})
        plan = (await client.post(PLAN, json={"model": "small"})).json()
        (eviction,) = plan["evictions"]
        assert (eviction["model"], eviction["nbytes"]) == ("other", HALF_BYTES)
        assert eviction["reason"]
        assert state(engine, "other") is ModelState.RESIDENT

    async def test_working_memory_counts(self, client: httpx.AsyncClient) -> None:
        body = {"model": "small", "working_bytes": "1KiB", "priority": "batch"}
        plan = (await client.post(PLAN, json=body)).json()
        assert plan["wanted_bytes"] == HALF_BYTES + 1024

    async def test_what_never_fits(self, client: httpx.AsyncClient) -> None:
        plan = (await client.post(PLAN, json={"model": "big"})).json()
        assert (plan["fits"], plan["eta_s"]) == (False, None)

    @pytest.mark.parametrize(
        ("body", "status", "param"),
        [
            ({"model": "nobody"}, 404, "model"),
            ({}, 400, "model"),
            ({"model": "small", "priority": "urgent"}, 400, "priority"),
            ({"model": "small", "working_bytes": "much"}, 400, "working_bytes"),
            ({"model": "small", "force": True}, 400, "force"),
        ],
    )
    async def test_wrong_questions(
        self, client: httpx.AsyncClient, body: dict[str, object], status: int, param: str
    ) -> None:
        answer = await client.post(PLAN, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


class TestPark:
    async def test_a_parked_model_is_off_the_device_and_comes_back(
        self, client: httpx.AsyncClient
    ) -> None:
        await client.post(CHAT, json={"model": "small"})
        answer = await client.post("/v1/engine/models/small/park")
        parked = answer.json()
        assert (answer.status_code, parked["state"], parked["tier"]) == (200, "parked", "host")
        assert parked["device_bytes"] == 0
        again = await client.post("/v1/engine/models/small/park")
        assert (again.status_code, again.json()["state"]) == (200, "parked")
        assert (await client.post(CHAT, json={"model": "small"})).status_code == 200
        assert (await client.get("/v1/models/small")).json()["tier"] == "device"

    async def test_an_absent_model_stays_absent(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/engine/models/small/park")
        assert (answer.status_code, answer.json()["state"]) == (200, "absent")

    async def test_what_cannot_be_parked(
        self, client: httpx.AsyncClient, runtime: ResidencyRuntime
    ) -> None:
        runtime.parkable = False
        await client.post(CHAT, json={"model": "small"})
        answer = await client.post("/v1/engine/models/small/park")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


class TestHeaders:
    async def test_tier_is_where_the_model_was(self, client: httpx.AsyncClient) -> None:
        async def tier() -> str:
            return (await client.post(CHAT, json={"model": "small"})).headers["x-roundhouse-tier"]

        assert await tier() == "disk"
        assert await tier() == "device"
        await client.post("/v1/engine/models/small/park")
        assert await tier() == "host"

    @pytest.mark.parametrize("measured", [None, 1234])
    async def test_peak_is_told_where_it_was_measured(
        self, client: httpx.AsyncClient, runtime: ResidencyRuntime, measured: int | None
    ) -> None:
        async def paint(_: Any) -> AsyncGenerator[Event, None]:
            if measured is not None:
                yield WorkingMemory(measured)
            yield ImageResult((Image.new("RGB", (8, 8)),), seed=1)

        runtime.answer, runtime.shape = paint, "8x8"
        body = {"model": "small", "prompt": "a"}
        answer = await client.post("/v1/images/generations", json=body)
        peak = answer.headers.get("x-roundhouse-peak-bytes")
        assert peak == (None if measured is None else str(measured))


class TestRights:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user"),), admin_keys=(SecretStr("admin"),))

    @pytest.mark.parametrize(
        ("method", "path", "user"),
        [
            ("POST", PLAN, 200),
            ("GET", "/v1/engine/events", 200),
            ("POST", "/v1/engine/models/small/park", 403),
            ("POST", "/v1/engine/plan/", 403),
        ],
    )
    async def test_questions_need_a_key_and_orders_an_admin(
        self, client: httpx.AsyncClient, method: str, path: str, user: int
    ) -> None:
        async def status(key: str | None) -> int:
            headers = {} if key is None else {"x-api-key": key}
            answer = await client.request(
                method, path, content=json.dumps({"model": "small"}), headers=headers
            )
            return answer.status_code

        assert await status(None) == 401
        assert await status("user") == user
