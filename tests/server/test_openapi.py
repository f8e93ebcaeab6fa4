"""`/openapi.json` and `/docs`: every route is described, and answers are as described."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from PIL import Image
from pydantic import SecretStr

from engine.config import ModelConfig
from engine.engine import Engine
from engine.events import (
    Document,
    Event,
    Frame,
    Heard,
    ImageResult,
    Segment,
    Speech,
    VideoResult,
)
from engine.requests import ImageRequest, Request, SpeechRequest, TextRequest, VideoRequest
from engine.runtimes.base import Prepared, Voice
from server.app import create_app
from server.openapi.document import openapi_document
from server.router import ServedRoute
from server.settings import ServerSettings
from server.start import Start
from tests.server.fake import FakeRuntime, fake_engine
from tests.server.test_connection import TIMEOUT_S
from tests.server.test_images import data_url

KEYS = ServerSettings(api_keys=(SecretStr("user-key"),), admin_keys=(SecretStr("admin-key"),))
ADMIN = {"authorization": "Bearer admin-key"}
PICTURE = data_url(Image.new("RGB", (8, 8), "red"))


async def answer(request: Request) -> AsyncGenerator[Event, None]:
    """The shortest answer of each kind."""
    match request:
        case TextRequest():
            if request.body.get("stream"):
                yield Frame("data: [DONE]\n\n")
            else:
                yield Document(b"{}")
        case ImageRequest():
            yield ImageResult(tuple(Image.new("RGB", (8, 8)) for _ in range(request.n)), 1)
        case VideoRequest():
            yield VideoResult(np.zeros((2, 64, 64, 3), np.uint8), 8, 1)
        case SpeechRequest():
            yield Speech(np.zeros(2400, np.float32), 24_000, ())
        case _:
            yield Heard("en", 1.5)
            yield Segment(0, 0.0, 1.5, " Hello.", 0, (1, 2), 0.0, -0.1, 1.0, 0.2)


class AnyRuntime(FakeRuntime):
    """Answers every kind of request, and has a voice."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = answer

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        if isinstance(request, VideoRequest):
            request = replace(request, fps=8, num_frames=2, width=64, height=64)
        return Prepared(request, None)

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        return (Voice("alloy", "Alloy", "en"),)


@pytest.fixture
def runtime() -> FakeRuntime:
    return AnyRuntime()


def engine_of(runtime: FakeRuntime, folder: Path) -> Engine:
    models: list[dict[str, object]] = [
        {"id": "text", "aliases": ["gpt-4o"], "source": "none", "keep_alive": "forever"},
    ]
    for task in ("embed", "image", "video", "speech", "transcribe"):
        models.append({"id": f"any-{task}", "source": "none", "task": task})
    return fake_engine(runtime, folder, models=[{"runtime": "fake", **model} for model in models])


@pytest.fixture
def engine(runtime: FakeRuntime, tmp_path: Path) -> Engine:
    return engine_of(runtime, tmp_path)


@pytest.fixture
def start(engine: Engine) -> Start:
    return Start(engine)


@pytest.fixture
def app(engine: Engine, settings: ServerSettings, start: Start) -> FastAPI:
    return create_app(engine, settings, start)


