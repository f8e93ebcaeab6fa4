"""Answers in Redis: one that is away or slow in any case, a real one where it is installed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import ConfigError, Overloaded
from server.response_cache.entry import Entry
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.response_cache.conftest import Fresh, serving, until
from tests.server.response_cache.test_cache import ASK, CACHE, CHAT, KEPT

pytest.importorskip("redis", reason="the package redis is not installed (the extra `redis`)")

from redis.asyncio import Redis

from server.response_cache.redis_store import PREFIX, RedisStore

LIMIT_S = 60
REDIS = shutil.which("redis-server")

needs_redis = pytest.mark.skipif(REDIS is None, reason="needs redis-server (Debian has it)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def entry(text: str) -> Entry:
    return Entry(200, {"content-type": "text/plain"}, (text.encode(),), streamed=False)


async def written(store: RedisStore) -> None:
    """Wait until nothing is being written."""
    await asyncio.wait_for(asyncio.gather(*store._writes), LIMIT_S)


class TestAwayOrSlow:
    @pytest.fixture
    async def silent(self) -> AsyncIterator[str]:
        """The address of a server that takes connections and never answers."""
        open_ = asyncio.Event()

        async def listen(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await open_.wait()
            writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        try:
            yield f"redis://:secret-word@127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        finally:
            open_.set()
            server.close()
            await server.wait_closed()

    @pytest.mark.parametrize("kind", ["away", "silent"])
    async def test_it_is_a_miss_and_one_warning(
        self, engine: Engine, fresh: Fresh, caplog: pytest.LogCaptureFixture, silent: str,
        kind: str, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("server.response_cache.redis_store.WRITE_LIMIT_S", 0.2)
        url = silent if kind == "silent" else f"redis://:secret-word@127.0.0.1:{free_port()}/0"
        settings = ServerSettings(response_cache=url)
        with caplog.at_level(logging.DEBUG):
            async with serving(engine, settings) as caller:
                async with asyncio.timeout(LIMIT_S):
                    for run in range(3):
                        answer = await caller.post(CHAT, json=ASK)
                        assert answer.headers[CACHE] == "miss"
                        assert answer.json() == {"run": run + 1}
                    cleared = await caller.client.delete("/v1/engine/cache")
                    assert cleared.status_code == 503
                status = await caller.status()
        assert status["store"] == "redis"
        assert status["entries"] is None
        warned = [each for each in caplog.records if each.levelno >= logging.WARNING]
        assert len([each for each in warned if "without Redis" in each.getMessage()]) == 1
        told = f"{caplog.text}{status}{answer.headers}{cleared.text}"
        assert "secret-word" not in told

    async def test_a_request_waits_a_moment_only(
        self, silent: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.response_cache.redis_store.WRITE_LIMIT_S", 10 * LIMIT_S)
        store = RedisStore(silent, 60)
        async with asyncio.timeout(LIMIT_S):
            assert await store.get(b"key") is None
        await store.close()

    async def test_it_is_asked_again_after_a_pause(
        self, silent: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0
        store = RedisStore(silent, 60, clock=lambda: now)
        assert await store.get(b"key") is None
        with monkeypatch.context() as context:
            context.setattr(store._redis, "get", None)  # asking it would be an error
            assert await store.get(b"key") is None
        failed = store._failing
        made = threading.Event()

        def encode() -> None:
            made.set()

        store.put(b"key", 10, encode)
        assert failed and not store._writes and not made.is_set()
        now = 10.0
        store.put(b"key", 10, encode)
        await written(store)
        assert made.is_set()
        await store.close()

    async def test_without_the_package(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install 'roundhouse\[redis\]'"):
            RedisStore("redis://localhost", 60)

    async def test_a_wrong_address_is_not_repeated(self) -> None:
        with pytest.raises(ConfigError) as caught:
            RedisStore("redis://:secret-word@localhost:port/0", 60)
        assert "secret-word" not in str(caught.value)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if REDIS is None:
        pytest.skip("needs redis-server (Debian has it)")
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "redis.sock"
    port = free_port()
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [
            REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder),
            "--requirepass", "secret-word", "--unixsocket", str(path), "--maxmemory", "64mb",
        ],
        stdout=log,
        stderr=log,
    )  # fmt: skip
    try:
        deadline = 1200
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                deadline -= 1
                assert deadline and process.poll() is None, (folder / "log").read_text()
                process_wait(process)
        yield f"redis://:secret-word@127.0.0.1:{port}/3"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def process_wait(process: subprocess.Popen[bytes]) -> None:
    """Wait a moment, or until the process has ended."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    redis = Redis.from_url(redis_url)
    await redis.flushall()
    yield redis
    await redis.aclose()


