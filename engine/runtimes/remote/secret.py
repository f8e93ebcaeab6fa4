"""A key that the configuration names, read anew when it changes, and never shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import SecretStr

from engine.errors import LoadFailed

ENV, FILE = "env:", "file:"

LEAST_CHARS = 6
"""A shorter value is no secret, and words of messages would be hidden with it."""

LEAST_CHARS_IN_ANSWERS = 16
"""The same of answers, which nothing else may change. Words such as `ollama` stand for no key."""

HIDDEN = "[key]"

_FITS_A_HEADER = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class Secret:
    """The value of `env:NAME`, of `file:PATH`, or one that is written there itself.

    A variable is read for each request. A file is read again when its time or size changes, so a
    key is rotated without a restart.
    """

    def __init__(self, written: SecretStr) -> None:
        self._written = written
        self._value: str | None = None
        self._stamp: tuple[int, int] | None = None
        self._shown: set[str] = set()

    def __repr__(self) -> str:
        return f"Secret({self.where})"

    @property
    def where(self) -> str:
        """Where the value is, in words without it."""
        text = self._written.get_secret_value()
        if text.startswith(ENV):
            return f"the variable {text.removeprefix(ENV)}"
        if text.startswith(FILE):
            return f"the file {text.removeprefix(FILE)}"
        return "the configuration"

    def read(self, *, again: bool = False) -> str:
        """The value now. With `again` a file is read whatever its time says.

        A file that is just being replaced leaves the last value.

        Raises:
            LoadFailed: there is none. The error names the variable or the file.

        """
        text = self._written.get_secret_value()
        if text.startswith(ENV):
            value = os.environ.get(text.removeprefix(ENV), "")
        elif text.startswith(FILE):
            value = self._read_file(Path(text.removeprefix(FILE)).expanduser(), again)
        else:
            value = text
        value = value.strip()
        if not _FITS_A_HEADER.fullmatch(value):
            what = "holds no key" if not value else "holds what is no key: it is one printable line"
            raise LoadFailed(f"{self.where} {what}")
        self._shown.add(value)
        return value

    def _read_file(self, path: Path, again: bool) -> str:
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if again or stamp != self._stamp or self._value is None:
                # A device or a huge file in the place of a key must not be read to its end.
                with path.open("rb") as file:
                    self._value = file.read(2**16).decode("utf-8", "replace").strip()
                self._stamp = stamp
        except OSError as error:
            if self._value is None:
                raise LoadFailed(f"{self.where} cannot be read: {error.strerror}") from error
        return self._value

    def hide(self, text: str, least_chars: int = LEAST_CHARS) -> str:
        """The text without any value that was read so far and has so many characters."""
        for value in self._shown:
            if len(value) >= least_chars:
                text = text.replace(value, HIDDEN)
        return text
