"""Takes changes of the store up while the server runs, and notes there which keys were used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path

from engine.errors import ConfigError
from server.keys.keyring import Keyring
from server.keys.record import Key
from server.keys.store import FILE_NAME, KeyStore

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""The interval between looks at the store. A look that finds no change takes microseconds."""

NOTE_S = 60.0
"""The interval between notes of the last use of keys."""


class KeyWatch:
    """Keeps a keyring as the store is. No request waits for it."""

    def __init__(self, folder: Path, keyring: Keyring) -> None:
        self._folder = folder
        self._path = folder / FILE_NAME
        self._keyring = keyring
        self._store: KeyStore | None = None
        self._seen: tuple[int, ...] | None = None
        """The file and its version that the keyring has."""
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told: str | None = None
        """The last error in the log."""
        self._unnoted: dict[bytes, int] = {}

    def load(self) -> None:
        """Read the store for the first time. Blocks on the disk.

        Raises:
            ConfigError: it cannot be used.

        """
        self._take(self._look())

    def begin(self) -> None:
        """Watch, in the background."""
        self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        """Stop watching, and note the last uses."""
        self._stop.set()
        if self._task is not None:
            await self._task
        await self._note()
        if self._store is not None:
            self._store.close()

    async def _run(self) -> None:
        noted_s = time.monotonic()
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._stop.wait()
            try:
                self._take(await asyncio.to_thread(self._look))
            except Exception as error:
                self._tell(error)
            else:
                self._told = None
            if time.monotonic() - noted_s >= NOTE_S:
                noted_s = time.monotonic()
                await self._note()

    def _take(self, keys: tuple[Key, ...] | None) -> None:
        if keys is not None:
            self._keyring.replace(keys)
            logger.info("keys in %s: %d", self._path, len(keys))

    def _look(self) -> tuple[Key, ...] | None:
        """The keys, if they have changed since the last look."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            if self._store is not None:
                raise ConfigError(
                    f"{self._path} is gone; its keys stay as they were until it is back"
                ) from None
            return None
        file = (status.st_dev, status.st_ino)
        if self._store is None or self._seen is None or self._seen[:2] != file:
            store, self._store, self._seen = self._store, None, None
            if store is not None:
                store.close()
            self._store = KeyStore(self._folder)
        # The version first: a change after it is found by the next look.
        seen = (*file, self._store.version())
        if seen == self._seen:
            return None
        keys = self._store.all()
        self._seen = seen
        return keys

    async def _note(self) -> None:
        self._unnoted |= self._keyring.take_used()
        if not self._unnoted or self._store is None:
            return
        try:
            await asyncio.to_thread(self._store.note_used, self._unnoted)
        except Exception as error:
            self._tell(error)
        else:
            self._unnoted = {}

    def _tell(self, error: Exception) -> None:
        """Log an error once, however often it comes back. The keyring stays as it is."""
        message = str(error)
        if message != self._told:
            self._told = message
            logger.error("the keys could not be read or noted: %s", message)
