"""An answer as it is kept: status, headers, and the pieces in which it was sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from starlette.responses import Response
from starlette.types import Send

_DIGEST_BYTES = 32
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    pieces: tuple[bytes, ...]
    streamed: bool
    """Whether it was sent piece by piece, without its length."""

    @property
    def nbytes(self) -> int:
        """The bytes of its body."""
        return sum(map(len, self.pieces))

    def encode(self, key: bytes) -> bytes:
        """The entry as bytes, with a digest of the key and of all that follows."""
        head = json.dumps(
            {
                "status": self.status,
                "headers": dict(self.headers),
                "lengths": [len(piece) for piece in self.pieces],
                "streamed": self.streamed,
            }
        ).encode()
        parts = (len(head).to_bytes(_LENGTH_BYTES), head, *self.pieces)
        return b"".join((_digest(key, *parts), *parts))

    @classmethod
    def decode(cls, key: bytes, raw: bytes) -> Self | None:
        """The entry of these bytes; None unless they are those that `encode` gave for the key."""
        content = memoryview(raw)[_DIGEST_BYTES:]
        if _digest(key, content) != raw[:_DIGEST_BYTES]:
            return None
        # From here on the bytes are our own.
        begin = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES])
        head = json.loads(bytes(content[_LENGTH_BYTES:begin]))
        pieces = []
        for length in head["lengths"]:
            pieces.append(bytes(content[begin : begin + length]))
            begin += length
        return cls(head["status"], head["headers"], tuple(pieces), head["streamed"])

    async def send(self, headers: Mapping[str, str], send: Send) -> Response | None:
        """Send a streamed answer in its pieces, or return a whole one. `headers` come on top."""
        response = Response(
            b"" if self.streamed else b"".join(self.pieces),
            status_code=self.status,
            headers={**self.headers, **headers},
        )
        if not self.streamed:
            return response
        del response.headers["content-length"]
        head = {"status": self.status, "headers": response.raw_headers}
        await send({"type": "http.response.start", **head})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
