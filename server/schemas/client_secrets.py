"""OpenAI's client secrets: what a browser opens a realtime session with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.fields import Body


class SecretLifetime(BaseModel):
    """When a secret expires."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(default=600, ge=10, le=7_200)


class ClientSecretBody(Body):
    """`POST /v1/realtime/client_secrets`."""

    expires_after: SecretLifetime = SecretLifetime()
    session: dict[str, Any] = Field(default_factory=dict)
    """How the session begins. `SessionReader` checks it."""
