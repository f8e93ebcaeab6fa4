"""The lines of the output file and of the error file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json, to_json

from server.batches.line_call import LineAnswer
from server.batches.record import Batch, Line, Outcome, Tokens


def request_id_of(batch: Batch, line: Line) -> str:
    """The id of a line's request; always the same."""
    digest = hashlib.sha256(f"{batch.id}/{line.number}".encode()).hexdigest()
    return f"batch_req_{digest[:32]}"


def outcome_of(batch: Batch, line: Line, answer: LineAnswer) -> Outcome:
    """The outcome of a line that was answered."""
    request_id = request_id_of(batch, line)
    body = _body(answer)
    document = {
        "id": request_id,
        "custom_id": line.custom_id,
        "response": {"status_code": answer.status, "request_id": request_id, "body": body},
        "error": None,
    }
    return Outcome(answer.ok, to_json(document) + b"\n", _tokens(body))


def unanswered(batch: Batch, line: Line, code: str, message: str) -> Outcome:
    """The outcome of a line that was given up."""
    document = {
        "id": request_id_of(batch, line),
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return Outcome(False, to_json(document) + b"\n")


def error_of(answer: LineAnswer) -> Mapping[str, Any]:
    """The fields of an answer's error; none if it has none."""
    try:
        found = from_json(answer.body)["error"]
    except (ValueError, TypeError, KeyError):
        return {}
    return found if isinstance(found, dict) else {}


def _body(answer: LineAnswer) -> Any:
    """The body as JSON: a document, a text, or bytes as base64 with their type."""
    content_type = answer.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        return from_json(answer.body)
    if media_type.startswith("text/"):
        return answer.body.decode(errors="replace")
    return {"content_type": media_type, "b64": base64.b64encode(answer.body).decode()}


def _tokens(body: Any) -> Tokens:
    """The tokens of an answer, in OpenAI's or Anthropic's names."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return Tokens()

    def number(found: Mapping[str, Any], *names: str) -> int:
        values = (found.get(name) for name in names)
        return next((value for value in values if isinstance(value, int)), 0)

    def details(*names: str) -> Mapping[str, Any]:
        return next((usage[name] for name in names if isinstance(usage.get(name), dict)), {})

    return Tokens(
        number(usage, "prompt_tokens", "input_tokens"),
        number(details("prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
        number(usage, "completion_tokens", "output_tokens"),
        number(details("completion_tokens_details", "output_tokens_details"), "reasoning_tokens"),
    )
