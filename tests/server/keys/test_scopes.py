"""What a key of the store may call and use, over HTTP."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import SecretStr

from engine.caller import Caller
from engine.engine import Engine
from engine.errors import ConfigError
from server.app import Application, create_app
from server.auth import is_open
from server.keys.endpoints import FAMILIES, families_of, is_counted
from server.keys.record import Key, digest_of, new_secret
from server.keys.store import FILE_NAME, KeyStore
from server.router import ServedRoute
from server.settings import ServerSettings
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.keys.conftest import AddKey, Bearer, eventually, until

CHAT = "/v1/chat/completions"
LOAD = "/v1/engine/models/small/load"


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


class TestEndpoints:
    def test_every_route_is_of_a_family_or_for_every_key(self, app: Application) -> None:
        """A route without a family could be called with every key."""
        routes = [route for route in app.routes if isinstance(route, ServedRoute)]
        without = {
            route.path
            for route in routes
            for method in route.methods
            if not is_open(method, route.path) and families_of(route.path) is None
        }
        assert without == {
            "/v1/models", "/v1/models/", "/v1/models/{name:path}", "/openapi.json",
            "/api/tags", "/api/show", "/api/version", "/mcp",
        }  # fmt: skip
        families = [families_of(route.path) or () for route in routes]
        assert {each for found in families for each in found} == set(FAMILIES)

    def test_what_runs_a_model_counts(self, app: Application) -> None:
        counted = {
            route.path
            for route in app.routes
            if isinstance(route, ServedRoute)
            for method in route.methods
            if is_counted(method, route.path)
        }
        families = ("/v1/engine", "/v1/models", "/v1/audio/voices", "/v1/videos/")
        files = ("/v1/files", "/v1/uploads", "/v1/batches")
        ollama = ("/api/show", "/api/pull", "/api/copy", "/api/create", "/api/push")
        beside = ("/v1/conversations", "/v1/responses/{response_id}/", "/v1/realtime/")
        posts = {
            route.path
            for route in app.routes
            if isinstance(route, ServedRoute) and "POST" in route.methods
        }
        stores = {path for path in posts if path.startswith("/v1/vector_stores")}
        assert stores & counted == {"/v1/vector_stores/{vector_store_id}/search"}
        assert counted - stores == {
            path
            for path in posts - stores
            if not path.startswith((*families, *files, *ollama, *beside, "/mcp"))
        }

    async def test_ollamas_names_are_those_of_the_key(
        self, client: httpx.AsyncClient, add_key: AddKey, runtime: FakeRuntime
    ) -> None:
        key = add_key("alice", endpoints=("chat",), models=("small",))
        await until(client, key, 200)
        tags = (await client.get("/api/tags", headers=key)).json()["models"]
        assert {each["name"] for each in tags} == {"small", "gpt-4o", "org/small"}
        for path, model, status in (
            ("/api/show", "small:latest", 200),
            ("/api/show", "other:latest", 403),
            ("/api/show", "nobody", 403),
            ("/api/chat", "other:latest", 403),
            ("/api/embed", "small", 403),
            ("/api/pull", "small", 403),
        ):
            answer = await client.post(path, json={"model": model}, headers=key)
            assert answer.status_code == status, (path, model, answer.text)
        assert not runtime.requests

    async def test_others_are_forbidden(
        self, client: httpx.AsyncClient, add_key: AddKey, runtime: FakeRuntime
    ) -> None:
        key = add_key("alice", endpoints=("chat", "videos"))
        await until(client, key, 200)
        # Jobs are listed once they have started.
        async with asyncio.timeout(30):
            while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110 - a request
                await asyncio.sleep(0.01)
        for method, path in (
            ("POST", "/v1/embeddings"),
            ("POST", "/v1/images/generations"),
            ("POST", "/v1/audio/speech"),
            ("GET", "/v1/audio/voices"),
            ("POST", "/v1/audio/translations"),
            ("GET", "/v1/engine"),
            ("POST", "/v1/engine/plan"),
            ("GET", "/metrics"),
        ):
            answer = await client.request(method, path, headers=key, json={"model": "small"})
            assert error_of(answer) == (403, "endpoint_forbidden", None), path
            assert path in answer.json()["error"]["message"]
        assert runtime.requests == []
        body = {"model": "small"}
        assert (await client.post(CHAT, headers=key, json=body)).status_code == 200
        assert (await client.post("/v1/tokenize", headers=key, json=body)).status_code == 200
        assert (await client.get("/v1/videos", headers=key)).status_code == 200
        assert (await client.get("/v1/models", headers=key)).status_code == 200
        assert (await client.get("/nowhere", headers=key)).status_code == 404
        assert (await client.get("/health")).status_code == 200

    async def test_anthropics_clients_get_its_envelope(
        self, client: httpx.AsyncClient, add_key: AddKey
    ) -> None:
        key = add_key("alice", endpoints=("speech",))
        await until(client, key, 200)
        secret = key["authorization"].removeprefix("Bearer ")
        answer = await client.post("/v1/messages", headers={"x-api-key": secret})
        assert answer.status_code == 403
        assert answer.json()["error"]["type"] == "permission_error"


class TestModels:
    @pytest.fixture
    async def key(self, client: httpx.AsyncClient, add_key: AddKey) -> Bearer:
        key = add_key("alice", models=("gpt-4o", "auto"), tier="gold")
        await until(client, key, 200)
        return key

    @pytest.mark.parametrize("model", ["other", "big", "nobody", "Small"])
    async def test_others_are_forbidden_whether_or_not_they_exist(
        self, client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, model: str
    ) -> None:
        forms = {"image": ("a.png", b"")}
        for answer in (
            await client.post(CHAT, headers=key, json={"model": model}),
            await client.post("/v1/embeddings", headers=key, json={"model": model}),
            await client.post("/detokenize", headers=key, json={"model": model}),
            await client.post("/v1/images/generations", headers=key, json={"model": model}),
            await client.post("/v1/images/edits", headers=key, data={"model": model}, files=forms),
            await client.post("/v1/videos", headers=key, json={"model": model}),
            await client.post("/v1/audio/speech", headers=key, json={"model": model}),
            await client.post(
                "/v1/audio/transcriptions", headers=key, data={"model": model}, files=forms
            ),
            await client.post("/v1/engine/plan", headers=key, json={"model": model}),
            await client.get("/v1/audio/voices", headers=key, params={"model": model}),
            await client.get(f"/v1/models/{model}", headers=key),
        ):
            assert error_of(answer) == (403, "model_forbidden", "model"), answer.url
            message = answer.json()["error"]["message"]
            assert f"may not use the model '{model}'" in message
        assert runtime.requests == []

    @pytest.mark.parametrize("model", ["small", "gpt-4o", "org/small"])
    async def test_a_model_is_allowed_by_all_its_names(
        self, client: httpx.AsyncClient, key: Bearer, runtime: FakeRuntime, model: str
    ) -> None:
        assert (await client.post(CHAT, headers=key, json={"model": model})).status_code == 200
        assert (await client.get(f"/v1/models/{model}", headers=key)).status_code == 200
        caller = runtime.requests[-1].scheduling.caller
        assert (caller.name, caller.tier) == ("alice", "gold")

    async def test_a_model_that_the_request_leaves_out_is_no_way_around(
        self, tmp_path: Path, runtime: FakeRuntime, settings: ServerSettings
    ) -> None:
        """A moderation may name none. Then the first classifier answers, if the key allows it."""
        judge = {"id": "judge", "source": "none", "runtime": "fake", "task": "classify"}
        engine = fake_engine(runtime, tmp_path, models=[judge])
        bob, carol = new_secret(), new_secret()
        with closing(KeyStore(engine.config.data_dir)) as store:
            store.add(Key(name="bob", digest=digest_of(bob), created_at=1, models=("other",)))
            store.add(Key(name="carol", digest=digest_of(carol), created_at=1, models=("judge",)))
        app = create_app(engine, settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000"
            ) as client,
        ):
            asked = "/v1/moderations", {"input": "x"}
            answer = await client.post(asked[0], json=asked[1], headers={"x-api-key": bob})
            assert error_of(answer) == (403, "model_forbidden", "model")
            assert runtime.requests == []
            answer = await client.post(asked[0], json=asked[1], headers={"x-api-key": carol})
            assert answer.status_code == 200

    async def test_only_those_are_listed(self, client: httpx.AsyncClient, key: Bearer) -> None:
        listed = (await client.get("/v1/models", headers=key)).json()["data"]
        ids = {model["id"] for model in listed}
        assert {"small", "gpt-4o", "org/small"} <= ids <= {"small", "gpt-4o", "org/small", "auto"}

    async def test_a_name_that_is_none_is_the_schemas_matter(
        self, client: httpx.AsyncClient, key: Bearer
    ) -> None:
        for body in ({}, {"model": None}, {"model": 3}, {"model": ["other"]}):
            for path in (CHAT, "/v1/images/generations"):
                answer = await client.post(path, headers=key, json=body)
                assert error_of(answer) == (400, "invalid_request", "model")

    async def test_the_official_client_raises_what_it_should(
        self, url: str, add_key: AddKey
    ) -> None:
        key = add_key("alice", models=("small",))
        async with httpx.AsyncClient(base_url=url) as client:
            await until(client, key, 200)
        secret = key["authorization"].removeprefix("Bearer ")
        sdk = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await sdk.embeddings.create(model="other", input="a")
        assert (caught.value.code, caught.value.param) == ("model_forbidden", "model")


class TestOpen:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings()

    async def test_the_caller_is_nobody(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        assert (await client.post(CHAT, json={"model": "small"})).status_code == 200
        assert runtime.requests[-1].scheduling.caller == Caller()

    async def test_a_server_without_keys_is_closed_by_the_first(
        self, client: httpx.AsyncClient, add_key: AddKey, store: KeyStore
    ) -> None:
        assert (await client.get("/v1/models")).status_code == 200
        key = add_key("alice")
        await until(client, {}, 401)
        assert (await client.get("/v1/models", headers=key)).status_code == 200
        store.change("alice", lambda each: replace(each, revoked_at=1))
        answer = await until(client, key, 401)
        assert answer.json()["error"]["message"] == "This API key was revoked."
        assert (await client.get("/v1/models")).status_code == 401
        store.change("alice", lambda each: replace(each, revoked_at=None, expires_at=1))
        await until(client, key, 401, text="This API key has expired.")


class TestLife:
    async def test_a_change_is_taken_up(
        self, client: httpx.AsyncClient, add_key: AddKey, store: KeyStore
    ) -> None:
        key = add_key("alice", models=("other",))
        await until(client, key, 200)
        store.change("alice", lambda each: replace(each, models=("small",)))
        await until(client, key, 200, text="org/small")

    async def test_the_last_use_is_noted_at_the_end(
        self, app: Application, add_key: AddKey, store: KeyStore
    ) -> None:
        before = int(time.time())
        key, _ = add_key("alice"), add_key("bob")
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client,
        ):
            await until(client, key, 200)
        used = {each.name: each.last_used_at for each in store.all()}
        assert used["bob"] is None
        assert used["alice"] is not None and used["alice"] >= before

    async def test_a_store_that_fails_changes_nothing(
        self,
        client: httpx.AsyncClient,
        add_key: AddKey,
        store: KeyStore,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        key = add_key("alice")
        await until(client, key, 200)
        aside = store.path.with_name("aside.db")
        store.path.rename(aside)
        await eventually(lambda: "keys.db is gone" in caplog.text)
        for each in store.path.parent.glob(f"{FILE_NAME}-*"):
            each.unlink()  # otherwise SQLite would mend the file
        store.path.write_bytes(b"no database" * 1000)
        await eventually(lambda: "cannot be used" in caplog.text)
        assert (await client.get("/v1/models", headers=key)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        store.path.unlink()
        another = KeyStore(store.path.parent)
        another.add(replace(store.all()[0], name="bob", revoked_at=1))
        await until(client, key, 401)
        another.close()
        assert caplog.text.count("keys.db is gone") == 1

    async def test_a_store_that_fails_at_the_start_is_named(self, engine: Engine) -> None:
        engine.config.data_dir.mkdir()
        (engine.config.data_dir / FILE_NAME).write_bytes(b"no database" * 1000)
        with pytest.raises(ConfigError, match=r"keys\.db cannot be used"):
            create_app(engine, ServerSettings())


class TestRoles:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(api_keys=(SecretStr("user-key"), SecretStr("second-key")))

    async def test_an_admin_of_the_store_gives_orders(
        self, client: httpx.AsyncClient, add_key: AddKey
    ) -> None:
        admin, user = add_key("root", admin=True), add_key("alice")
        await until(client, user, 200)
        assert (await client.post(LOAD, headers=admin)).status_code == 200
        assert error_of(await client.post(LOAD, headers=user))[:2] == (403, "admin_key_required")

    async def test_of_two_keys_the_admins_counts(
        self, client: httpx.AsyncClient, add_key: AddKey
    ) -> None:
        admin, user = add_key("root", admin=True), add_key("alice", revoked_at=1)
        await until(client, admin, 200)
        secrets = [each["authorization"].removeprefix("Bearer ") for each in (admin, user)]
        for other in (secrets[1], "user-key", "wrong"):
            for first, second in ((secrets[0], other), (other, secrets[0])):
                headers = {"x-api-key": first, "authorization": f"Bearer {second}"}
                assert (await client.post(LOAD, headers=headers)).status_code == 200

    async def test_keys_of_the_configuration_have_names_and_no_limits(
        self, client: httpx.AsyncClient, runtime: FakeRuntime
    ) -> None:
        for number, secret in ((1, "user-key"), (2, "second-key")):
            headers = {"authorization": f"Bearer {secret}"}
            answer = await client.post(CHAT, headers=headers, json={"model": "small"})
            assert answer.status_code == 200
            assert runtime.requests[-1].scheduling.caller == Caller(f"config-{number}")
            assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


class TestBeyondLoopback:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(host="0.0.0.0")

    async def test_without_any_key_left_nobody_is_let_in(
        self, client: httpx.AsyncClient, add_key: AddKey, store: KeyStore
    ) -> None:
        assert (await client.get("/v1/models")).status_code == 401
        key = add_key("alice")
        await until(client, key, 200)
        store.remove("alice")
        await until(client, key, 401)
        assert (await client.get("/v1/models")).status_code == 401
