"""The one table, the envelopes, and errors of HTTP itself."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import AsyncGenerator, Iterator

import httpx
import pytest

from engine import errors
from engine.engine import Engine
from engine.errors import EngineError, InvalidRequest
from engine.events import Event, Frame
from engine.requests import TextOperation, TextRequest
from server.errors import Failure
from tests.server.fake import FakeRuntime

CHAT = "/v1/chat/completions"

TABLE: list[tuple[EngineError, int, str]] = [
    (errors.EngineError("m"), 500, "server_error"),
    (errors.ConfigError("m"), 500, "server_error"),
    (errors.InvalidRequest("m"), 400, "invalid_request_error"),
    (errors.ModelNotFound("m"), 404, "invalid_request_error"),
    (errors.ModelForbidden("m"), 403, "invalid_request_error"),
    (errors.NotFound("m"), 404, "invalid_request_error"),
    (errors.Conflict("m"), 409, "invalid_request_error"),
    (errors.NotLoaded("m", tier="disk", load_s=1.0), 409, "invalid_request_error"),
    (errors.Overloaded("m", retry_after_s=1), 503, "server_error"),
    (errors.QueueFull("m", retry_after_s=1), 429, "rate_limit_error"),
    (errors.QueueTimeout("m", retry_after_s=1), 503, "server_error"),
    (errors.ProviderBusy("m", retry_after_s=1), 503, "server_error"),
    (errors.BudgetExceeded("m", retry_after_s=1), 429, "rate_limit_error"),
    (errors.BudgetReserved("m", retry_after_s=1), 429, "rate_limit_error"),
    (errors.ShuttingDown("m", retry_after_s=1), 503, "server_error"),
    (errors.InsufficientCapacity("m"), 507, "server_error"),
    (errors.NoSpaceLeft("m"), 507, "server_error"),
    (errors.LoadFailed("m"), 500, "server_error"),
    (errors.OutOfDeviceMemory("m"), 503, "server_error"),
    (errors.RuntimeFailed("m"), 500, "server_error"),
    (errors.ProviderFailed("m"), 502, "server_error"),
]


def every_error_type(root: type[EngineError] = EngineError) -> Iterator[type[EngineError]]:
    yield root
    for kind in root.__subclasses__():
        yield from every_error_type(kind)


@pytest.mark.parametrize(("error", "status", "kind"), TABLE)
def test_table(error: EngineError, status: int, kind: str) -> None:
    failure = Failure.of(error)
    assert (failure.status, failure.type, failure.code) == (status, kind, error.code)


def test_table_covers_the_tree() -> None:
    tree = {kind for kind in every_error_type() if kind.__module__ == errors.__name__}
    assert {type(error) for error, _, _ in TABLE} == tree


def test_a_new_error_answers_like_its_base() -> None:
    class VeryFull(errors.QueueFull):
        code = "very_full"

    failure = Failure.of(VeryFull("m", retry_after_s=1))
    assert (failure.status, failure.code) == (429, "very_full")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(number: int) -> None:
    failure = Failure.of(OSError(number, "No space", "/secret/path"))
    assert failure.status == 507
    assert failure.message == "The server has no space left for the result."
    assert Failure.of(OSError(errno.EIO, "Input/output error")).code == "internal_error"


@pytest.mark.parametrize(("status", "told"), [(404, 404), (422, 422), (500, 400), (200, 400)])
def test_the_library_chooses_only_among_4xx(status: int, told: int) -> None:
    assert Failure.of(InvalidRequest("m", status=status)).status == told


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.0, "1"), (1.0, "1"), (1.2, "2")])
def test_retry_after_is_whole_seconds(retry_after_s: float, header: str) -> None:
    failure = Failure.of(errors.QueueFull("m", retry_after_s=retry_after_s))
    assert failure.headers["retry-after"] == header


def test_only_what_may_pass_is_retried() -> None:
    useless = {error.code for error, _, _ in TABLE if "x-should-retry" in Failure.of(error).headers}
    assert useless == {
        "budget_exceeded",
        "conflict",
        "model_not_loaded",
        "insufficient_capacity",
        "no_space_left",
        "model_load_failed",
        "config_error",
    }


def test_openai_envelope() -> None:
    document = Failure.of(InvalidRequest("too long", param="messages")).openai_document()
    assert document == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "invalid_request",
        }
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (507, "api_error"),
    ],
)
def test_anthropic_envelope(status: int, kind: str) -> None:
    document = Failure(status, "m").anthropic_document("req-1")
    assert document == {
        "type": "error",
        "error": {"type": kind, "message": "m"},
        "request_id": "req-1",
    }


def test_details_are_in_the_error_where_there_are_any() -> None:
    failure = Failure.of(InvalidRequest("m", details={"error_code": "c"}))
    assert failure.anthropic_document("req-1")["error"]["details"] == {"error_code": "c"}
    assert "details" not in Failure.of(InvalidRequest("m")).anthropic_document("req-1")["error"]


def test_frame_is_one_event_whatever_the_message() -> None:
    failure = Failure(500, "line\n\ndata: [DONE]\r\n")
    for operation in TextOperation:
        frame = failure.frame(operation, "req-1")
        assert frame.endswith("\n\n")
        assert frame.count("\n\n") == 1
        data = frame.split("data: ", 1)[1]
        assert json.loads(data)["error"]["message"] == failure.message


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("GET", "/openapi.yaml", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", f"{CHAT}/", 404, "not_found"),
    ],
)
async def test_errors_of_http_wear_the_envelope(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "allow", "told"),
    [
        ("GET", CHAT, "POST", f"{CHAT} takes POST, not GET."),
        ("PUT", "/v1/videos", "GET, POST", "/v1/videos takes GET, POST, not PUT."),
        ("PATCH", "/v1/videos/x", "DELETE, GET", "/v1/videos/x takes DELETE, GET, not PATCH."),
        ("GET", "/nowhere", None, "Nothing is served at GET /nowhere. GET /openapi.json lists"),
        (
            "POST",
            "/chat/completions",
            None,
            "at POST /chat/completions. Did you mean /v1/chat/comp",
        ),
        ("POST", f"/v1{CHAT}", None, f"Did you mean {CHAT}?"),
        ("POST", f"{CHAT}/", None, f"Did you mean {CHAT}?"),
        ("GET", "/v1/evals", None, "Nothing is served at GET /v1/evals."),
        ("GET", f"/{'x' * 5000}", None, "xxx…. GET"),
    ],
)
async def test_what_was_asked_is_told(
    client: httpx.AsyncClient, method: str, path: str, allow: str | None, told: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == (404 if allow is None else 405)
    assert answer.headers.get("allow") == allow
    message = answer.json()["error"]["message"]
    assert told in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("[Errno 13] Permission denied: '/srv/models/m/a.safetensors'", "denied: 'a.safetensors'"),
        ("cannot build starter:x in /home/me/.cache/roundhouse: full", "in roundhouse: full"),
        ("POST /v1/videos needs owner/name and https://hub.example/a/b", "https://hub.example/a/b"),
        ("a/b of /tmp", "a/b of /tmp"),
    ],
)
def test_folders_of_the_machine_are_not_told(message: str, told: str) -> None:
    for kind in (errors.LoadFailed, errors.RuntimeFailed, errors.ConfigError):
        answer = Failure.of(kind(message)).message
        assert told in answer
        assert "/srv" not in answer and "/home" not in answer


async def test_errors_of_the_engine(client: httpx.AsyncClient) -> None:
    for model, status, code in (
        ("smal", 404, "model_not_found"),
        ("big", 507, "insufficient_capacity"),
        ("broken", 500, "model_load_failed"),
    ):
        answer = await client.post(CHAT, json={"model": model})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        anthropic = await client.post("/v1/messages", json={"model": model})
        assert anthropic.json()["type"] == "error"
        assert anthropic.json()["request_id"] == anthropic.headers["x-request-id"]


async def test_draining_engine_names_a_time_to_return(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    await client.post(CHAT, json={"model": "small"})
    await engine.drain(1)
    answer = await client.post(CHAT, json={"model": "small"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_bug_is_logged_and_not_told(
    client: httpx.AsyncClient, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    async def bug(request: TextRequest) -> AsyncGenerator[Event, None]:
        if request.body:
            raise KeyError("a secret")
        yield Frame("")

    runtime.answer = bug
    with caplog.at_level(logging.ERROR):
        answer = await client.post(
            CHAT, json={"model": "small"}, headers={"x-request-id": "mine.1"}
        )
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine.1"
    assert answer.json()["error"] == {
        "message": "Internal server error.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    (record,) = [each for each in caplog.records if each.name == "server.request_context"]
    assert "mine.1" in record.getMessage()
    assert record.exc_info is not None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/images/generations"])
async def test_a_long_name_is_not_echoed_whole(client: httpx.AsyncClient, path: str) -> None:
    body = {"model": "x" * 100_000, "prompt": "a"}
    answer = await client.post(path, json=body)
    assert answer.status_code == 404
    assert "'xxx" in answer.text and len(answer.content) < 1000


async def test_a_long_path_is_not_echoed_whole(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/v1/nowhere/{'x' * 50_000}")
    assert answer.status_code == 404 and len(answer.content) < 5000
