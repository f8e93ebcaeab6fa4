"""All keys of a running server: those of the configuration, and those of the store."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from engine.caller import NOBODY, Caller
from engine.config import EngineConfig
from engine.cost_config import BudgetConfig
from server.keys.access import Access
from server.keys.limited_caller import LimitedCaller
from server.keys.limiter import Clock, Limiter, Limits
from server.keys.record import ANY, Key, digest_of

Budgets = tuple[BudgetConfig, ...]


@dataclass(frozen=True, slots=True)
class ConfiguredKey:
    """A key of the configuration. It may do everything, and only an admin's gives orders."""

    name: str
    digest: bytes
    admin: bool


class Keyring:
    """Finds what a key may do, by its digest. Lives on the event loop of the server."""

    def __init__(
        self,
        configured: Iterable[ConfiguredKey],
        config: EngineConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        """`config` has the models that scopes name. `clock` is that of the limits."""
        self._configured = [
            # The admin's come last: of a key that is both, the higher role counts.
            (key.digest, Access(Caller(key.name), admin=key.admin, digest=key.digest))
            for key in sorted(configured, key=lambda key: key.admin)
        ]
        self._names = [
            *(model.names for model in config.models),
            *(route.names for route in config.routes),
        ]
        self._plain = frozenset(name for names in self._names for name in names)
        self._clock = clock
        self._stored: dict[bytes, Access] = {}
        self._limiters: dict[tuple[str, int], Limiter] = {}
        """By name and creation, so that a new secret does not give new limits."""
        self._on_budgets: Callable[[Budgets], None] | None = None
        self.budgets: Budgets = ()
        """What the keys of the store may spend."""

    def __bool__(self) -> bool:
        """Whether requests need a key. Revoked and expired keys count: they open nothing."""
        return bool(self._configured or self._stored)

    def find(self, presented: str) -> Access | None:
        """What this key may do, or might once; None if it is unknown."""
        return self.of_digest(digest_of(presented))

    def of_digest(self, digest: bytes) -> Access | None:
        """What the key of this digest may do, or might once; None if it is unknown."""
        # How long a look-up of a digest takes says nothing of a key with 256 random bits.
        found = self._stored.get(digest)
        for known, access in self._configured:
            # These may be weak. No early exit: the time would reveal where a key is.
            if hmac.compare_digest(known, digest):
                found = access
        return found

    def named(self, name: str) -> Access | None:
        """What the key of that name may do, or might once; None if there is none."""
        every = [*self._stored.values(), *(access for _, access in self._configured)]
        return next((access for access in every if access.caller.name == name), None)

    def caller(self, name: str) -> Caller | None:
        """The caller of the key of this name; None: there is none, or it opens nothing any more.

        For work that goes on when its request has ended, also after a restart.
        """
        if not name and not self:
            return NOBODY
        found = self.named(name)
        return None if found is None or found.ended(time.time()) else found.caller

    def replace(self, keys: Collection[Key]) -> None:
        """Take these instead of the present keys of the store. Requests that run go on."""
        limiters: dict[tuple[str, int], Limiter] = {}
        stored: dict[bytes, Access] = {}
        for key in keys:
            limits = Limits(key.requests_per_minute, key.tokens_per_minute, key.concurrent)
            identity = (key.name, key.created_at)
            limiter = self._limiters.get(identity)
            if limiter is None:
                limiter = Limiter(limits, self._clock)
            else:
                limiter.set(limits)
            limiters[identity] = limiter
            before = self._stored.get(key.digest)
            stored[key.digest] = Access(
                LimitedCaller(key.name, key.tier, limiter),
                admin=key.admin,
                models=self._allowed(key.models),
                plain=self._plain,
                endpoints=None if ANY in key.endpoints else frozenset(key.endpoints),
                limiter=limiter,
                revoked=key.revoked_at is not None,
                expires_at=key.expires_at,
                used_at=before.used_at if before is not None else None,
                digest=key.digest,
            )
        self._limiters, self._stored = limiters, stored
        # A key that opens nothing spends nothing, but its budget and what it spent stay known.
        budgets = tuple(key.budget for key in keys if key.budget is not None)
        if budgets != self.budgets:
            self.budgets = budgets
            if self._on_budgets is not None:
                self._on_budgets(budgets)

    def hand_budgets(self, on_budgets: Callable[[Budgets], None]) -> None:
        """Call it with the budgets of the store, now and whenever they change."""
        self._on_budgets = on_budgets
        on_budgets(self.budgets)

    def take_used(self) -> dict[bytes, int]:
        """The keys of the store that were used since the last call: digest, and Unix seconds."""
        used: dict[bytes, int] = {}
        for digest, access in self._stored.items():
            if access.used_at is not None:
                used[digest], access.used_at = int(access.used_at), None
        return used

    def _allowed(self, scopes: Collection[str]) -> frozenset[str] | None:
        """Every name that the scopes allow. A model that is named by one name has all of them."""
        if ANY in scopes:
            return None
        allowed = set(scopes)
        for scope in scopes:
            allowed |= names_of(scope, self._names)
        return frozenset(allowed)


def names_of(scope: str, groups: Iterable[Collection[str]]) -> set[str]:
    """All names of the models, each a group of names, that a scope allows."""
    pattern = re.compile(re.escape(scope).replace(r"\*", ".*"), re.DOTALL)
    return {name for group in groups if any(map(pattern.fullmatch, group)) for name in group}
