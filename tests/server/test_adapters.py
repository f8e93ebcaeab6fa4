"""LoRAs of language models over HTTP: their names, the list of models, adding and deleting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import save, save_file

from engine.caller import NOBODY
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import ConfigError, ModelNotFound, RuntimeFailed
from engine.events import Document, Event
from engine.memory.block import Block, Estimate
from engine.runtimes.base import LoadedModel
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.section import Section
from server.keys.access import Access
from tests.server.fake import FakeLoaded, FakeRuntime, echo, fake_engine

CHAT = "/v1/chat/completions"
LORAS = "/v1/engine/loras"
SIDE, RANK = 8, 2
MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "bias": "none"}


def lora(rank: int = RANK, side: int = SIDE, module: str = MODULE) -> bytes:
    key = f"base_model.model.{module}"
    shapes = {f"{key}.lora_A.weight": (rank, side), f"{key}.lora_B.weight": (side, rank)}
    data: bytes = save({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    return data


def put(folder: Path, data: bytes | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(data or lora())
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))


def names_in(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


class Loaded(FakeLoaded):
    def __init__(self, runtime: FakeRuntime) -> None:
        self._nbytes = 1000
        self._runtime = runtime


class FakeVllm(FakeRuntime):
    """The real runtime's words on LoRAs, without the library."""

    Options: ClassVar[type[Section]] = VllmOptions
    peft_loras: ClassVar[bool] = True
    adapters = VllmRuntime.adapters
    lora_names = VllmRuntime.lora_names
    lora_files = VllmRuntime.lora_files

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: list[str] = []

    def estimate(self, model: ModelConfig) -> Estimate:
        return Estimate((Block("weights", 1000),), 0.1)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        return Loaded(self)

    async def forget_lora(self, loaded: LoadedModel, name: str) -> None:
        self.forgotten.append(name)


