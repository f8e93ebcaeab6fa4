"""What a presented key may do, as the server keeps it in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.caller import NOBODY, Caller
from engine.errors import ModelForbidden
from engine.words import echoed
from server.keys.endpoints import families_of
from server.keys.limiter import Limiter

if TYPE_CHECKING:
    from starlette.requests import Request


@dataclass(slots=True, eq=False)
class Access:
    """One key. Without keys there is `EVERYTHING`."""

    caller: Caller
    admin: bool
    models: frozenset[str] | None = None
    """Every name that it may use; None: all."""
    plain: frozenset[str] = frozenset()
    """Every name of a model or a route: what else has a colon may be `MODEL:LORA`."""
    endpoints: frozenset[str] | None = None
    """Every family that it may call; None: all."""
    limiter: Limiter | None = None
    revoked: bool = False
    expires_at: float | None = None
    used_at: float | None = None
    """When it was last used, in Unix seconds; None: not since its last use was noted."""
    digest: bytes = field(default=b"", repr=False)
    """Of the key; empty without keys."""

    def ended(self, now: float) -> str | None:
        """Why it is not accepted any more, or None. `now` is in Unix seconds."""
        if self.revoked:
            return "This API key was revoked."
        if self.expires_at is not None and self.expires_at <= now:
            return "This API key has expired."
        return None

    def may_call(self, path: str) -> bool:
        """Whether it may call the endpoint."""
        if self.endpoints is None:
            return True
        families = families_of(path)
        return families is None or not families.isdisjoint(self.endpoints)

    def may_use(self, model: str) -> bool:
        """Whether it may use the model of that name. Who may use one may use its LoRAs."""
        if self.models is None or model in self.models:
            return True
        return model not in self.plain and model.rpartition(":")[0] in self.models

    def check_model(self, model: str) -> None:
        """Return if it may use the model of that name.

        The error is the same whether or not there is such a model.

        Raises:
            ModelForbidden: it may not.

        """
        if not self.may_use(model):
            raise ModelForbidden(
                f"This API key may not use the model {echoed(model)}."
                " GET /v1/models lists what it may use.",
                param="model",
            )


EVERYTHING = Access(NOBODY, admin=True)
"""For requests to a server without keys. There the guard decides who gives orders to the engine."""


def access_of(request: Request) -> Access:
    """What the sender of the request may do."""
    access: Access = getattr(request.state, "access", EVERYTHING)
    return access
