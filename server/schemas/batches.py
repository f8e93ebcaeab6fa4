"""OpenAI's Batch API: requests and answers."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from engine.units import parse_duration
from server.batches.input import ENDPOINTS
from server.batches.record import Batch
from server.schemas.fields import Body
from server.schemas.stored_files import ExpiresAfter, read_count

MIN_WINDOW_S = 60
MAX_WINDOW_S = 30 * 86_400
_WINDOW_RULE = "it is a time from 1m to 30d, such as 24h"

MAX_PAIRS = 16
_METADATA_RULE = "it has at most 16 texts of at most 512 characters, by names of at most 64"


def _read_window(value: Any) -> str:
    try:
        fits = isinstance(value, str) and MIN_WINDOW_S <= parse_duration(value) <= MAX_WINDOW_S
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(_WINDOW_RULE)
    return str(value)


def _read_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_PAIRS:
        raise ValueError(_METADATA_RULE)
    for name, text in value.items():
        if not isinstance(text, str) or len(name) > 64 or len(text) > 512:
            raise ValueError(_METADATA_RULE)
    return value


Window: TypeAlias = Annotated[
    str,
    PlainValidator(_read_window),
    WithJsonSchema({"type": "string", "examples": ["24h"]}),
]
Metadata: TypeAlias = Annotated[
    dict[str, str] | None,
    PlainValidator(_read_metadata),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]


class BatchBody(Body):
    """`POST /v1/batches`."""

    input_file_id: str
    """A file with the purpose `batch`."""
    endpoint: Annotated[str, WithJsonSchema({"enum": [*ENDPOINTS]})]
    completion_window: Window
    """How long the batch may take."""
    metadata: Metadata = None
    output_expires_after: ExpiresAfter | None = None
    """How long the files of results are kept."""


class BatchListQuery(Body):
    """The query of `GET /v1/batches`."""

    limit: Annotated[int, BeforeValidator(read_count), Field(ge=1, le=100)] = 20
    after: str | None = None


def batch_document(batch: Batch) -> dict[str, Any]:
    """OpenAI's batch object. What has not happened is left out."""
    tokens = batch.tokens
    document: dict[str, Any] = {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.state.value,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        "in_progress_at": batch.in_progress_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
    }
    document = {name: value for name, value in document.items() if value is not None}
    if batch.errors:
        document["errors"] = {
            "object": "list",
            "data": [
                {
                    "code": error.code,
                    "message": error.message,
                    "param": error.param,
                    "line": error.line,
                }
                for error in batch.errors
            ],
        }
    document["request_counts"] = {
        "total": batch.total,
        "completed": batch.completed,
        "failed": batch.failed,
    }
    document["usage"] = {
        "input_tokens": tokens.input,
        "input_tokens_details": {"cached_tokens": tokens.cached},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.input + tokens.output,
    }
    document["metadata"] = batch.metadata
    return document
