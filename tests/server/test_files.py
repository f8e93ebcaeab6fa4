"""The routes that fetch, list and delete the files of models, and take LoRAs."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import SecretStr
from safetensors.numpy import save

from engine.engine import Engine
from engine.files.hub.cache import PARTIAL
from server.settings import ServerSettings
from tests.hub import Hub, point_client_at, serving
from tests.server.fake import FakeRuntime, fake_engine

REPO = "me/tiny"
WEIGHTS = random.Random(2).randbytes(2_000_000)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}
LORAS = "/v1/engine/loras"
PULL = "/v1/engine/models/tiny/pull"
DELETE = "/v1/engine/models/tiny/files"
LORA = save({"unet.down.lora_A.weight": np.zeros((2, 2), np.float32)})
TIMEOUT_S = 60


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        hub.repos[REPO] = dict(FILES)
        yield hub


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("server.routes.files.PROGRESS_INTERVAL_S", 0.01)
    return point_client_at(hub, tmp_path, monkeypatch)


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path, cache: Path) -> Engine:
    models: list[dict[str, Any]] = [
        {"id": "tiny", "aliases": ["small"], "runtime": "fake", "source": REPO},
        {"id": "local", "runtime": "fake", "source": str(tmp_path)},
        {
            "id": "painter",
            "runtime": "diffusers",
            "task": "image",
            "source": str(tmp_path),
            "options": {"loras": str(tmp_path / "loras")},
        },
    ]
    engine = fake_engine(runtime, tmp_path, models=models)
    engine._runtimes["diffusers"] = runtime
    return engine


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block]
    assert all(name.startswith("event: ") for name, _ in blocks)
    return [json.loads(data.removeprefix("data: ")) for _, data in blocks]


def names_in(folder: Path, pattern: str = "*") -> list[str]:
    """Of the files below the folder, hidden ones too."""
    return [path.name for path in folder.rglob(pattern) if path.is_file()]


class TestPull:
    async def test_progress_and_end(self, client: httpx.AsyncClient, hub: Hub, cache: Path) -> None:
        answer = await client.post(PULL)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.text)
        assert {event["type"] for event in events[:-1]} == {"pull.progress"}
        total = sum(map(len, FILES.values()))
        assert events[-1] == {
            "type": "pull.completed",
            "model": "tiny",
            "repo": REPO,
            "done_bytes": total,
            "total_bytes": total,
            "files_done": 2,
            "files": 2,
        }
        (snapshot,) = (cache / "models--me--tiny" / "snapshots").iterdir()
        assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS

    async def test_by_an_alias_and_with_a_body(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/engine/models/small/pull", json={})
        assert events_of(answer.text)[-1]["type"] == "pull.completed"

    async def test_a_client_that_leaves_stops_it(
        self, url: str, hub: Hub, cache: Path, client: httpx.AsyncClient
    ) -> None:
        half = len(WEIGHTS) // 2
        hub.stall["model.safetensors"] = half
        (blobs := cache / "models--me--tiny" / "blobs").mkdir(parents=True)
        async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(base_url=url) as leaving:
            async with leaving.stream("POST", PULL) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and json.loads(line[6:])["done_bytes"] >= half:
                        break
            hub.let_go.set()
            while (answer := await leaving.delete(DELETE)).status_code == 409:
                pass  # until the server has seen that the client left, and the pull has ended
        assert answer.json()["freed_bytes"] >= half
        assert not blobs.exists()

    async def test_what_is_unfinished_is_told(self, client: httpx.AsyncClient, cache: Path) -> None:
        (blobs := cache / "models--me--tiny" / "blobs").mkdir(parents=True)
        (blobs / f"abc{PARTIAL}").write_bytes(b"half")
        listed = (await client.get("/v1/engine/files")).json()["data"][0]["files"][0]
        assert (listed["present"], listed["unfinished_bytes"]) == (False, 4)

    async def test_failures_are_the_last_event(self, client: httpx.AsyncClient, hub: Hub) -> None:
        hub.gated.add(REPO)
        last = events_of((await client.post(PULL)).text)[-1]
        assert last["type"] == "error"
        assert "gated" in last["error"]["message"]
        assert last["request_id"]

    async def test_unknown_model(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/engine/models/nobody/pull")
        assert answer.status_code == 404


class TestFiles:
    async def test_list(self, client: httpx.AsyncClient, tmp_path: Path) -> None:
        before = (await client.get("/v1/engine/files")).json()["data"]
        assert [each["id"] for each in before] == ["tiny", "local", "painter"]
        (files,) = before[0]["files"]
        assert (before[0]["hub"], files["present"], files["nbytes"]) == (True, False, 0)
        assert (before[1]["hub"], before[1]["files"][0]["present"]) == (False, True)
        await client.post(PULL)
        (files,) = (await client.get("/v1/engine/files")).json()["data"][0]["files"]
        assert (files["present"], files["nbytes"]) == (True, sum(map(len, FILES.values())))
        assert files["models"] == ["tiny"]
        assert str(tmp_path / "hub") not in json.dumps(files)

    async def test_delete(self, client: httpx.AsyncClient, cache: Path) -> None:
        await client.post(PULL)
        answer = await client.delete(DELETE)
        assert answer.status_code == 200
        assert answer.json() == {
            "id": "tiny",
            "object": "engine.files",
            "deleted": [REPO],
            "freed_bytes": sum(map(len, FILES.values())),
        }
        assert not (cache / "models--me--tiny").exists()
        assert (await client.delete(DELETE)).json()["deleted"] == []

    async def test_a_loaded_model_keeps_its_files(
        self, client: httpx.AsyncClient, cache: Path
    ) -> None:
        await client.post(PULL)
        await client.post("/v1/engine/models/tiny/load")
        refused = await client.delete(DELETE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        await client.post("/v1/engine/models/tiny/unload")
        assert (await client.delete(DELETE)).status_code == 200

    async def test_a_folder_is_not_deleted(self, client: httpx.AsyncClient, tmp_path: Path) -> None:
        assert (await client.delete("/v1/engine/models/local/files")).status_code == 409
        assert names_in(tmp_path)


class TestKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(
            api_keys=(SecretStr("user-key"),), admin_keys=(SecretStr("admin-key"),)
        )

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", PULL), ("DELETE", DELETE), ("POST", LORAS)]
    )
    async def test_what_changes_files_needs_an_admin_key(
        self, client: httpx.AsyncClient, method: str, path: str
    ) -> None:
        user = {"authorization": "Bearer user-key"}
        refused = await client.request(method, path, headers=user)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "admin_key_required"
        admin = {"authorization": "Bearer admin-key"}
        assert (await client.request(method, path, headers=admin)).status_code != 403

    async def test_any_key_may_look(self, client: httpx.AsyncClient) -> None:
        user = {"authorization": "Bearer user-key"}
        assert (await client.get("/v1/engine/files", headers=user)).status_code == 200


class TestLoras:
    @staticmethod
    async def upload(
        client: httpx.AsyncClient,
        data: bytes = LORA,
        filename: str = "style.safetensors",
        **form: str,
    ) -> httpx.Response:
        fields = {"model": "painter", **form}
        return await client.post(LORAS, data=fields, files={"file": (filename, data)})

    async def test_it_is_in_the_folder(self, client: httpx.AsyncClient, tmp_path: Path) -> None:
        answer = await self.upload(client)
        assert answer.status_code == 200
        assert answer.json() == {
            "id": "style",
            "object": "engine.lora",
            "model": "painter",
            "nbytes": len(LORA),
        }
        assert (tmp_path / "loras" / "style.safetensors").read_bytes() == LORA
        assert names_in(tmp_path / "loras") == ["style.safetensors"]

    async def test_what_a_killed_process_left_is_not_in_the_way(
        self, client: httpx.AsyncClient, tmp_path: Path
    ) -> None:
        folder = tmp_path / "loras"
        folder.mkdir()
        for name in (".style.part", ".old.0123.part"):
            (folder / name).write_bytes(b"half")
        os.utime(folder / ".old.0123.part", (1e9, 1e9))
        assert (await self.upload(client)).is_success
        # Somebody may be writing the one that is new.
        assert sorted(path.name for path in folder.iterdir()) == [
            ".style.part",
            "style.safetensors",
        ]

    async def test_by_a_name_of_its_own(self, client: httpx.AsyncClient, tmp_path: Path) -> None:
        assert (await self.upload(client, filename="x.bin", name="mine-1.2")).is_success
        assert (tmp_path / "loras" / "mine-1.2.safetensors").is_file()

    async def test_none_is_replaced(self, client: httpx.AsyncClient, tmp_path: Path) -> None:
        await self.upload(client)
        other = save({"a.lora_B.weight": np.ones((2, 2), np.float32)})
        assert (await self.upload(client, other)).status_code == 409
        assert (tmp_path / "loras" / "style.safetensors").read_bytes() == LORA
        (folder := tmp_path / "loras" / "other").mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes(LORA)
        assert (await self.upload(client, name="other")).status_code == 409

    async def test_a_header_that_would_fill_the_memory(
        self, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("engine.catalog.loras.MAX_HEADER_BYTES", 16)
        assert (await self.upload(client)).status_code == 400

    @pytest.mark.parametrize(
        "name", ["../out", "a/b", "/etc/passwd", ".hidden", "a..b", "", "a" * 101, "a\0b", "a b"]
    )
    async def test_names_that_lead_elsewhere(
        self, client: httpx.AsyncClient, tmp_path: Path, name: str
    ) -> None:
        answer = await self.upload(client, filename=" ", name=name)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "name"
        assert names_in(tmp_path, "*.safetensors") == []

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"PK\x03\x04 a pickle",
            LORA[:-1],
            LORA + b"x",
            (2**62).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"[]",
            (2).to_bytes(8, "little") + b"{}",
            save({"model.layers.0.weight": np.zeros(2, np.float32)}),
        ],
    )
    async def test_what_is_no_lora(
        self, client: httpx.AsyncClient, tmp_path: Path, data: bytes
    ) -> None:
        answer = await self.upload(client, data)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "file"
        assert names_in(tmp_path / "loras") == []

    async def test_too_long(
        self, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.routes.files.MAX_LORA_BYTES", 64)
        assert (await self.upload(client)).status_code == 413

    async def test_a_model_without_a_folder(self, client: httpx.AsyncClient) -> None:
        answer = await self.upload(client, model="local")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")

    async def test_a_field_too_many(self, client: httpx.AsyncClient) -> None:
        answer = await self.upload(client, weight="1")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "weight")
