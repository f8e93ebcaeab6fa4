"""Who may use which tool, and when the package is imported."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from mcp_types import CallToolResult, TextContent
from pydantic import SecretStr

from engine.engine import Engine
from server.app import Application, create_app
from server.keys import watch
from server.routes import mcp as route
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, listening
from tests.server.keys.conftest import AddKey, until
from tests.server.mcp.conftest import Connect

ROOT = Path(__file__).parents[3]
ACCEPT = {"accept": "application/json, text/event-stream"}
PING = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
SEARCH_TOOLS = ["list_vector_stores", "search"]
STATUS_TOOLS = ["list_models", "engine_status", "plan_model"]


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[-1], TextContent)
    return result.content[-1].text


def key_of(bearer: dict[str, str]) -> str:
    return bearer["authorization"].removeprefix("Bearer ")


class TestKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("configured"),))

    @pytest.fixture
    def app(
        self, engine: Engine, settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
    ) -> Application:
        monkeypatch.setattr(watch, "LOOK_S", 0.005)
        return create_app(engine, settings)

    async def known(self, url: str, bearer: dict[str, str]) -> str:
        async with httpx.AsyncClient(base_url=url) as http:
            await until(http, bearer, 200)
        return key_of(bearer)

    async def test_without_one(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = await http.post("/mcp", json=PING, headers={**ACCEPT, **headers})
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                document = answer.json()
                assert (document["jsonrpc"], document["id"]) == ("2.0", None)
                assert document["error"]["data"]["code"] == "invalid_api_key"
                assert "wrong" not in answer.text
            # Where clients look for a login.
            answer = await http.get("/.well-known/oauth-protected-resource/mcp")
            assert answer.status_code == 404

    async def test_a_tool_of_another_endpoint_is_not_there(
        self,
        connect: Connect,
        url: str,
        add_key: AddKey,
        runtime: FakeRuntime,
    ) -> None:
        key = await self.known(url, add_key("alice", endpoints=("images", "chat")))
        async with connect(key) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            assert names == ["list_models", "generate_image", "edit_image", "chat"]
            for name, arguments in (
                ("speak", {"input": "a"}),
                ("engine_status", {}),
                ("embed", {"input": ["a"]}),
                ("get_video", {"id": "a"}),
            ):
                result = await client.call_tool(name, arguments)
                assert result.is_error and "may not use" in text_of(result), name
            assert not (await client.call_tool("chat", {"prompt": "a"})).is_error
        assert [request.scheduling.caller.name for request in runtime.requests] == ["alice"]

    async def test_a_model_of_another_key_is_not_there(
        self,
        connect: Connect,
        url: str,
        add_key: AddKey,
        runtime: FakeRuntime,
    ) -> None:
        key = await self.known(url, add_key("alice", models=("second-image", "speech")))
        async with connect(key) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert [*tools] == [
                *STATUS_TOOLS,
                "generate_image",
                "edit_image",
                "speak",
                *SEARCH_TOOLS,
            ]
            properties = tools["generate_image"].input_schema["properties"]
            assert properties["model"]["enum"] == ["second-image"]
            assert not (await client.call_tool("generate_image", {"prompt": "a"})).is_error
            result = await client.call_tool("generate_image", {"prompt": "a", "model": "image"})
            assert "may not use the model 'image'" in text_of(result)
            result = await client.call_tool("chat", {"prompt": "a"})
            assert "no model for the tool chat" in text_of(result)
            models = (await client.call_tool("list_models", {})).structured_content["models"]
            assert {model["id"] for model in models} == {"second-image", "speech"}
        assert [request.model for request in runtime.requests] == ["second-image"]

    async def test_limits_count_calls_once(
        self,
        connect: Connect,
        url: str,
        add_key: AddKey,
    ) -> None:
        key = await self.known(url, add_key("alice", requests_per_minute=2))
        async with connect(key) as client:
            for _ in range(5):
                await client.list_tools()
                assert not (await client.call_tool("list_models", {})).is_error
            for _ in range(2):
                assert not (await client.call_tool("chat", {"prompt": "a"})).is_error
            result = await client.call_tool("chat", {"prompt": "a"})
            assert result.is_error and "429" in text_of(result)
            assert "Try again in" in text_of(result)

    async def test_usage_is_that_of_the_key(
        self, connect: Connect, url: str, engine: Engine
    ) -> None:
        async with connect("configured") as client:
            assert not (await client.call_tool("chat", {"prompt": "a"})).is_error
        async with httpx.AsyncClient(base_url=url) as http:
            answer = await http.get(
                "/v1/engine/usage", headers={"authorization": "Bearer configured"}
            )
        assert answer.status_code == 200, answer.text
        assert '"output_tokens":4' in answer.text.replace(" ", "")


class TestWithoutKeys:
    @pytest.mark.parametrize(
        "headers", [{"origin": "https://evil.example"}, {"host": "evil.example"}]
    )
    async def test_other_pages_and_rebound_names_are_refused(
        self, url: str, headers: dict[str, str]
    ) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            answer = await http.post("/mcp", json=PING, headers={**ACCEPT, **headers})
        assert answer.status_code == 403
        assert answer.json()["error"]["data"]["code"] in ("origin_forbidden", "host_forbidden")

    async def test_a_page_of_this_machine_may(self, connect: Connect) -> None:
        async with connect(origin="http://localhost:3000") as client:
            assert not (await client.call_tool("list_models", {})).is_error

    async def test_other_methods_and_bodies(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, headers=ACCEPT) as http:
            for method in ("GET", "DELETE", "PUT"):
                answer = await http.request(method, "/mcp")
                assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
                assert answer.json()["jsonrpc"] == "2.0"
            for body in (b"{", b"[]", b'{"jsonrpc": "1.0"}', b"\xff"):
                answer = await http.post(
                    "/mcp", content=body, headers={"content-type": "application/json"}
                )
                assert answer.status_code == 400, body
            answer = await http.post("/mcp", content=b"a=1")
            assert answer.status_code == 400


class TestLongBodies:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(max_body_bytes=1000)

    async def test_they_are_refused(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            answer = await http.post("/mcp", json={**PING, "params": "a" * 1000}, headers=ACCEPT)
        assert answer.status_code == 413


class TestTurnedOff:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(mcp=False)

    async def test_there_is_nothing(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.post("/mcp", json=PING)).status_code == 404


class TestImport:
    def test_it_waits_for_the_first_request(self, tmp_path: Path) -> None:
        """It takes as long as the whole application."""
        code = """