@needs_redis
class TestARealOne:
    @pytest.fixture
    async def store(self, redis_url: str) -> AsyncIterator[RedisStore]:
        # Other tests have the processor: here only the answer counts.
        store = RedisStore(redis_url, 60, read_limit_s=LIMIT_S)
        yield store
        await store.close()

    async def put(self, store: RedisStore, key: bytes, text: str) -> None:
        store.put(key, 10, lambda: entry(text).encode(key))
        await written(store)

    async def test_what_was_put_is_there(self, store: RedisStore, redis: Any) -> None:
        await self.put(store, b"key", "hello")
        assert await store.get(b"key") == entry("hello")
        assert await store.get(b"other") is None
        (name,) = await redis.keys()
        assert name.startswith(PREFIX)
        assert 0 < await redis.pttl(name) <= 60_000

    async def test_a_large_answer(self, store: RedisStore, redis: Any) -> None:
        await self.put(store, b"key", "x" * 10**6)
        assert await store.get(b"key") == entry("x" * 10**6)

    async def test_a_damaged_answer_is_never_served(self, store: RedisStore, redis: Any) -> None:
        await self.put(store, b"key", "hello")
        (name,) = await redis.keys()
        content = await redis.get(name)
        await redis.set(name, content.replace(b"hello", b"jello"))
        assert await store.get(b"key") is None
        await redis.set(name, b"")
        assert await store.get(b"key") is None

    async def test_only_ours_are_removed(self, store: RedisStore, redis: Any) -> None:
        await redis.set("theirs", "1")
        for number in range(3):
            await self.put(store, bytes([number]), "hello")
        assert await store.clear() == 3
        assert await redis.keys() == [b"theirs"]

    async def test_a_full_one(
        self, store: RedisStore, redis: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        await redis.config_set("maxmemory", "1")
        try:
            await self.put(store, b"key", "hello")
            assert len([each for each in caplog.messages if "without Redis" in each]) == 1
        finally:
            await redis.config_set("maxmemory", "64mb")

    async def test_it_comes_back(self, redis_url: str, redis: Any) -> None:
        now = 0.0
        store = RedisStore(redis_url, 60, read_limit_s=LIMIT_S, clock=lambda: now)
        store._failed(OSError())
        assert await store.get(b"key") is None
        now = 10.0
        await self.put(store, b"key", "hello")
        assert await store.get(b"key") == entry("hello")
        assert not store._failing
        await store.close()

    async def test_a_wrong_password_is_a_miss(
        self, redis_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = RedisStore(redis_url.replace("secret-word", "another"), 60, read_limit_s=LIMIT_S)
        assert await store.get(b"key") is None
        with pytest.raises(Overloaded):
            await store.clear()
        await store.close()
        assert "another" not in caplog.text

    @pytest.mark.parametrize("name", ["chat", "streamed chat", "speech"])
    async def test_two_servers_share_it(
        self, redis_url: str, redis: Any, runtime: FakeRuntime, tmp_path: Path, fresh: Fresh,
        name: str, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr("server.response_cache.redis_store.READ_LIMIT_S", LIMIT_S)
        settings = ServerSettings(response_cache=redis_url)
        path, request = KEPT[name]
        engines = [fake_engine(runtime, tmp_path / each) for each in ("a", "b")]
        async with serving(engines[0], settings) as caller:
            first = await caller.post(path, **request)
            assert first.headers[CACHE] == "miss"
            await until(redis.dbsize)
            text = (await caller.client.get("/metrics")).text
            assert "response_cache_requests_total" in text
            assert "response_cache_bytes" not in text
        async with serving(engines[1], settings) as caller:
            second = await caller.post(path, **request)
        assert second.headers[CACHE] == "hit"
        assert second.content == first.content
