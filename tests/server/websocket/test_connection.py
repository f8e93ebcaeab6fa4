"""WebSockets: their handshake, access, errors, bounds and end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from engine.errors import InvalidRequest, QueueFull, ShuttingDown
from server.app import Application
from server.router import Router
from server.settings import ServerSettings
from server.websocket.connection import WAITING_BYTES, ClientLeft, WebSocketConnection
from tests.server.fake import listening

PATH = "/v1/realtime"
KEY = "sk-socket"
WAIT_S = 20.0

Talk = Callable[[WebSocketConnection], Awaitable[None]]


async def echo(connection: WebSocketConnection) -> None:
    await connection.accept()
    while (message := await connection.receive()) is not None:
        assert isinstance(message, str)
        await connection.send(message)


def serve(app: Application, talk: Talk) -> None:
    """Have `talk` answer, in the place of the route that is there."""
    router = Router("audio")

    @router.websocket(PATH)
    async def endpoint(connection: WebSocketConnection) -> None:
        await talk(connection)

    app.router.routes[:0] = router.routes


def open_socket(url: str, path: str = PATH, **options: object) -> connect:
    url = url.replace("http://", "ws://") + path
    return connect(url, proxy=None, open_timeout=WAIT_S, **options)  # type: ignore[arg-type]


async def denial(url: str, path: str = PATH, **options: object) -> tuple[int, str, dict[str, str]]:
    """The status, the body and the headers of a refused handshake."""
    with pytest.raises(InvalidStatus) as caught:
        async with open_socket(url, path, **options):
            pass
    response = caught.value.response
    return response.status_code, bytes(response.body or b"").decode(), dict(response.headers)


async def closed(socket: ClientConnection) -> tuple[int | None, str | None]:
    """The code and the reason with which the server closes the socket."""
    async with asyncio.timeout(WAIT_S):
        await socket.wait_closed()
    return socket.close_code, socket.close_reason


async def test_messages_go_both_ways_and_are_counted(app: Application) -> None:
    serve(app, echo)
    async with listening(app) as url:
        async with open_socket(url) as socket:
            assert socket.response is not None
            assert socket.response.headers["x-request-id"].startswith("req-")
            for text in ("hello", "é" * 1000):
                await socket.send(text)
                assert await socket.recv() == text
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{url}/metrics")).text
    series = f'roundhouse_http_requests_total{{method="GET",route="{PATH}",status="101"}} 1.0'
    assert series in metrics


async def test_an_error_before_the_socket_is_open_is_a_response(app: Application) -> None:
    async def refuse(_: WebSocketConnection) -> None:
        raise QueueFull("too many", retry_after_s=7)

    serve(app, refuse)
    async with listening(app) as url:
        status, body, headers = await denial(url)
    assert (status, headers["retry-after"]) == (429, "7")
    assert '"message":"too many"' in body
    assert headers["x-request-id"]


async def test_an_error_of_an_open_socket_closes_it(app: Application) -> None:
    async def fail(connection: WebSocketConnection) -> None:
        await connection.accept()
        raise InvalidRequest("the voice is odd" * 50)

    serve(app, fail)
    async with listening(app) as url, open_socket(url) as socket:
        code, reason = await closed(socket)
    assert code == 1011
    assert (reason or "").startswith("the voice is odd")


async def test_paths_that_take_no_socket_and_sockets_that_take_no_request(app: Application) -> None:
    serve(app, echo)
    async with listening(app) as url:
        status, body, headers = await denial(url, "/v1/audio/speech")
        assert (status, headers["allow"]) == (405, "POST")
        assert "takes POST, no WebSocket" in body
        assert (await denial(url, "/v1/nowhere"))[0] == 404
        async with httpx.AsyncClient() as client:
            plain = await client.get(f"{url}{PATH}")
            posted = await client.post(f"{url}{PATH}")
    assert (plain.status_code, plain.headers["upgrade"]) == (426, "websocket")
    assert "ws://" in plain.json()["error"]["message"]
    assert (posted.status_code, posted.headers["allow"]) == (405, "GET")


async def test_another_page_is_refused(app: Application) -> None:
    serve(app, echo)
    async with listening(app) as url:
        assert (await denial(url, origin="https://evil.example"))[0] == 403
        async with open_socket(url, origin="http://localhost:3000"):
            pass


class TestKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(KEY,))

    async def test_a_key_opens_by_header_or_subprotocol(self, app: Application) -> None:
        serve(app, echo)
        async with listening(app) as url:
            status, _, headers = await denial(url)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            wrong = [Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.no")]
            assert (await denial(url, subprotocols=wrong))[0] == 401
            bearer = {"authorization": f"Bearer {KEY}"}
            async with open_socket(url, additional_headers=bearer) as socket:
                assert socket.subprotocol is None
            offered = [Subprotocol("realtime"), Subprotocol(f"openai-insecure-api-key.{KEY}")]
            async with open_socket(url, subprotocols=offered) as socket:
                assert socket.subprotocol == "realtime"


async def test_a_client_that_leaves_cancels_the_endpoint(app: Application) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work(connection: WebSocketConnection) -> None:
        await connection.accept()
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    serve(app, work)
    async with asyncio.timeout(WAIT_S), listening(app) as url:
        async with open_socket(url) as socket:
            await began.wait()
            socket.transport.abort()
        await ended.wait()


async def test_a_client_that_floods_is_held_back(app: Application) -> None:
    go_on = asyncio.Event()
    seen: list[int] = []

    async def idle(connection: WebSocketConnection) -> None:
        await connection.accept()
        await go_on.wait()
        seen.append(connection.waiting_bytes)
        for _ in range(300):
            await connection.receive()
        await connection.send("done")

    serve(app, idle)
    async with asyncio.timeout(WAIT_S), listening(app) as url, open_socket(url) as socket:

        async def flood() -> None:
            for _ in range(300):
                await socket.send("x" * 100_000)

        flooding = asyncio.create_task(flood())
        held, _ = await asyncio.wait((flooding,), timeout=0.5)
        assert not held, "30 MB went to an endpoint that does not read"
        go_on.set()
        assert await socket.recv() == "done"
        await flooding
    assert WAITING_BYTES <= seen[0] <= WAITING_BYTES + 100_100


async def test_a_message_that_is_too_large_closes_the_socket(app: Application) -> None:
    serve(app, echo)
    async with listening(app, max_message=2000) as url, open_socket(url) as socket:
        await socket.send("x" * 2001)
        assert (await closed(socket))[0] == 1009


async def test_a_client_that_does_not_read_is_given_up(app: Application) -> None:
    left = asyncio.Event()

    async def talk(connection: WebSocketConnection) -> None:
        await connection.accept()
        try:
            while True:
                await connection.send("x" * 200_000)
        except ClientLeft:
            left.set()

    serve(app, talk)
    async with (
        asyncio.timeout(WAIT_S),
        listening(app, write_timeout_s=0.2) as url,
        open_socket(url, max_queue=1) as socket,
    ):
        await left.wait()
        socket.transport.abort()


async def test_a_process_that_ends_closes_open_sockets(app: Application) -> None:
    serve(app, echo)
    async with listening(app) as url, open_socket(url) as socket:
        await app.requests.give_up(ShuttingDown("restarting", retry_after_s=5))
        assert await closed(socket) == (1012, "restarting")
        with pytest.raises(ConnectionClosed):
            await socket.send("more")


async def test_a_stop_closes_open_sockets(app: Application) -> None:
    serve(app, echo)
    async with listening(app) as url:
        socket = await open_socket(url)
    assert (await closed(socket))[0] == 1012
