"""The hash that a fetched file must have."""

from __future__ import annotations

import hashlib
import re

from engine.files.hub.listing import RemoteFile


class Digest:
    """The hash that a file's etag must be. An etag of another kind has none and is never wrong."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        """Forget all bytes so far."""
        self._hash = None
        if re.fullmatch("[0-9a-f]{64}", self._file.etag):
            self._hash = hashlib.sha256()
        elif re.fullmatch("[0-9a-f]{40}", self._file.etag):  # as git names a blob
            self._hash = hashlib.sha1(usedforsecurity=False)
            self._hash.update(b"blob %d\0" % self._file.nbytes)

    def update(self, data: bytes) -> None:
        """Take in the next bytes of the file."""
        if self._hash is not None:
            self._hash.update(data)

    def is_wrong(self) -> bool:
        """Whether the bytes are not those that the etag names."""
        return self._hash is not None and self._hash.hexdigest() != self._file.etag