@pytest.fixture
def runtime() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "loras" / "style")
    put(tmp_path / "loras" / "tone-1.2")
    return tmp_path / "loras"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {f"{MODULE}.weight": np.zeros((SIDE, SIDE), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def engine(runtime: FakeVllm, tmp_path: Path, folder: Path, base: Path) -> Engine:
    put(tmp_path / "elsewhere")
    options = {"loras": str(folder), "lora_sources": {"named": str(tmp_path / "elsewhere")}}
    models: list[dict[str, Any]] = [
        {
            "id": "llama",
            "aliases": ["org/llama:8b"],
            "source": str(base),
            "options": options,
            "fallbacks": ["plain"],
        },
        {"id": "plain", "source": str(base)},
    ]
    engine = fake_engine(
        runtime, tmp_path, models=[{"runtime": "vllm", **model} for model in models]
    )
    engine._runtimes["vllm"] = runtime
    return engine


async def chat(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post(CHAT, json={"model": model, "messages": []})


class TestNames:
    async def test_the_model_gets_the_request_with_its_adapter(
        self, client: httpx.AsyncClient, runtime: FakeVllm
    ) -> None:
        for name in ("llama:style", "llama:tone-1.2", "org/llama:8b:named", "llama"):
            assert (await chat(client, name)).status_code == 200
        seen = [(request.model, request.adapter) for request in runtime.requests]
        assert seen == [
            ("llama", "style"),
            ("llama", "tone-1.2"),
            ("llama", "named"),
            ("llama", None),
        ]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("llama:stile", "Did you mean 'llama:style'?"),
            ("org/llama:8b:nmed", "Did you mean 'org/llama:8b:named'?"),
            ("plain:style", ""),
            ("llama:", ""),
            (":style", ""),
            ("llama:../style", ""),
            ("llama:style:style", ""),
        ],
    )
    async def test_unknown_ones(self, client: httpx.AsyncClient, name: str, hint: str) -> None:
        answer = await chat(client, name)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert hint in error["message"]

    async def test_a_fallback_answers_without_it(
        self, client: httpx.AsyncClient, runtime: FakeVllm
    ) -> None:
        async def fail_once(request: Any) -> AsyncGenerator[Event, None]:
            if request.model == "llama":
                raise RuntimeFailed("broken")
            async for event in echo(request):
                yield event

        runtime.answer = fail_once
        assert (await chat(client, "llama:style")).status_code == 200
        seen = [(request.model, request.adapter) for request in runtime.requests]
        assert seen == [("llama", "style"), ("plain", None)]

    async def test_scheduling_sees_one_model(
        self, client: httpx.AsyncClient, engine: Engine
    ) -> None:
        for name in ("llama:style", "llama:named", "llama"):
            await chat(client, name)
        assert [model.id for model in engine.status().models] == ["llama", "plain"]

    def test_a_plain_name_asks_for_no_adapters(self) -> None:
        config = EngineConfig.model_validate({
            "models": [
                {"id": "a", "source": "x"},
                {"id": "a:b", "source": "x"},
            ]
        })  # fmt: skip
        asked = []

        def adapters(model: ModelConfig) -> tuple[str, ...]:
            asked.append(model.id)
            return ("b", "c")

        config.know_adapters(adapters)
        assert config.find_adapter("a:b")[0].id == "a:b"
        assert asked == []
        assert config.find_adapter("a:b:c") == (config.models[1], "c")
        with pytest.raises(ModelNotFound):
            config.find("nobody:b")
        assert asked == ["a:b"]


class TestList:
    async def test_each_is_a_model_with_a_parent(self, client: httpx.AsyncClient) -> None:
        document = (await client.get("/v1/models")).json()
        assert {each["id"]: each["parent"] for each in document["data"]} == {
            "llama": None,
            "org/llama:8b": None,
            "plain": None,
            "llama:named": "llama",
            "llama:style": "llama",
            "llama:tone-1.2": "llama",
        }
        one = (await client.get("/v1/models/org/llama:8b:style")).json()
        assert (one["id"], one["parent"], one["alias_of"]) == ("llama:style", "llama", None)
        assert (await client.get("/v1/models/llama:none")).status_code == 404

    async def test_openais_client_reads_it(self, url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
            assert "llama:style" in [model.id async for model in sdk.models.list()]

    async def test_all_loras(self, client: httpx.AsyncClient, folder: Path) -> None:
        document = (await client.get(LORAS)).json()
        found = {each["id"]: each["nbytes"] for each in document["data"]}
        nbytes = sum(file.stat().st_size for file in (folder / "style").iterdir())
        assert found == {"named": None, "style": nbytes, "tone-1.2": nbytes}


class TestAdd:
    @staticmethod
    async def upload(
        client: httpx.AsyncClient,
        data: bytes | None = None,
        config: Any = CONFIG,
        name: str = "new",
        model: str = "llama",
    ) -> httpx.Response:
        files = {"file": ("adapter_model.safetensors", data or lora())}
        if config is not None:
            text = config if isinstance(config, bytes) else json.dumps(config).encode()
            files["config"] = ("adapter_config.json", text)
        return await client.post(LORAS, data={"model": model, "name": name}, files=files)

    async def test_it_can_be_asked_for_at_once(
        self, client: httpx.AsyncClient, folder: Path, runtime: FakeVllm
    ) -> None:
        answer = await self.upload(client)
        assert answer.status_code == 200, answer.text
        nbytes = sum(file.stat().st_size for file in (folder / "new").iterdir())
        assert answer.json() == {
            "id": "new",
            "object": "engine.lora",
            "model": "llama",
            "nbytes": nbytes,
        }
        assert (await chat(client, "llama:new")).status_code == 200
        assert runtime.requests[-1].adapter == "new"

    @pytest.mark.parametrize(
        ("data", "config", "param", "words"),
        [
            (lora(rank=32), {**CONFIG, "r": 32}, "file", "rank 32 is above"),
            (lora(), {**CONFIG, "r": 4}, "file", "has the rank 2"),
            (lora(side=16), CONFIG, "file", "16×16, and the model's is 8×8"),
            (lora(module="h.0.attn"), CONFIG, "file", "no module 'h.0.attn'"),
            (lora(), {**CONFIG, "use_dora": True}, "file", "use_dora"),
            (lora(), {**CONFIG, "peft_type": "LOHA"}, "file", "'LOHA'"),
            (lora(), {**CONFIG, "lora_alpha": "x"}, "file", "lora_alpha"),
            (lora(), {**CONFIG, "modules_to_save": ["lm_head"]}, "file", "modules_to_save"),
            (lora(), [], "config", "not an object"),
            (lora(), b"{", "config", "not JSON"),
            (lora(), None, "config", "needs its adapter_config.json"),
            (b"\x80\x04pickle", CONFIG, "file", "safetensors"),
            (lora()[:-4], CONFIG, "file", "safetensors"),
            (save({"a.lora_A.weight": np.zeros((2, 2))}), CONFIG, "file", "an A and a B"),
        ],
    )
    async def test_what_does_not_fit_leaves_nothing(
        self,
        client: httpx.AsyncClient,
        folder: Path,
        data: bytes,
        config: Any,
        param: str,
        words: str,
    ) -> None:
        answer = await self.upload(client, data, config)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert names_in(folder) == {"style", "tone-1.2"}

    @pytest.mark.parametrize("name", ["style", "named"])
    async def test_no_name_is_taken_twice(self, client: httpx.AsyncClient, name: str) -> None:
        assert (await self.upload(client, name=name)).status_code == 409

    @pytest.mark.parametrize("name", ["a:b", "../x", ""])
    async def test_names(self, client: httpx.AsyncClient, folder: Path, name: str) -> None:
        answer = await self.upload(client, name=name or "\0")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")

    async def test_a_model_without_a_folder(self, client: httpx.AsyncClient) -> None:
        answer = await self.upload(client, model="plain")
        assert answer.json()["error"]["param"] == "model"


class TestDelete:
    async def test_it_is_gone(
        self, client: httpx.AsyncClient, folder: Path, runtime: FakeVllm
    ) -> None:
        await chat(client, "llama:style")
        answer = await client.delete("/v1/engine/models/llama/loras/style")
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert document.pop("freed_bytes") > 0
        assert document == {
            "id": "style",
            "object": "engine.lora",
            "model": "llama",
            "deleted": True,
        }
        assert runtime.forgotten == ["style"]
        assert names_in(folder) == {"tone-1.2"}
        assert (await chat(client, "llama:style")).status_code == 404

    @pytest.mark.parametrize(
        ("name", "status"), [("none", 404), ("named", 409), ("..", 404), ("%2e%2e%2fbase", 404)]
    )
    async def test_others(
        self, client: httpx.AsyncClient, folder: Path, name: str, status: int
    ) -> None:
        answer = await client.delete(f"/v1/engine/models/llama/loras/{name}")
        assert answer.status_code == status
        assert names_in(folder) == {"style", "tone-1.2"}

    async def test_one_in_use_stays(
        self, client: httpx.AsyncClient, folder: Path, runtime: FakeVllm, engine: Engine
    ) -> None:
        began, go_on = asyncio.Event(), asyncio.Event()

        async def slow(request: Any) -> AsyncGenerator[Event, None]:
            began.set()
            await go_on.wait()
            yield Document(b"{}")

        runtime.answer = slow
        # One runs with one LoRA, and one waits with the other: the model takes one at a time.
        running = asyncio.create_task(chat(client, "llama:style"))
        await began.wait()
        waiting = asyncio.create_task(chat(client, "llama:tone-1.2"))
        async with asyncio.timeout(60):
            while not engine.status().queue:  # noqa: ASYNC110 - it comes in some turns of the loop
                await asyncio.sleep(0)
        for name in ("style", "tone-1.2"):
            answer = await client.delete(f"/v1/engine/models/llama/loras/{name}")
            assert answer.status_code == 409
            assert "in use by 1 requests" in answer.json()["error"]["message"]
        go_on.set()
        assert [each.status_code for each in await asyncio.gather(running, waiting)] == [200, 200]
        answer = await client.delete("/v1/engine/models/llama/loras/style")
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_sources": {"a:b": "x"}}, "lora_sources"),
        ({"max_lora_rank": 7}, "max_lora_rank"),
        ({"max_loras": 4, "max_cpu_loras": 2}, "max_cpu_loras must be at least max_loras"),
        ({"max_loras": 0}, "max_loras"),
    ],
)
def test_options(options: dict[str, Any], words: str) -> None:
    model = ModelConfig(id="llama", source="x", options=options)
    with pytest.raises(ConfigError, match=words):
        model.options_as(VllmOptions)


def test_repositories_of_adapters_are_fetched_without_pickles() -> None:
    model = ModelConfig(id="llama", source="a/b", options={"lora_sources": {"x": "c/d"}})
    _, source = VllmRuntime.hub_sources(model)
    assert source.repo == "c/d"
    assert source.patterns == ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("llama", True), ("llama:style", True), ("llama:8b", False), ("other:style", False)],
)
def test_a_key_for_a_model_is_one_for_its_loras(name: str, allowed: bool) -> None:
    # `llama:8b` is another model, not a LoRA.
    plain = frozenset({"llama", "llama:8b", "other"})
    access = Access(NOBODY, admin=False, models=frozenset({"llama"}), plain=plain)
    assert access.may_use(name) is allowed
