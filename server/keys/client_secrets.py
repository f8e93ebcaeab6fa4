"""Client secrets: keys for one browser and a few minutes, which open a realtime session.

They live in memory, so none of them outlives the process.
"""

from __future__ import annotations

import heapq
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import QueueFull
from server.keys.record import digest_of

SECRET_PREFIX = "ek_"
"""OpenAI's."""

REALTIME_PATH = "/v1/realtime"
"""All that a client secret opens."""

MAX_BYTES = 4 * 2**20
"""What the secrets of one key may take: some ten thousand, or four with a million characters."""

_RECORD_BYTES = 400
"""What a secret takes beside its session."""


@dataclass(frozen=True, slots=True)
class ClientSecret:
    """What a secret stands for, without the secret itself."""

    owner: bytes
    """The digest of the key that made it, whose rights it has. Empty: the server had no keys."""
    session_json: str
    """How the session begins."""
    expires_at: int
    """Unix seconds."""

    @property
    def session(self) -> dict[str, Any]:
        """How the session begins."""
        document: dict[str, Any] = json.loads(self.session_json)
        return document

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it counts for."""
        return len(self.session_json.encode()) + _RECORD_BYTES


class ClientSecrets:
    """All secrets that have not expired. Lives on the event loop of the server."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix seconds."""
        self._clock = clock
        self._secrets: dict[bytes, ClientSecret] = {}
        self._expiries: list[tuple[int, bytes]] = []
        """A heap: the next to expire is first."""
        self._owned_bytes: dict[bytes, int] = {}

    def make(
        self, owner: bytes, session: Mapping[str, Any], lifetime_s: int
    ) -> tuple[str, ClientSecret]:
        """A new secret of the key with the digest `owner`.

        Raises:
            QueueFull: the key has too many.

        """
        now = self._clock()
        self._drop_expired(now)
        record = ClientSecret(owner, json.dumps(session), math.ceil(now) + lifetime_s)
        owned_bytes = self._owned_bytes.get(owner, 0) + record.nbytes
        if owned_bytes > MAX_BYTES:
            wait_s = min((each.expires_at for each in self._of(owner)), default=now + 1) - now
            raise QueueFull(
                "The client secrets of this key take too much memory."
                " Make fewer, with a shorter session, or let them expire sooner.",
                retry_after_s=wait_s,
            )
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        digest = digest_of(secret)
        self._secrets[digest] = record
        self._owned_bytes[owner] = owned_bytes
        heapq.heappush(self._expiries, (record.expires_at, digest))
        return secret, record

    def find(self, presented: str) -> ClientSecret | None:
        """What the secret stands for; None if it is unknown or has expired."""
        self._drop_expired(self._clock())
        return self._secrets.get(digest_of(presented))

    def _of(self, owner: bytes) -> list[ClientSecret]:
        return [each for each in self._secrets.values() if each.owner == owner]

    def _drop_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, digest = heapq.heappop(self._expiries)
            gone = self._secrets.pop(digest)
            self._owned_bytes[gone.owner] -= gone.nbytes
            if not self._owned_bytes[gone.owner]:
                del self._owned_bytes[gone.owner]
