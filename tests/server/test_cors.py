"""Scripts of other web pages: which may read the answers, and that every answer is readable."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from engine.errors import ShuttingDown
from engine.events import Event
from engine.requests import TextRequest
from server.app import Application
from server.cors import EXPOSED_HEADERS, METHODS, allow_origins
from server.headers import HEADER_PREFIX
from server.router import ServedRoute
from server.settings import ServerSettings
from server.supervision.fallback_responder import answer
from tests.server.fake import FakeRuntime

CHAT = "/v1/chat/completions"
LOAD = "/v1/engine/models/small/load"
APP = "http://localhost:5173"
ELSEWHERE = "https://app.example.com"
BODY = {"model": "small", "messages": []}
ALLOW = "access-control-allow-origin"
KEY = {"authorization": "Bearer user-key"}


def preflight(origin: str, headers: str = "authorization,content-type") -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": headers,
    }


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(api_keys=(SecretStr("user-key"),), cors_origins=(APP, ELSEWHERE))


@pytest.fixture
async def client(app: Application, settings: ServerSettings) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the layers that the server puts around its application."""
    transport = httpx.ASGITransport(allow_origins(app, settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client,
    ):
        yield client


class TestNamedOrigins:
    @pytest.mark.parametrize("origin", [APP, ELSEWHERE])
    @pytest.mark.parametrize(
        "headers",
        [
            "authorization,content-type",
            "x-api-key,anthropic-version,anthropic-dangerous-direct-browser-access",
            "x-stainless-lang,x-stainless-retry-count,x-roundhouse-priority",
        ],
    )
    async def test_a_preflight_needs_no_key(
        self, client: httpx.AsyncClient, origin: str, headers: str
    ) -> None:
        for path in (CHAT, "/v1/models", "/v1/videos/x"):
            got = await client.options(path, headers=preflight(origin, headers))
            assert got.status_code == 200
            assert got.headers[ALLOW] == origin
            assert got.headers["access-control-allow-headers"] == headers
            assert set(got.headers["access-control-allow-methods"].split(", ")) == {*METHODS}

    async def test_the_methods_are_those_of_the_routes(self, app: Application) -> None:
        routes = [route for route in app.routes if isinstance(route, ServedRoute)]
        assert {method for route in routes for method in route.methods} == {*METHODS}

    async def test_every_answer_is_readable(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        async def bug(request: TextRequest) -> AsyncGenerator[Event, None]:
            raise KeyError(request.model)
            yield

        origin = {"origin": APP}
        good = await client.post(CHAT, json=BODY, headers={**origin, **KEY})
        anonymous = await client.post(CHAT, json=BODY, headers=origin)
        unknown = await client.get("/nowhere", headers={**origin, **KEY})
        method = await client.get(CHAT, headers={**origin, **KEY})
        stream = await client.post(CHAT, json={**BODY, "stream": True}, headers={**origin, **KEY})
        runtime.answer = bug
        broken = await client.post(CHAT, json=BODY, headers={**origin, **KEY})
        answers = (good, anonymous, unknown, method, stream, broken)
        assert [each.status_code for each in answers] == [200, 401, 404, 405, 200, 500]
        assert stream.text.endswith("data: [DONE]\n\n")
        for each in answers:
            assert each.headers[ALLOW] == APP
            assert "Origin" in each.headers["vary"]
            exposed = each.headers["access-control-expose-headers"].split(", ")
            ours = [name for name in each.headers if name.startswith((HEADER_PREFIX, "openai-"))]
            assert {"x-request-id", *ours} <= {*exposed}

    async def test_another_page_may_not_read(self, client: httpx.AsyncClient) -> None:
        other = "https://evil.example"
        assert (await client.options(CHAT, headers=preflight(other))).status_code == 400
        got = await client.get("/v1/models", headers={"origin": other, **KEY})
        assert ALLOW not in got.headers

    async def test_an_answer_to_all_open_requests_is_readable(
        self, app: Application, settings: ServerSettings, runtime: FakeRuntime
    ) -> None:
        async def gives_up(_: TextRequest) -> AsyncGenerator[Event, None]:
            await app.requests.give_up(ShuttingDown("gone", retry_after_s=5))
            raise KeyError
            yield

        runtime.answer = gives_up
        transport = httpx.ASGITransport(allow_origins(app, settings))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            got = await client.post(CHAT, json=BODY, headers={"origin": APP, **KEY})
        assert (got.status_code, got.headers[ALLOW]) == (503, APP)


class TestOff:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user-key"),))

    async def test_no_page_may_read(self, client: httpx.AsyncClient) -> None:
        assert (await client.options(CHAT, headers=preflight(APP))).status_code == 401
        got = await client.get("/v1/models", headers={"origin": APP, **KEY})
        assert got.status_code == 200
        assert not [name for name in got.headers if name.startswith("access-control")]


class TestEveryOrigin:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(cors_origins=("*",))

    async def test_every_page_may_use_the_models_and_give_no_orders(
        self, client: httpx.AsyncClient
    ) -> None:
        for origin in (ELSEWHERE, "null"):
            got = await client.post(CHAT, json=BODY, headers={"origin": origin})
            assert (got.status_code, got.headers[ALLOW]) == (200, "*")
            assert (await client.post(LOAD, headers={"origin": origin})).status_code == 403
        assert (await client.post(LOAD, headers={"origin": APP})).status_code == 200
        assert (await client.post(LOAD)).status_code == 200


class TestNamedOriginWithoutKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(cors_origins=(ELSEWHERE,))

    async def test_it_may_do_everything(self, client: httpx.AsyncClient) -> None:
        for path in (CHAT, LOAD):
            got = await client.post(path, json=BODY, headers={"origin": ELSEWHERE})
            assert (got.status_code, got.headers[ALLOW]) == (200, ELSEWHERE)
        got = await client.post(CHAT, json=BODY, headers={"origin": "https://evil.example"})
        assert got.status_code == 403


def test_an_answer_of_the_supervisor_is_readable() -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nOrigin: {APP}\r\nhost: a\r\n\r\n".encode()
    assert f"\r\n{ALLOW}: {APP}\r\n".encode() in answer(head, 3, [APP])
    assert f"\r\n{ALLOW}: {APP}\r\n".encode() in answer(head, 3, ["*"])
    for origins in ([], [ELSEWHERE]):
        assert b"access-control" not in answer(head, 3, origins)
    wanted = b"access-control-request-headers: authorization\r\n\r\n"
    before = answer(
        head.replace(b"POST", b"OPTIONS").replace(b"\r\n\r\n", b"\r\n" + wanted), 3, [APP]
    )
    assert before.startswith(b"HTTP/1.1 204 ")
    assert b"\r\naccess-control-allow-headers: authorization\r\n" in before


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("*", ("*",)),
        ("http://localhost:5173/, HTTPS://App.Example.com", (APP, ELSEWHERE)),
        (["app://obsidian.md", "chrome-extension://abc"],) * 2,
        (None, ()),
    ],
)
def test_origins_are_as_browsers_send_them(given: object, held: tuple[str, ...]) -> None:
    assert ServerSettings.model_validate({"cors_origins": given}).cors_origins == tuple(held)


@pytest.mark.parametrize(
    "origin", ["localhost:5173", "http://a/b", "https://*.example.com/x", "http://", "null", "a b"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin: write SCHEME://HOST"):
        ServerSettings(cors_origins=(origin,))


def test_every_header_that_a_route_sets_is_exposed() -> None:
    """Each header of ours that stands in the source is one that a script may read."""
    server = Path(__file__).parents[2] / "server"
    text = "".join(path.read_text() for path in server.rglob("*.py"))
    named = {
        *re.findall(r"\"(x-should-retry|retry-after|openai-processing-ms|x-request-id)\"", text),
        *(f"{HEADER_PREFIX}{name}" for name in re.findall(r"HEADER_PREFIX\}([a-z-]+)\"", text)),
    }
    assert len(named) >= 9
    assert named <= {*EXPOSED_HEADERS}
