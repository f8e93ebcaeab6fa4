"""Server-sent events, cut out of the bytes of a stream.

The format is that of the HTML standard, "9.2 Server-sent events": lines end with LF, CR LF or CR,
and an empty line ends an event.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event, or a comment that keeps the connection open."""

    lines: tuple[str, ...]

    @property
    def data(self) -> str | None:
        """What it carries; None of a comment."""
        found = [line[5:].removeprefix(" ") for line in self.lines if line.startswith("data:")]
        return "\n".join(found) if found else None

    def text(self, data: str | None = None) -> str:
        """The event for the wire, with other `data` if they are given."""
        lines = list(self.lines)
        if data is not None:
            places = [index for index, line in enumerate(lines) if line.startswith("data:")]
            lines[places[0]] = f"data: {data}"
            for index in reversed(places[1:]):
                del lines[index]
        return "\n".join(lines) + "\n\n"


class EventReader:
    """Makes events of bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._text = ""
        self._looked = 0
        """Up to here there is no empty line."""

    @property
    def held_chars(self) -> int:
        """Characters of an event that is not complete."""
        return len(self._text)

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that these bytes complete."""
        return self._take(self._decoder.decode(chunk))

    def end(self) -> list[ServerEvent]:
        """What is left when the stream ends: some providers forget the last empty line."""
        rest = self._take(self._decoder.decode(b"", final=True) + "\n\n")
        self._text = ""
        return rest

    def _take(self, text: str) -> list[ServerEvent]:
        text = self._text + text
        # The LF of a CR LF may be in the next chunk.
        held = "\r" if text.endswith("\r") else ""
        text = text[: len(text) - len(held)]
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            self._looked = 0
        events = []
        begin = 0
        while (end := text.find("\n\n", max(begin, self._looked))) >= 0:
            lines = tuple(line for line in text[begin:end].split("\n") if line)
            if lines:
                events.append(ServerEvent(lines))
            begin = end + 2
            self._looked = 0
        self._text = text[begin:] + held
        self._looked = max(0, len(self._text) - 2)
        return events
