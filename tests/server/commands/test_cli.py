"""The command line: in this process where it returns, as a process where it gets signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from engine.errors import ConfigError
from server.commands import cli, terminal
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime
from tests.server.serve_fake import NEVER_STARTS

CHAT = "/v1/chat/completions"
TIMEOUT_S = 60

CONFIG = """
engine: {{device: cpu, memory: 64MiB, state_dir: {state_dir}, data_dir: {state_dir}}}
server:
  port: 0
  drain_s: {drain_s}
  cors_origins: ["http://localhost:5173"]
  root_path: /ai
models:
  - {{id: small, runtime: fake, source: "starter:tiny", aliases: [tiny]}}
"""


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes COLUMNS when a console is made, and workers of pytest-xdist have it at 80."""
    monkeypatch.setattr(terminal.out, "width", 200)


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, arguments)


def write_config(folder: Path, drain_s: float = 30) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(state_dir=folder, drain_s=drain_s))
    return path


class TestServe:
    def test_wrong_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text("server: {prot: 1}\nmodels: []")
        result = invoke("serve", "--config", str(path))
        assert result.exit_code == 2
        assert "server.prot: unknown key" in result.stderr
        assert "Traceback" not in result.stderr

    def test_open_to_the_network_without_a_key(self, tmp_path: Path) -> None:
        result = invoke("serve", "--config", str(write_config(tmp_path)), "--host", "0.0.0.0")
        assert result.exit_code == 2
        assert "server.api_keys" in result.stderr

    def test_port_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            result = invoke("serve", "--config", str(write_config(tmp_path)), "--port", port)
        assert result.exit_code == 1
        assert "cannot listen on 127.0.0.1" in result.stderr

    def test_engine_that_cannot_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(self: FakeRuntime) -> None:
            raise ConfigError("engine.device: no such device")

        monkeypatch.setattr(FakeRuntime, "start", fails)
        # With it this very process would become the supervisor.
        result = invoke("serve", "--no-supervisor", "--config", str(write_config(tmp_path)))
        assert result.exit_code == 2
        assert "no such device" in result.stderr


class Served:
    """A running `roundhouse serve`."""

    def __init__(self, process: asyncio.subprocess.Process, introduction: str, url: str) -> None:
        self.process = process
        self.introduction = introduction
        self.client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S)

    async def becomes(self, status: str) -> None:
        """Return once probes see that status."""
        async with asyncio.timeout(TIMEOUT_S):
            while (await self.client.get("/ready")).json() != {"status": status}:
                pass

    async def exit_code(self) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.process.wait()


