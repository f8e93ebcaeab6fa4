"""A key of the store: its name, what it may do, and how much."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from dataclasses import dataclass
from typing import Literal

from engine.cost_config import BudgetConfig
from engine.errors import ConfigError
from server.keys.endpoints import FAMILIES

ANY = "*"
"""In a scope: all of them."""

PREFIX = "sk-rh-"
"""Of every key that is made here. Some clients take only keys with `sk-`, and scanners of
repositories look for prefixes."""

RESERVED = ("config-", "file-")
"""How the names of keys begin that the configuration gives no name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TIER = re.compile(r"[A-Za-z0-9._-]{0,64}")
_MODEL = re.compile(r"\S{1,256}")


def new_secret() -> str:
    """A new key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """What is stored of a key.

    A plain SHA-256 is right for keys of 256 random bits: nobody can try them all, so a slow hash
    would protect nothing, and cost every request.
    """
    return hashlib.sha256(secret.encode()).digest()


def check_name(name: str) -> str:
    """The name, if it is one.

    Raises:
        ConfigError: it is none.

    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: {name[:100]!r} is not a name: 1 to 64 letters, digits and . _ @ -,"
            " the first a letter or digit"
        )
    if name.startswith(RESERVED):
        raise ConfigError(f"name: {name!r} begins as the names of keys of the configuration do")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, without the key itself. Times are Unix seconds.

    Raises:
        ConfigError: naming the wrong field.

    """

    name: str
    digest: bytes
    tier: str = ""
    admin: bool = False
    """Whether it may load, unload and pin as well."""
    models: tuple[str, ...] = (ANY,)
    """Ids, aliases and routes. A `*` in one stands for any characters."""
    endpoints: tuple[str, ...] = (ANY,)
    """Families of endpoints."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    """Requests at once."""
    day: float | None = None
    """Dollars a day."""
    month: float | None = None
    """Dollars a calendar month."""
    when_spent: Literal["refuse", "free"] = "refuse"
    created_at: int
    last_used_at: int | None = None
    expires_at: int | None = None
    revoked_at: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if not _TIER.fullmatch(self.tier):
            raise ConfigError(f"tier: {self.tier[:100]!r} is not a word")
        if not self.models or not all(map(_MODEL.fullmatch, self.models)):
            raise ConfigError("model: it is the id of a model or route, an alias, or *")
        for endpoint in self.endpoints:
            if endpoint not in (ANY, *FAMILIES):
                known = ", ".join(FAMILIES)
                raise ConfigError(
                    f"endpoint: there is no {endpoint[:100]!r}; there is {known}, or {ANY}"
                )
        if not self.endpoints:
            raise ConfigError("endpoint: at least one is needed, or *")
        if self.admin and (ANY not in self.models or ANY not in self.endpoints):
            raise ConfigError(
                "admin: such a key may use everything, so it names no model or endpoint"
            )
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent"):
            limit = getattr(self, name)
            if limit is not None and not 1 <= limit < 2**53:
                raise ConfigError(f"{name}: it is 1 or more")
        for name in ("day", "month"):
            dollars = getattr(self, name)
            if dollars is not None and not 0 <= dollars < math.inf:
                raise ConfigError(f"{name}: dollars, 0 or more")
        if self.when_spent not in ("refuse", "free"):
            raise ConfigError("when_spent: it is refuse or free")

    @property
    def budget(self) -> BudgetConfig | None:
        """What it may spend, or None."""
        if self.day is None and self.month is None:
            return None
        return BudgetConfig(
            key=self.name, day=self.day, month=self.month, when_spent=self.when_spent
        )

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it is still accepted."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active"
