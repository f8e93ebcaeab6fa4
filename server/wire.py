"""The engine's status as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.status import EngineStatus, ModelStatus

OWNER = "roundhouse"


def engine_document(status: EngineStatus) -> dict[str, Any]:
    """The whole status, field by field; on the wire an endless duration is null."""
    return asdict(status)


def model_document(status: ModelStatus, name: str) -> dict[str, Any]:
    """OpenAI's model object under the id `name`, plus the state of the model behind it."""
    own = asdict(status)
    created = own.pop("created")
    return {
        **own,
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "alias_of": None if name == status.id else status.id,
    }
