"""Behind a reverse proxy: the links in answers, and prefixes that stay in the path."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError

from engine.events import Event, ImageResult
from engine.requests import ImageRequest
from server.public_address import is_trusted, without_root_path
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime

KEY = {"x-api-key": "user-key"}
PROXY = "10.1.2.3"
FORWARDED = {
    "x-forwarded-proto": "https",
    "x-forwarded-host": "ai.example.com",
    "x-forwarded-prefix": "/rh/",
}


@pytest.fixture
def given() -> dict[str, Any]:
    return {}


@pytest.fixture
def settings(given: dict[str, Any]) -> ServerSettings:
    return ServerSettings.model_validate({"api_keys": "user-key", **given})


@pytest.fixture
def runtime() -> FakeRuntime:
    async def paint(request: ImageRequest) -> AsyncGenerator[Event, None]:
        yield ImageResult((Image.new("RGB", (8, 8)),), request.seed or 0)

    runtime = FakeRuntime()
    runtime.answer = paint
    return runtime


@pytest.fixture
async def client(app: FastAPI, settings: ServerSettings) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(without_root_path(app, settings), client=(PROXY, 5000))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://inner:8000", headers=KEY) as client,
    ):
        yield client


async def link(client: httpx.AsyncClient, path: str = "", **headers: str) -> str:
    body = {"model": "small", "prompt": "a", "size": "8x8", "response_format": "url"}
    got = await client.post(f"{path}/v1/images/generations", json=body, headers=headers)
    url = str(got.json()["data"][0]["url"])
    # Whatever it begins with, the rest leads to the file.
    assert (await client.get(f"/v1/{url.partition('/v1/')[2]}")).status_code == 200
    return url.partition("/v1/")[0]


@pytest.mark.parametrize(
    ("given", "headers", "expected"),
    [
        ({}, {}, "http://inner:8000"),
        ({}, FORWARDED, "http://inner:8000"),
        ({"root_path": "/ai/"}, {}, "http://inner:8000/ai"),
        ({"public_url": "https://gpu.example.com/ai/"}, FORWARDED, "https://gpu.example.com/ai"),
        ({"forwarded_allow_ips": "10.1.0.0/16"}, FORWARDED, "https://ai.example.com/rh"),
        ({"forwarded_allow_ips": "*"}, FORWARDED, "https://ai.example.com/rh"),
        ({"forwarded_allow_ips": "10.1.2.4"}, FORWARDED, "http://inner:8000"),
        (
            {"forwarded_allow_ips": [PROXY], "root_path": "/ai"},
            {"x-forwarded-proto": "https, http", "x-forwarded-host": "a.example:8443, inner"},
            "https://a.example:8443/ai",
        ),
        (
            {"forwarded_allow_ips": [PROXY]},
            {
                "x-forwarded-proto": "javascript",
                "x-forwarded-host": "a.example/x?",
                "x-forwarded-prefix": "//evil.example",
            },
            "http://inner:8000",
        ),
    ],
)
async def test_a_link_begins_with_the_address_for_clients(
    client: httpx.AsyncClient, headers: dict[str, str], expected: str
) -> None:
    assert await link(client, **headers) == expected


@pytest.mark.parametrize("given", [{"root_path": "/ai"}])
async def test_a_prefix_may_stay_in_the_path(client: httpx.AsyncClient) -> None:
    assert await link(client, "/ai") == await link(client) == "http://inner:8000/ai"
    for path in ("/health", "/ai/health", "/ai/", "/ai/docs", "/ai/web/app.js"):
        got = await client.get(path, headers={"x-api-key": "wrong"})  # none of these needs a key
        assert got.status_code in (200, 503), path
    assert (await client.get("/ai/v1/models", headers={"x-api-key": "wrong"})).status_code == 401
    assert (await client.get("/ai")).headers["location"] == "/ai/"
    assert (await client.get("/aim/health")).status_code == 404


@pytest.mark.parametrize("given", [{"root_path": "/ai"}])
async def test_the_pages_work_below_a_prefix(client: httpx.AsyncClient) -> None:
    for page in ("/ai/", "/ai/docs"):
        text = (await client.get(page)).text
        links = [part.partition('"')[0] for part in text.replace('src="', 'href="').split('href="')]
        for each in links[1:]:
            url = httpx.URL(f"http://inner:8000{page}").join(each)
            assert url.path.startswith("/ai/")
            assert (await client.get(url)).status_code == 200
    document = (await client.get("/ai/openapi.json")).json()
    assert document["servers"] == [{"url": "/ai"}]


def test_whom_the_server_trusts() -> None:
    assert is_trusted("::ffff:10.0.0.1", ("10.0.0.0/8",))
    assert is_trusted("fd00::1", ("10.0.0.0/8", "fd00::/8"))
    assert not is_trusted("10.0.0.1", ())
    assert not is_trusted("", ("10.0.0.0/8",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("public_url", "gpu.example.com"),
        ("public_url", "ftp://gpu.example.com"),
        ("public_url", "https://gpu.example.com/?a=b"),
        ("public_url", "https://me:secret@gpu.example.com"),
        ("root_path", "ai"),
        ("root_path", "/a//b"),
        ("root_path", "https://a/b"),
        ("root_path", "/v1"),
        ("root_path", "/docs/x"),
        ("forwarded_allow_ips", "proxy.example.com"),
        ("forwarded_allow_ips", "10.0.0.0/64"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name) as caught:
        ServerSettings.model_validate({name: value})
    assert "secret" not in str(caught.value.errors(include_input=False))


class TestWithoutKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(public_url="https://gpu.example.com")

    async def test_the_name_of_the_proxy_is_answered(self, client: httpx.AsyncClient) -> None:
        for host, status in (
            ("gpu.example.com", 200),
            ("host.docker.internal:8000", 200),
            ("host.containers.internal:8000", 200),
            ("evil.example", 403),
            ("host.docker.internal.evil.example", 403),
        ):
            got = await client.get("/v1/models", headers={"host": host})
            assert got.status_code == status, host
        page = {"host": "gpu.example.com", "origin": "https://gpu.example.com"}
        assert (await client.get("/v1/models", headers=page)).status_code == 200

    async def test_a_header_is_no_name(self, client: httpx.AsyncClient) -> None:
        """A page of a rebound name may send any header to what it believes to be its own host."""
        rebound = {"host": "evil.example", "x-forwarded-host": "localhost"}
        got = await client.get("/v1/models", headers=rebound)
        assert got.status_code == 403
        assert "server.public_url" in got.json()["error"]["message"]
