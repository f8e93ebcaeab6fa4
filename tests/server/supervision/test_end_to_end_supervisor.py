"""Real servers that are killed, hang, or lose their device; and what their clients see."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from server.serve import BEAT_S
from tests.server.real import ROOT, Server, starter_config

pytestmark = [
    pytest.mark.slow,
    # The client's notices about OpenAI's own service.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TIMEOUT_S = 90.0
HEALED_S = 30.0
CHAT = "/v1/chat/completions"
VIDEO = {"model": "tiny-wan", "prompt": "a red train", "size": "128x128", "num_frames": 9,
         "steps": 40, "seed": 3}  # fmt: skip

ANSWERED, BROKEN, REFUSED = "answered", "a broken stream", "refused, with Retry-After"


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again; a request that fails is no."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                if await condition():
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


def serving(supervisor: int) -> int:
    """The process that serves."""
    (child,) = psutil.Process(supervisor).children()
    return child.pid


async def outcome(request: Awaitable[Any]) -> str:
    """How a request ended that the official client made, with its own two retries."""
    try:
        await request
    except openai.APIStatusError as error:
        assert error.status_code == 503 and int(error.response.headers["retry-after"]), error
        return REFUSED
    return ANSWERED


async def stream_outcome(client: openai.AsyncOpenAI, begun: asyncio.Event) -> str:
    try:
        stream = await client.chat.completions.create(
            model="tiny-llama",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            max_tokens=300,
            extra_body={"ignore_eos": True},
        )
    except openai.APIStatusError as error:
        assert error.status_code == 503 and int(error.response.headers["retry-after"]), error
        return REFUSED
    try:
        async for _ in stream:
            begun.set()
    except (httpx.TransportError, openai.APIError):
        return BROKEN
    return ANSWERED


MODELS = {"tiny-llama", "tiny-embed", "tiny-sd15", "tiny-wan", "tiny-vits"}


async def test_killed_under_load(tmp_path: Path) -> None:
    server = Server(tmp_path, "--config", str(starter_config(tmp_path, MODELS)))
    try:
        await asyncio.to_thread(server.wait_ready)
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
        ):
            # Asked for now and by nobody later: if it is there again, it was restored.
            loaded = await http.post("/v1/engine/models/tiny-embed/load")
            assert loaded.json()["state"] == "resident"
            video = (await http.post("/v1/videos", json=VIDEO)).json()["id"]
            begun = asyncio.Event()
            requests: list[Awaitable[str]] = []
            for number in range(50):
                match number % 10:
                    case 0 | 1 | 2 | 3:
                        requests.append(stream_outcome(client, begun))
                    case 4 | 5 | 6 | 7:
                        chat = client.chat.completions.create(
                            model="tiny-llama",
                            messages=[{"role": "user", "content": "hello"}],
                            max_tokens=100,
                            extra_body={"ignore_eos": True},
                        )
                        requests.append(outcome(chat))
                    case 8:
                        speech = client.audio.speech.create(
                            model="tiny-vits", voice="alloy", input="Hello."
                        )
                        requests.append(outcome(speech))
                    case _:
                        image = client.images.generate(
                            model="dall-e-2", prompt="a red train", size="256x256"
                        )
                        requests.append(outcome(image))
            tasks = [asyncio.ensure_future(request) for request in requests]
            async with asyncio.timeout(TIMEOUT_S):
                await begun.wait()
            killed = serving(server.process.pid)
            os.kill(killed, signal.SIGKILL)
            killed_at = time.monotonic()
            async with asyncio.timeout(TIMEOUT_S):
                outcomes = Counter(await asyncio.gather(*tasks))
            print(f"after {time.monotonic() - killed_at:.1f} s: {dict(outcomes)}")  # noqa: T201
            assert outcomes.total() == 50
            # Only what had begun is lost: the client asks again for what had not.
            assert 1 <= outcomes[BROKEN] <= 20
            assert outcomes[ANSWERED] >= 30

            async def restored() -> bool:
                models = (await http.get("/v1/engine")).json()["models"]
                return any(m["id"] == "tiny-embed" and m["state"] == "resident" for m in models)

            async def finished() -> bool:
                job = (await http.get(f"/v1/videos/{video}")).json()
                assert job["status"] in ("queued", "in_progress", "completed"), job
                return bool(job["status"] == "completed")

            await until(restored)
            await until(finished)
            assert serving(server.process.pid) != killed
            restarts = (await http.get("/v1/engine")).json()["restarts"]
            assert restarts["count"] == 1 and "SIGKILL" in restarts["reason"]
            metrics = (await http.get("/metrics")).text
            assert "roundhouse_restarts_total 1.0" in metrics
        assert await asyncio.to_thread(server.stop) == 0
        assert not psutil.pid_exists(killed)
    finally:
        server.stop()


CONFIG = """
engine: {{device: cpu, memory: 64MiB, state_dir: {folder}, data_dir: {folder}}}
server: {{port: 0}}
models:
  - {{id: small, runtime: fake, source: none}}
  - {{id: other, runtime: fake, source: none}}
