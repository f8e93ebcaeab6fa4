"""Client secrets: made through OpenAI's own client, and used as browsers use them."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from engine.errors import QueueFull
from engine.requests import TextRequest
from server.app import Application
from server.keys.client_secrets import MAX_BYTES, ClientSecrets
from server.keys.record import Key, digest_of
from tests.server.realtime.conftest import Voices, talking

SESSION: dict[str, Any] = {
    "type": "realtime",
    "model": "gpt-realtime",
    "instructions": "Be brief.",
    "output_modalities": ["text"],
}
KEY = "sk-of-the-owner"
OWNER = Key(
    name="alice",
    digest=digest_of(KEY),
    models=("chat", "ears", "voice"),
    endpoints=("chat",),
    created_at=0,
)


async def make(url: str, key: str = "none", **body: Any) -> Any:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    return await client.realtime.client_secrets.create(**body)


async def refused(url: str, secret: str, path: str = "/v1/realtime") -> tuple[int, str]:
    """The status and the body of a handshake with a secret."""
    subprotocols = [Subprotocol("realtime"), Subprotocol(f"openai-insecure-api-key.{secret}")]
    address = url.replace("http", "ws") + path
    with pytest.raises(InvalidStatus) as caught:
        async with connect(address, proxy=None, subprotocols=subprotocols):
            pass
    return caught.value.response.status_code, bytes(caught.value.response.body or b"").decode()


async def test_a_session_begins_as_its_secret_says(url: str, voices: Voices) -> None:
    made = await make(url, session=SESSION, expires_after={"anchor": "created_at", "seconds": 60})
    assert made.value.startswith("ek_")
    assert 58 <= made.expires_at - time.time() <= 61
    assert made.session.instructions == "Be brief."
    assert made.session.audio.input.turn_detection.type == "server_vad"
    for _ in range(2):  # a secret opens several sessions
        async with talking(url, made.value, model=None) as talk:
            created = talk.of("session.created")[0].session
            assert (created.model, created.instructions) == ("gpt-realtime", "Be brief.")
            assert created.output_modalities == ["text"]
    async with talking(url, made.value, model="chat") as talk:
        assert talk.of("session.created")[0].session.model == "chat"
        await talk.say("Hi")
        await talk.connection.response.create()
        await talk.until("response.done")
    chat = next(each for each in voices.requests if isinstance(each, TextRequest))
    assert chat.body["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_a_secret_may_leave_the_model_to_the_address(url: str) -> None:
    made = await make(url)
    assert 598 <= made.expires_at - time.time() <= 601
    status, body = await refused(url, made.value)
    assert (status, '"param":"model"' in body) == (400, True)
    async with talking(url, made.value) as talk:
        assert talk.of("session.created")[0].session.model == "gpt-realtime"


async def test_a_secret_for_transcripts(url: str) -> None:
    made = await make(url, session={"type": "transcription"})
    async with talking(url, made.value, model="chat") as talk:
        assert talk.of("session.created")[0].session.type == "transcription"
    conversation = await make(url, session=SESSION)
    status, body = await refused(url, conversation.value, "/v1/realtime?intent=transcription")
    assert (status, '"param":"intent"' in body) == (400, True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"expires_after": {"seconds": 9}}, "expires_after.seconds"),
        ({"expires_after": {"seconds": 7_201}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "last_used_at"}}, "expires_after.anchor"),
        ({"session": {"type": "realtime", "voice": "v"}}, "session.voice"),
        ({"session": {"audio": {"output": {"speed": 9}}}}, "session.audio.output.speed"),
        ({"session": {"type": "video"}}, "session.type"),
        ({"sessions": {}}, "sessions"),
    ],
)
async def test_what_is_wrong_is_named(url: str, body: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/v1/realtime/client_secrets", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_model_that_nobody_has_is_refused(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(
            "/v1/realtime/client_secrets", json={"session": {"model": "nobody"}}
        )
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


class TestKeys:
    @pytest.fixture
    def app(self, app: Application) -> Application:
        app.keyring.replace([OWNER])
        return app

    async def test_a_secret_has_the_rights_of_its_key(
        self, url: str, voices: Voices, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("", "uvicorn.error", "server"):
            caplog.set_level(logging.DEBUG, name)
        with pytest.raises(openai.AuthenticationError):
            await make(url, "wrong")
        with pytest.raises(openai.PermissionDeniedError):
            await make(url, KEY, session={**SESSION, "model": "huge"})
        made = await make(url, KEY, session=SESSION)
        subprotocols = [Subprotocol("realtime")]
        subprotocols.append(Subprotocol(f"openai-insecure-api-key.{made.value}"))
        address = f"{url.replace('http', 'ws')}/v1/realtime"
        async with connect(address, proxy=None, subprotocols=subprotocols) as socket:
            assert socket.subprotocol == "realtime"
        async with talking(url, made.value) as talk:
            await talk.say("Hi")
            await talk.connection.response.create()
            await talk.until("response.done")
            error = await talk.update(type="realtime", model="huge")
            assert error.error.code == "model_forbidden"
        chat = next(each for each in voices.requests if isinstance(each, TextRequest))
        assert chat.scheduling.caller.name == "alice"
        clients = ("openai", "httpcore", "httpx", "websockets.client")
        logged = [each for each in caplog.records if not each.name.startswith(clients)]
        assert not [each for each in logged if made.value in each.getMessage()]
        assert [each for each in logged if "/v1/realtime 101" in each.getMessage()]

    async def test_a_secret_opens_nothing_else(self, url: str) -> None:
        made = await make(url, KEY, session=SESSION)
        async with httpx.AsyncClient(base_url=url) as client:
            for path in ("/v1/models", "/v1/realtime/client_secrets", "/v1/engine"):
                answer = await client.get(path, headers={"x-api-key": made.value})
                code = answer.json()["error"]["code"]
                assert (answer.status_code, code) == (403, "endpoint_forbidden")

    async def test_what_becomes_of_the_key_becomes_of_the_secret(
        self, url: str, app: Application
    ) -> None:
        made = await make(url, KEY, session=SESSION)
        changes: list[tuple[dict[str, Any], int, str]] = [
            ({"models": ("ears",)}, 403, "model_forbidden"),
            ({"endpoints": ("images",)}, 403, "endpoint_forbidden"),
            ({"expires_at": 1}, 401, "has expired"),
            ({"revoked_at": 1}, 401, "was revoked"),
            ({"digest": digest_of("another")}, 401, "not accepted any more"),
        ]
        for change, status, message in changes:
            app.keyring.replace([replace(OWNER, **change)])
            found, body = await refused(url, made.value)
            assert (found, message in body) == (status, True), body
        app.keyring.replace([OWNER])
        async with talking(url, made.value, model=None):
            pass

    async def test_secrets_of_a_server_without_keys_end_when_it_gets_some(
        self, url: str, app: Application
    ) -> None:
        app.keyring.replace([])
        made = await make(url, session=SESSION)
        app.keyring.replace([OWNER])
        assert (await refused(url, made.value))[0] == 401


async def test_an_unknown_secret_is_refused_also_without_keys(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, body = await refused(url, "ek_unknown", "/v1/realtime?model=chat")
    assert (status, "it has expired" in body) == (401, True)
    async with talking(url):
        pass  # the handshake before is over, and no error for the log
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


class TestTable:
    def test_a_secret_expires(self) -> None:
        now = 100.0
        secrets = ClientSecrets(lambda: now)
        value, record = secrets.make(b"a", {"type": "realtime"}, 10)
        later, _ = secrets.make(b"a", {}, 20)
        assert record.expires_at == 110
        now = 109.9
        assert secrets.find(value) == record
        now = 110.0
        assert secrets.find(value) is None
        assert secrets.find(later) is not None

    def test_one_key_cannot_fill_the_memory(self) -> None:
        now = 100.0
        secrets = ClientSecrets(lambda: now)
        session = {"instructions": "x" * (MAX_BYTES // 4)}
        for _ in range(3):
            secrets.make(b"a", session, 30)
        with pytest.raises(QueueFull) as raised:
            secrets.make(b"a", session, 30)
        assert raised.value.retry_after_s == 30
        secrets.make(b"b", session, 30)  # another key has room
        now = 130.0
        secrets.make(b"a", session, 30)