import asyncio, sys
from pathlib import Path
from engine.runtimes.registry import REGISTRY
from server.app import Application, create_app
from server.keys import watch
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine, listening
REGISTRY["fake"] = "tests.server.fake:FakeRuntime"
async def main():
    import httpx
    app = create_app(fake_engine(FakeRuntime(), Path(sys.argv[1])), ServerSettings())
    async with listening(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        (await http.get("/v1/models")).raise_for_status()
        print("mcp" in sys.modules, "server.mcp.tool" in sys.modules)
        body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        headers = {"accept": "application/json, text/event-stream"}
        (await http.post("/mcp", json=body, headers=headers)).raise_for_status()
        print("mcp" in sys.modules)
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
        assert done.stdout.split() == ["False", "False", "True"]

    async def test_it_is_missing(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(_: str) -> None:
            raise ModuleNotFoundError("No module named 'mcp'", name="mcp")

        monkeypatch.setattr(route, "import_module", missing)
        async with (
            listening(create_app(engine, ServerSettings())) as url,
            httpx.AsyncClient(base_url=url) as http,
        ):
            answer = await http.post("/mcp", json=PING)
            assert answer.status_code == 501
            assert "pip install mcp" in answer.json()["error"]["message"]

    async def test_it_waits_for_the_start(
        self, engine: Engine, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The import of vLLM hides a package that this one needs."""
        runtime.may_start.clear()
        monkeypatch.setattr(route, "START_WAIT_S", 0.1)
        async with (
            listening(create_app(engine, ServerSettings())) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as http,
        ):
            try:
                answer = await http.post("/mcp", json=PING, headers=ACCEPT)
                assert answer.status_code == 503 and answer.headers["retry-after"]
                monkeypatch.setattr(route, "START_WAIT_S", 60)
                waiting = asyncio.create_task(http.post("/mcp", json=PING, headers=ACCEPT))
                await asyncio.sleep(0)
            finally:
                runtime.may_start.set()
            assert (await waiting).status_code == 200