@asynccontextmanager
async def served(folder: Path, *arguments: str, drain_s: float = 30) -> AsyncIterator[Served]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.server.serve_fake", "serve"),
        *("--config", str(write_config(folder, drain_s)), *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            introduction = ""
            while "mean nothing" not in introduction:
                line = await process.stderr.readline()
                assert line, introduction
                introduction += line.decode()
        match = re.search(r"http://127\.0\.0\.1:\d+", introduction)
        assert match is not None
        server = Served(process, introduction, match[0])
        async with server.client:
            yield server
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.slow
class TestProcess:
    async def test_sigterm_lets_streams_end(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        body = {"model": "small", "until": str(pipe)}
        async with served(tmp_path) as server:
            assert "model: small = tiny (starter:tiny)" in server.introduction
            assert str(tmp_path / "config.yaml") in server.introduction
            page = {"origin": "http://localhost:5173"}
            asked = await server.client.get("/ai/health", headers=page)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == page["origin"]
            async with server.client.stream("POST", CHAT, json=body) as answer:
                texts = answer.aiter_text()
                assert await anext(texts) == "data: first\n\n"
                server.process.send_signal(signal.SIGTERM)
                await server.becomes("draining")
                refused = await server.client.post(CHAT, json=body)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "shutting_down"
                assert (await server.client.get("/health")).status_code == 200
                await asyncio.to_thread(pipe.write_bytes, b"go on")
                assert [text async for text in texts] == ["data: last\n\n"]
            assert await server.exit_code() == 0

    async def test_streams_are_cut_when_the_drain_is_over(self, tmp_path: Path) -> None:
        async with served(tmp_path, drain_s=0.1) as server:
            async with server.client.stream("POST", CHAT, json={"model": "small"}) as answer:
                texts = answer.aiter_text()
                assert await anext(texts) == "data: first\n\n"
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.RemoteProtocolError):
                    await anext(texts)
            assert await server.exit_code() == 0

    @pytest.mark.parametrize("arguments", [(), ("--no-supervisor",)])
    async def test_a_start_under_way_delays_no_stop(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
    ) -> None:
        """The import of vLLM takes a minute on a slow disk, and nothing can stop it."""
        monkeypatch.setenv(NEVER_STARTS, "1")
        async with served(tmp_path, *arguments) as server:
            await server.becomes("starting")
            body = {"model": "small", "stream": True}
            async with server.client.stream("POST", CHAT, json=body) as answer:
                lines = answer.aiter_lines()
                assert (await anext(lines)).startswith(": starting")
                server.process.send_signal(signal.SIGTERM)
                assert "shutting_down" in "".join([line async for line in lines])
            assert await server.exit_code() == 0
            said = (await server.process.communicate())[1].decode()
            assert "Traceback" not in said and "it does not end" not in said

    async def test_second_ctrl_c_leaves_at_once(self, tmp_path: Path) -> None:
        async with (
            served(tmp_path) as server,
            server.client.stream("POST", CHAT, json={"model": "small"}) as answer,
        ):
            assert await anext(answer.aiter_text()) == "data: first\n\n"
            server.process.send_signal(signal.SIGINT)
            await server.becomes("draining")
            server.process.send_signal(signal.SIGINT)
            assert await server.exit_code() == 130

    async def test_without_a_supervisor(self, tmp_path: Path) -> None:
        async with served(tmp_path, "--no-supervisor") as server:
            assert (await server.client.get("/health")).status_code == 200
            await server.becomes("ready")  # while it starts, Python asks `uname` for the processor
            assert psutil.Process(server.process.pid).children() == []
            server.process.send_signal(signal.SIGTERM)
            assert await server.exit_code() == 0

    async def test_with_one_it_is_its_own_parent(self, tmp_path: Path) -> None:
        async with served(tmp_path) as server:
            assert (await server.client.get("/health")).status_code == 200
            process = psutil.Process(server.process.pid)
            (child,) = process.children()
            assert child.cmdline()[-2:] == ["--config", str(tmp_path / "config.yaml")]
            assert process.memory_info().rss < 32 * 2**20
            server.process.send_signal(signal.SIGTERM)
            assert await server.exit_code() == 0
            assert not child.is_running()


class TestPs:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user-key"),))

    async def test_table(self, url: str) -> None:
        headers = {"authorization": "Bearer user-key"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            await client.post(CHAT, json={"model": "small"})
            await client.post(CHAT, json={"model": "broken"})
            await client.post("/v1/engine/models/small/pin")
        result = await asyncio.to_thread(invoke, "ps", "--url", url, "--api-key", "user-key,b")
        assert result.exit_code == 0, result.output
        assert "1000 B of 9.8 KiB" in result.output
        assert re.search(r"small +│ resident +│ device +│ 1000 B", result.output)
        assert "the file is torn" in result.output

    async def test_wrong_key(self, url: str) -> None:
        result = await asyncio.to_thread(invoke, "ps", "--url", url)
        assert result.exit_code == 1
        assert "401" in result.stderr and "No API key" in result.stderr

    def test_nobody_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        result = invoke("ps", "--url", f"http://127.0.0.1:{port}")
        assert result.exit_code == 1
        assert "no Roundhouse answers" in result.stderr


class TestPlan:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user-key"),))

    @staticmethod
    async def plan(url: str, *arguments: str) -> Result:
        key = ("--url", url, "--api-key", "user-key")
        return await asyncio.to_thread(invoke, "plan", *arguments, *key)

    async def test_empty_device(self, url: str) -> None:
        result = await self.plan(url, "gpt-4o", "--working", "1000")
        assert result.exit_code == 0, result.output
        assert result.output.startswith("small: ")
        assert re.search(r"fits +yes *\nis on +disk *\nto bring in +2.0 KiB", result.output)
        assert "who leaves" not in result.output

    async def test_who_leaves(self, url: str) -> None:
        headers = {"authorization": "Bearer user-key"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            await client.post(CHAT, json={"model": "small"})
        result = await self.plan(url, "other", "--working", "9000", "--priority", "batch")
        assert result.exit_code == 0, result.output
        assert "who leaves" in result.output
        assert re.search(r"small +│ all +│ 1000 B", result.output)

    async def test_it_never_fits(self, url: str) -> None:
        result = await self.plan(url, "big")
        assert result.exit_code == 0
        assert re.search(r"fits +no *\n", result.output)

    async def test_unknown_model(self, url: str) -> None:
        result = await self.plan(url, "smal")
        assert result.exit_code == 1
        assert "404" in result.stderr and "'small'" in result.stderr


def test_version() -> None:
    result = invoke("version")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == [
        "roundhouse",
        "python",
        "torch",
        "vllm",
    ]


async def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'vllm', 'numpy'}"
    code = f"import sys, server.commands.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