"""


class Hanging:
    """A server with the limits it has by itself, and what it wrote."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log += line.decode()
            if not self._url.done() and (told := re.search(r"http://\S+", self.log)):
                self._url.set_result(told[0])

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with asyncio.timeout(TIMEOUT_S):
            url = await self._url
        no_reuse = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=no_reuse) as client:
            await until(lambda: ready(client))
            yield client


@asynccontextmanager
async def hanging(folder: Path) -> AsyncIterator[Hanging]:
    config = folder.with_suffix(".yaml")
    config.write_text(CONFIG.format(folder=folder))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.server.supervision.serve_hanging", "serve"),
        *("--config", str(config)),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Hanging(process)
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/ready")).status_code == 200


async def heals(server: Hanging, do: str, reason: str) -> httpx.Response | None:
    """Have it do that; return what the client that asked for it was told, once all is well."""
    async with server.client() as client:
        assert (await client.post(CHAT, json={"model": "other"})).status_code == 200

        async def told() -> bool:
            """The supervisor knows of it: it is told with each beat."""
            models = (await client.get("/v1/engine")).json()["models"]
            return any((m["idle_s"] or 0) > 2 * BEAT_S for m in models if m["id"] == "other")

        await until(told)
        began_s = time.monotonic()
        asked = asyncio.create_task(client.post(CHAT, json={"model": "small", "do": do}))

        async def healed() -> bool:
            status = await client.get("/v1/engine")
            # While the loop hangs, the supervisor comes to answer instead.
            return (
                status.is_success
                and status.json()["restarts"]["count"] == 1
                and await ready(client)
            )

        await until(healed)
        seconds = time.monotonic() - began_s
        print(f"{do}: healed after {seconds:.1f} s")  # noqa: T201
        assert seconds < HEALED_S
        assert reason in (await client.get("/v1/engine")).json()["restarts"]["reason"]

        async def restored() -> bool:
            models = (await client.get("/v1/engine")).json()["models"]
            return any(m["id"] == "other" and m["state"] == "resident" for m in models)

        await until(restored)
        assert (await client.post(CHAT, json={"model": "small"})).status_code == 200
        try:
            return await asked
        except httpx.TransportError:
            return None


async def test_hangs_and_a_lost_device_are_found_and_healed(tmp_path: Path) -> None:
    async with (
        hanging(tmp_path / "loop") as loop,
        hanging(tmp_path / "device") as device,
        hanging(tmp_path / "poison") as poison,
    ):
        told = await asyncio.gather(
            heals(loop, "hang the loop", "no sign of life"),
            heals(device, "hang the device", "a run on small_0 hangs"),
            heals(poison, "poison the device", "illegal memory access"),
        )
        # Nobody was left to answer in the first; the second could, the third said it failed.
        assert told[0] is None
        assert told[1] is not None and told[1].status_code == 503
        assert int(told[1].headers["retry-after"]) >= 1
        assert told[2] is not None and told[2].status_code == 500
    assert "in prepare" in loop.log and "in execute" in device.log, "nothing tells where it hung"
