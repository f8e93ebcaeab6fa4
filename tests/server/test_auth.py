"""Who is let in."""

from __future__ import annotations

import httpx
import pytest
from pydantic import SecretStr

from engine.engine import Engine
from server.keys.keyring import Keyring
from server.settings import ServerSettings

USER = {"authorization": "Bearer user-key"}
ADMIN = {"authorization": "Bearer admin-key"}
LOAD = "/v1/engine/models/small/load"
PROBES = ("/health", "/ready", "/ping")
KEYED = ("/v1/models", "/v1/models/small", "/v1/engine", "/metrics", "/nowhere")


class TestWithKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(
            host="0.0.0.0",
            api_keys=(SecretStr("user-key"), SecretStr("second-key")),
            admin_keys=(SecretStr("admin-key"),),
        )

    @pytest.mark.parametrize("path", KEYED)
    async def test_no_key(self, client: httpx.AsyncClient, path: str) -> None:
        answer = await client.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert answer.json()["error"]["code"] == "invalid_api_key"

    @pytest.mark.parametrize(
        "headers",
        [
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer user-ke"},
            {"authorization": "Bearer "},
            {"authorization": "Basic user-key"},
            {"authorization": "user-key"},
            {"x-api-key": "wrong"},
            {"x-api-key": "clé".encode().decode("latin-1")},
        ],
    )
    async def test_wrong_key(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        answer = await client.get("/v1/models", headers=raw)
        assert answer.status_code == 401

    @pytest.mark.parametrize(
        "headers",
        [
            USER,
            ADMIN,
            {"authorization": "bearer second-key"},
            {"x-api-key": "second-key"},
            {"authorization": "Bearer wrong", "x-api-key": "user-key"},
        ],
    )
    async def test_right_key(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    async def test_probes_are_open(self, client: httpx.AsyncClient) -> None:
        for path in PROBES:
            assert (await client.get(path)).status_code != 401

    async def test_orders_need_an_admin_key(self, client: httpx.AsyncClient) -> None:
        assert (await client.post(LOAD)).status_code == 401
        refused = await client.post(LOAD, headers=USER)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "admin_key_required"
        assert (await client.post(LOAD, headers=ADMIN)).status_code == 200

    async def test_anthropic_envelope_where_anthropic_clients_call(
        self, client: httpx.AsyncClient
    ) -> None:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            document = (await client.post(path)).json()
            assert document["type"] == "error"
            assert document["error"]["type"] == "authentication_error"

    async def test_pages_may_call_with_a_key(self, client: httpx.AsyncClient) -> None:
        headers = {**USER, "origin": "https://example.com", "host": "gpu.example.com"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    async def test_keys_are_shown_nowhere(self, client: httpx.AsyncClient) -> None:
        for path in KEYED:
            text = (await client.get(path, headers=ADMIN)).text
            assert "user-key" not in text and "admin-key" not in text


class TestOnlyApiKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user-key"),))

    async def test_nobody_may_give_orders(self, client: httpx.AsyncClient) -> None:
        assert (await client.post(LOAD, headers=USER)).status_code == 403


class TestWithoutKeys:
    async def test_programs_on_this_machine_may_do_everything(
        self, client: httpx.AsyncClient
    ) -> None:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post(LOAD)).status_code == 200

    @pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "a.localhost"])
    async def test_loopback_host_names(self, client: httpx.AsyncClient, host: str) -> None:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example:8000", "localhost.evil.example", "192.168.1.5", "0.0.0.0:8000", "[:"]
    )
    async def test_rebound_host_names(self, client: httpx.AsyncClient, host: str) -> None:
        answer = await client.get("/v1/models", headers={"host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_forbidden"

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://["])
    async def test_foreign_pages(self, client: httpx.AsyncClient, origin: str) -> None:
        answer = await client.post(LOAD, headers={"origin": origin})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_forbidden"
        assert "access-control-allow-origin" not in answer.headers

    async def test_local_pages(self, client: httpx.AsyncClient) -> None:
        answer = await client.post(LOAD, headers={"origin": "http://localhost:3000"})
        assert answer.status_code == 200


class TestInsecure:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(host="0.0.0.0", insecure=True)

    async def test_models_are_open_and_orders_are_not(self, client: httpx.AsyncClient) -> None:
        headers = {"host": "gpu.example.com:8000"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.post(LOAD, headers=headers)).status_code == 403

    async def test_foreign_pages(self, client: httpx.AsyncClient) -> None:
        headers = {"host": "gpu.example.com:8000", "origin": "https://evil.example"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 403
        headers["origin"] = "http://gpu.example.com:3000"
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


def test_a_key_that_is_both_has_the_higher_role(engine: Engine) -> None:
    both = (SecretStr("both"),)
    settings = ServerSettings(api_keys=both, admin_keys=both)
    access = Keyring(settings.configured_keys, engine.config).find("both")
    assert access is not None and access.admin
