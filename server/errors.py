"""The errors that clients see: one table of statuses, and four envelopes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from engine.errors import (
    BudgetExceeded,
    BudgetReserved,
    ConfigError,
    Conflict,
    EngineError,
    InsufficientCapacity,
    InvalidRequest,
    LoadFailed,
    ModelForbidden,
    ModelNotFound,
    NoSpaceLeft,
    NotFound,
    NotLoaded,
    OutOfDeviceMemory,
    Overloaded,
    ProviderBusy,
    ProviderFailed,
    QueueFull,
    QueueTimeout,
    RuntimeFailed,
    ShuttingDown,
)
from engine.requests import Operation, TextOperation
from engine.words import MOST_ECHOED, shortened, without_folders

ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PREFIX = "/api/"
MCP_PATH = "/mcp"
_MCP_ERROR = -32000
"""The first of the codes that JSON-RPC leaves to servers."""


def is_anthropic(path: str) -> bool:
    """Whether clients of `path` read Anthropic's envelope."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def is_ollama(path: str) -> bool:
    """Whether clients of `path` read Ollama's envelope."""
    return path.startswith(OLLAMA_PREFIX)


def is_mcp(path: str) -> bool:
    """Whether clients of `path` read errors of JSON-RPC."""
    return path == MCP_PATH


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    type: str
    retry: bool = True
    """False stops the official clients, which otherwise retry every 409 and 5xx."""


_ANSWERS: Mapping[type[EngineError], _Answer] = {
    EngineError: _Answer(500, "server_error"),
    ConfigError: _Answer(500, "server_error", retry=False),
    InvalidRequest: _Answer(400, "invalid_request_error"),
    ModelNotFound: _Answer(404, "invalid_request_error"),
    ModelForbidden: _Answer(403, "invalid_request_error"),
    NotFound: _Answer(404, "invalid_request_error"),
    Conflict: _Answer(409, "invalid_request_error", retry=False),
    NotLoaded: _Answer(409, "invalid_request_error", retry=False),
    Overloaded: _Answer(503, "server_error"),
    QueueFull: _Answer(429, "rate_limit_error"),
    QueueTimeout: _Answer(503, "server_error"),
    ProviderBusy: _Answer(503, "server_error"),
    BudgetExceeded: _Answer(429, "rate_limit_error", retry=False),
    BudgetReserved: _Answer(429, "rate_limit_error"),
    ShuttingDown: _Answer(503, "server_error"),
    InsufficientCapacity: _Answer(507, "server_error", retry=False),
    NoSpaceLeft: _Answer(507, "server_error", retry=False),
    LoadFailed: _Answer(500, "server_error", retry=False),
    OutOfDeviceMemory: _Answer(503, "server_error"),
    RuntimeFailed: _Answer(500, "server_error"),
    ProviderFailed: _Answer(502, "server_error"),
}

_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """An error in the form for clients."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    residency: Mapping[str, Any] | None = None
    """For a model that is not loaded: the cost of a load."""
    details: Mapping[str, Any] | None = None
    """For a client that can go on without what was refused."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure for `error`. It reveals nothing of an error that is not the engine's own."""
        error = NoSpaceLeft.of(error, "the result") or error
        if not isinstance(error, EngineError):
            return cls(500, "Internal server error.", "server_error", "internal_error")
        answer = next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)
        status = answer.status
        details = None
        if isinstance(error, InvalidRequest):
            details = error.details
            if 400 <= error.status < 500:
                status = error.status
        headers = {} if answer.retry else {"x-should-retry": "false"}
        if isinstance(error, Overloaded):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        residency = None
        if isinstance(error, NotLoaded):
            residency = {
                "tier": error.tier,
                "load_seconds": error.load_s,
                "evicts": list(error.evicts),
            }
        message = error.message if status < 500 else without_folders(error.message)
        message, param = shortened(message), error.param
        if param is not None:
            param = shortened(param, MOST_ECHOED)
        return cls(status, message, answer.type, error.code, param, headers, residency, details)

    @classmethod
    def of_status(cls, status: int, message: str | None, headers: Mapping[str, str]) -> Failure:
        """The failure for an error of HTTP itself, such as an unknown route or a wrong method."""
        phrase = HTTPStatus(status).phrase
        kind = "invalid_request_error" if status < 500 else "server_error"
        code = phrase.lower().replace(" ", "_")
        return cls(status, shortened(message or phrase), kind, code, None, headers)

    def openai_document(self) -> dict[str, Any]:
        """OpenAI's envelope."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self._more(),
            }
        }

    def anthropic_document(self, request_id: str) -> dict[str, Any]:
        """Anthropic's envelope."""
        default = "invalid_request_error" if self.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(self.status, default)
        return {
            "type": "error",
            "error": {"type": kind, "message": self.message, **self._more()},
            "request_id": request_id,
        }

    def ollama_document(self) -> dict[str, Any]:
        """Ollama's envelope. It has the message alone, so that names the field as well."""
        named = self.param is None or self.param in self.message
        return {"error": self.message if named else f"{self.param}: {self.message}"}

    def mcp_document(self) -> dict[str, Any]:
        """An error of JSON-RPC, for a request whose id was not read."""
        data = {"type": self.type, "code": self.code, **self._more()}
        return {
            "jsonrpc": "2.0",
            "id": None,
            "error": {"code": _MCP_ERROR, "message": self.message, "data": data},
        }

    def _more(self) -> dict[str, Any]:
        more = {"residency": self.residency, "details": self.details}
        return {name: value for name, value in more.items() if value is not None}

    def response(self, path: str, request_id: str) -> JSONResponse:
        """The whole response, in the envelope for clients of `path`."""
        if is_anthropic(path):
            document = self.anthropic_document(request_id)
        elif is_ollama(path):
            document = self.ollama_document()
        elif is_mcp(path):
            document = self.mcp_document()
        else:
            document = self.openai_document()
        return JSONResponse(document, self.status, dict(self.headers))

    def frame(self, operation: Operation, request_id: str) -> str:
        """The last server-sent event of a stream that failed after it began."""
        if operation is TextOperation.MESSAGES:
            return f"event: error\ndata: {json.dumps(self.anthropic_document(request_id))}\n\n"
        document = self.openai_document()
        if operation is TextOperation.RESPONSES:
            # The Responses event has the fields at its top level. The official client raises on a
            # nested `error`. So the event has both.
            event = {"type": "error", **document["error"], **document, "sequence_number": -1}
            event["type"] = "error"
            return f"event: error\ndata: {json.dumps(event)}\n\n"
        data = f"data: {json.dumps(document)}\n\n"
        return data if isinstance(operation, TextOperation) else f"event: error\n{data}"