@pytest.fixture
async def client(url: str, start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the application over real sockets, once its jobs have started."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        await start.done.wait()
        yield client


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Made once, as it takes a third of a second."""
    engine = engine_of(AnyRuntime(), tmp_path_factory.mktemp("document"))
    settings = ServerSettings()
    app = create_app(engine, settings, Start(engine))
    return openapi_document(app.routes, engine.config, settings)


def resolved(document: dict[str, Any], item: Any) -> Any:
    """What a reference stands for."""
    while "$ref" in item:
        found: Any = document
        for part in item["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        item = found
    return item


def validator(document: dict[str, Any], schema: Any) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def served(app: FastAPI) -> set[tuple[str, str]]:
    return {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, ServedRoute) and route.include_in_schema
        for method in route.methods
    }


def described(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(path, method) for path, methods in document["paths"].items() for method in methods}


def nodes(item: Any) -> list[dict[str, Any]]:
    """Every object within a document."""
    if isinstance(item, list):
        return [found for each in item for found in nodes(each)]
    if isinstance(item, dict):
        return [item, *(found for each in item.values() for found in nodes(each))]
    return []


class TestDocument:
    def test_every_route_is_described(self, app: FastAPI, document: dict[str, Any]) -> None:
        assert described(document) == served(app)

    def test_its_schemas_are_schemas_and_its_references_lead_somewhere(
        self, document: dict[str, Any]
    ) -> None:
        for schema in document["components"]["schemas"].values():
            Draft202012Validator.check_schema(schema)
        for node in nodes(document):
            if "$ref" in node:
                resolved(document, node)
            if "schema" in node:
                Draft202012Validator.check_schema(node["schema"])
            assert "x-file" not in node

    def test_every_operation_has_a_name_of_its_own(self, document: dict[str, Any]) -> None:
        names = [each["operationId"] for m in document["paths"].values() for each in m.values()]
        assert len(set(names)) == len(names)

    def test_parameters_of_the_path_are_described(self, document: dict[str, Any]) -> None:
        for path, methods in document["paths"].items():
            for operation in methods.values():
                parameters = [resolved(document, each) for each in operation["parameters"]]
                inside = [each["name"] for each in parameters if each["in"] == "path"]
                assert inside == re.findall(r"{(\w+)}", path)

    def test_examples_fit_their_schemas(self, document: dict[str, Any]) -> None:
        count = 0
        for node in nodes(document["paths"]):
            if "example" in node and "schema" in node:
                validator(document, node["schema"]).validate(node["example"])
                count += 1
        assert count > 10

    def test_defaults_fit_their_schemas(self, document: dict[str, Any]) -> None:
        count = 0
        for node in nodes(document["components"]["schemas"]):
            for field in node.get("properties", {}).values():
                if "default" in field:
                    validator(document, field).validate(field["default"])
                    count += 1
        assert count > 20

    def test_examples_name_a_configured_model(self, document: dict[str, Any]) -> None:
        def model(path: str) -> str:
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            return str(body["example"]["model"])

        assert model("/v1/chat/completions") == "text"
        assert model("/v1/images/generations") == "any-image"
        assert model("/v1/audio/speech") == "any-speech"

    def test_fields_of_a_body_come_with_their_docstrings(self, document: dict[str, Any]) -> None:
        fields = document["components"]["schemas"]["GenerationRequest"]["properties"]
        assert "DALL·E" in fields["style"]["description"]
        assert fields["no_evict"]["description"]

    def test_a_file_is_bytes_in_a_form_and_text_in_json(self, document: dict[str, Any]) -> None:
        schemas = document["components"]["schemas"]
        in_form, in_json = (
            validator(document, schemas[name]["properties"]["image"])
            for name in ("GenerationForm", "GenerationRequest")
        )
        assert in_json.is_valid({"image_url": "data:"}) and not in_form.is_valid({"image_url": ""})
        assert "contentMediaType" in str(schemas["TranscriptionForm"]["properties"]["file"])


class TestSecurity:
    def test_without_keys_none_is_needed(self, document: dict[str, Any]) -> None:
        assert {} in document["security"]

    async def test_with_keys_it_says_what_the_server_does(self, engine: Engine) -> None:
        app = create_app(engine, KEYS)
        document = openapi_document(app.routes, engine.config, KEYS)
        assert document["security"] == [{"bearer": []}, {"apiKey": []}]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
            for path, method in sorted(described(document)):
                operation = document["paths"][path][method]
                url = re.sub(r"{\w+}", "any", path)
                refused = (await client.request(method, url)).status_code == 401
                assert refused is ("security" not in operation), (method, path)
                key = {"x-api-key": "user-key"}
                needs_admin = "admin key" in operation.get("description", "")
                if needs_admin:
                    assert (await client.request(method, url, headers=key)).status_code == 403

    async def test_the_document_needs_the_key_that_models_need(self, engine: Engine) -> None:
        transport = httpx.ASGITransport(create_app(engine, KEYS))
        async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
            for path in ("/openapi.json", "/v1/models"):
                assert (await client.get(path)).status_code == 401
                assert (await client.get(path, headers=ADMIN)).status_code == 200
            for path in ("/docs", "/docs/docs.js", "/docs/swagger-ui-bundle.js"):
                assert (await client.get(path)).status_code == 200
                assert (await client.post(path)).status_code == 401


def wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        rng = np.random.default_rng(0)
        writer.writeframes(rng.integers(-3000, 3000, 16_000 * 4, np.int16).tobytes())
    return file.getvalue()


class TestAnswers:
    """Each answer has the status, the type and the form that the document says."""

    @pytest.fixture
    def check(self, document: dict[str, Any]) -> Callable[[httpx.Response, str], Any]:
        def check(response: httpx.Response, path: str) -> Any:
            operation = document["paths"][path][response.request.method.lower()]
            answers = operation["responses"]
            described = answers.get(str(response.status_code))
            if described is None:
                assert response.status_code >= 400, response.text
                described = answers["default"]
            content = resolved(document, described).get("content", {})
            media_type = response.headers.get("content-type", "").partition(";")[0]
            if not response.content:
                return None
            assert media_type in content, (path, media_type)
            if media_type != "application/json":
                return response.content
            body = response.json()
            validator(document, content[media_type]["schema"]).validate(body)
            return body

        return check

    async def test_models_and_the_engine(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        check(await client.get("/v1/engine"), "/v1/engine")
        check(await client.post("/v1/chat/completions", json={"model": "text"}),
              "/v1/chat/completions")  # fmt: skip
        models = check(await client.get("/v1/models"), "/v1/models")
        assert [each["id"] for each in models["data"]][:2] == ["text", "gpt-4o"]
        assert models["data"][0]["keep_alive_s"] is None
        check(await client.get("/v1/models/gpt-4o"), "/v1/models/{name}")
        check(await client.get("/v1/models/none"), "/v1/models/{name}")
        check(await client.get("/v1/engine"), "/v1/engine")
        check(await client.post("/v1/engine/plan", json={"model": "text"}), "/v1/engine/plan")
        session = {"model": "text", "further_models": ["any-image"]}
        planned = check(await client.post("/v1/engine/plan", json=session), "/v1/engine/plan")
        assert planned["further_models"] == ["any-image"]
        check(await client.post("/v1/engine/plan", json={}), "/v1/engine/plan")
        for action in ("load", "pin", "unpin", "park", "unload", "load"):
            path = f"/v1/engine/models/{{name}}/{action}"
            check(await client.post(path.replace("{name}", "any-image")), path)
        events = check(await client.get("/v1/engine/events"), "/v1/engine/events")
        assert events["data"]
        check(await client.get("/v1/engine/events?after=0&limit=1"), "/v1/engine/events")
        check(await client.get("/v1/engine/files"), "/v1/engine/files")

    async def test_probes_and_pages(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        for path in ("/health", "/ready", "/ping", "/metrics", "/", "/openapi.json", "/docs"):
            check(await client.get(path), path)
            if path not in ("/metrics", "/openapi.json"):
                check(await client.head(path), path)
        for name in (
            *("docs.js", "docs.css", "swagger-ui-bundle.js", "swagger-ui.css"),
            *("swagger-ui.LICENSE.txt", "swagger-ui-bundle.js.LICENSE.txt"),
        ):
            assert check(await client.get(f"/docs/{name}"), "/docs/{name}")
        check(await client.get("/docs/core.py"), "/docs/{name}")
        openmetrics = {"accept": "application/openmetrics-text"}
        check(await client.get("/metrics", headers=openmetrics), "/metrics")

    async def test_text(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        for path in ("/v1/responses", "/v1/messages", "/tokenize", "/v1/embeddings"):
            check(await client.post(path, json={"model": "text"}), path)
            check(await client.post(path, json={}), path)
        stream = {"model": "text", "stream": True}
        assert check(await client.post("/v1/messages", json=stream), "/v1/messages")

    async def test_ollama(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        for path in ("/api/tags", "/api/version", "/api/ps"):
            check(await client.get(path), path)
        bodies: dict[str, dict[str, Any]] = {
            "/api/chat": {"messages": [{"role": "user", "content": "a"}]},
            "/api/generate": {"prompt": "a"},
            "/api/show": {},
            "/api/pull": {},
        }
        for path, body in bodies.items():
            check(await client.post(path, json={"model": "text", **body}), path)
            check(await client.post(path, json={"model": "text", **body, "stream": False}), path)
            check(await client.post(path, json={}), path)
        for path in ("/api/embed", "/api/embeddings"):
            check(await client.post(path, json={"model": "text", "input": ""}), path)
            check(await client.post(path, json={"model": "text"}), path)
        check(await client.get("/api/ps"), "/api/ps")
        check(await client.post("/api/push", json={}), "/api/push")
        delete = await client.request("DELETE", "/api/delete", json={"model": "text"})
        check(delete, "/api/delete")

    async def test_images(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        path = "/v1/images/generations"
        body = {"model": "any-image", "prompt": "a", "n": 2, "quality": "low"}
        assert len(check(await client.post(path, json=body), path)["data"]) == 2
        found = check(await client.post(path, json={**body, "response_format": "url"}), path)
        file = await client.get(found["data"][0]["url"])
        assert check(file, "/v1/images/files/{name}")
        assert check(await client.post(path, json={**body, "stream": True}), path)
        check(await client.post(path, json={**body, "n": 0}), path)
        path = "/v1/images/edits"
        picture = {"image": PICTURE}
        check(await client.post(path, json={**body, **picture}), path)

    async def test_videos(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        body = {"model": "any-video", "prompt": "a"}
        job = check(await client.post("/v1/videos", json=body), "/v1/videos")
        url = f"/v1/videos/{job['id']}"
        while job["status"] in ("queued", "in_progress"):
            job = check(await client.get(url), "/v1/videos/{video_id}")
        assert job["status"] == "completed", job
        content = "/v1/videos/{video_id}/content"
        assert check(await client.get(f"{url}/content"), content)
        assert check(await client.get(f"{url}/content?variant=thumbnail"), content)
        check(await client.get(f"{url}/content?variant=spritesheet"), content)
        check(await client.get("/v1/videos?limit=1"), "/v1/videos")
        check(await client.post(f"{url}/cancel"), "/v1/videos/{video_id}/cancel")
        check(await client.delete(url), "/v1/videos/{video_id}")
        check(await client.get(url), "/v1/videos/{video_id}")

    async def test_audio(
        self, client: httpx.AsyncClient, check: Callable[[httpx.Response, str], Any]
    ) -> None:
        path = "/v1/audio/speech"
        body = {"model": "any-speech", "input": "Hello"}
        for audio_format in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
            formatted = {**body, "response_format": audio_format}
            assert check(await client.post(path, json=formatted), path)
        assert check(await client.post(path, json={**body, "stream_format": "sse"}), path)
        file = {"file": ("a.wav", wav())}
        for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
            for text_format in ("json", "verbose_json", "text", "srt", "vtt"):
                data = {"model": "any-transcribe", "response_format": text_format}
                assert check(await client.post(path, data=data, files=file), path)
        voices = "/v1/audio/voices"
        sample = {"audio_sample": ("a.wav", wav())}
        voice = check(await client.post(voices, data={"name": "me"}, files=sample), voices)
        assert len(check(await client.get(voices), voices)["data"]) == 2
        path = f"{voices}/{{voice_id}}"
        check(await client.delete(path.replace("{voice_id}", voice["id"])), path)


BODIES: list[tuple[str, dict[str, Any], bool]] = [
    ("/v1/chat/completions", {"model": "text", "anything": [1], "priority": "batch"}, True),
    ("/v1/chat/completions", {"model": ""}, False),
    ("/api/chat", {"model": "text", "messages": [], "options": {"num_ctx": 1}}, True),
    ("/api/chat", {"model": "text", "keep_alive": "5m", "format": {"type": "object"}}, True),
    ("/api/chat", {"model": "text", "messages": [{"role": "nobody"}]}, False),
    ("/api/generate", {"model": "text", "options": {"speed": 1}}, False),
    ("/api/embed", {"model": "text", "input": [""]}, True),
    ("/api/embed", {"model": "text", "input": 1}, False),
    ("/v1/chat/completions", {"model": "text", "priority": "soon"}, False),
    ("/v1/images/generations", {"model": "any-image", "prompt": "a", "size": "64x64"}, True),
    ("/v1/images/generations", {"model": "any-image", "prompt": "a", "size": None}, True),
    ("/v1/images/generations", {"model": "any-image", "prompt": "a", "size": "64"}, False),
    ("/v1/images/generations", {"model": "any-image", "prompt": "a", "sizes": "64x64"}, False),
    ("/v1/images/generations", {"model": "any-image", "prompt": None}, False),
    ("/v1/images/generations", {"model": "any-image", "prompt": "a", "n": 11}, False),
    ("/v1/images/generations", {"model": "any-image", "prompt": "a", "timeout": "90s"}, True),
    ("/v1/images/edits", {"model": "any-image", "prompt": "a", "image": PICTURE}, True),
    ("/v1/images/edits", {"model": "any-image", "prompt": "a", "image": [PICTURE]}, True),
    ("/v1/images/edits", {"model": "any-image", "prompt": "a", "image": []}, False),
    ("/v1/images/variations", {"model": "any-image"}, False),
    ("/v1/videos", {"model": "any-video", "prompt": "a", "seconds": "4", "motion": "slow"}, True),
    ("/v1/videos", {"model": "any-video", "prompt": "a", "seconds": 0}, False),
    ("/v1/videos", {"model": "any-video", "prompt": "a", "motion": 256}, False),
    ("/v1/audio/speech", {"model": "any-speech", "input": "a", "voice": {"id": "alloy"}}, True),
    ("/v1/audio/speech", {"model": "any-speech", "input": "a", "speed": 5}, False),
    ("/v1/engine/plan", {"model": "text", "working_bytes": "1GiB", "priority": "normal"}, True),
    ("/v1/engine/plan", {"model": "text", "working_bytes": "much"}, False),
]


@pytest.mark.parametrize(("path", "body", "accepted"), BODIES)
async def test_a_body_is_accepted_as_its_schema_says(
    path: str,
    body: dict[str, Any],
    accepted: bool,
    client: httpx.AsyncClient,
    document: dict[str, Any],
) -> None:
    operation = document["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert validator(document, schema).is_valid(body) is accepted
    response = await client.post(path, json=body)
    assert (response.status_code < 400) is accepted, response.text


class TestPage:
    async def test_it_has_the_headers_of_the_dashboard(self, client: httpx.AsyncClient) -> None:
        dashboard = (await client.get("/")).headers
        for path in ("/docs", "/docs/docs.js", "/docs/swagger-ui.css"):
            response = await client.get(path)
            for name in (
                "content-security-policy",
                "x-content-type-options",
                "referrer-policy",
                "permissions-policy",
                "cross-origin-opener-policy",
                "cross-origin-resource-policy",
                "cache-control",
            ):
                assert response.headers[name] == dashboard[name]
            again = await client.get(path, headers={"if-none-match": response.headers["etag"]})
            assert again.status_code == 304

    async def test_it_loads_nothing_from_elsewhere(self, client: httpx.AsyncClient) -> None:
        page = (await client.get("/docs")).text
        addresses = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
        assert len(addresses) == 7
        for address in addresses:
            assert (await client.get(address)).status_code == 200

    async def test_its_licences_are_beside_it(self, client: httpx.AsyncClient) -> None:
        bundle = (await client.get("/docs/swagger-ui-bundle.js")).text
        named = re.match(r"/\*! For license information please see (\S+) \*/", bundle)
        version = re.search(r"PACKAGE_VERSION:\"([\d.]+)\"", bundle)
        assert named is not None and version is not None
        parts = await client.get(f"/docs/{named[1]}")
        assert parts.status_code == 200
        assert parts.headers["content-type"] == "text/plain; charset=utf-8"
        # Another version may hold other parts: take both files from its package again.
        licence = (await client.get("/docs/swagger-ui.LICENSE.txt")).text
        assert licence.startswith(f"Swagger UI {version[1]},")
        assert (Path(__file__).parents[2] / "LICENSE").read_text() in licence

    async def test_a_screen_reader_is_told_language_and_title(
        self, client: httpx.AsyncClient
    ) -> None:
        page = (await client.get("/docs")).text
        assert '<html lang="en">' in page
        assert "<title>Roundhouse: API</title>" in page

    @pytest.mark.parametrize("name", ["index.html", "../app.py", "redoc.standalone.js", ""])
    async def test_nothing_else_is_served(self, client: httpx.AsyncClient, name: str) -> None:
        assert (await client.get(f"/docs/{name}")).status_code == 404
