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
    """Makes events of bytes. Each is looked at once, however many pieces a long event comes in."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._lines: list[str] = []
        """Of the event that is not complete."""
        self._pieces: list[str] = []
        """Of the line that is not complete."""
        self._held = 0
        self._ended_with_cr = False
        """The LF of a CR LF may be in the next chunk."""

    @property
    def held_chars(self) -> int:
        """Characters of an event that is not complete."""
        return self._held

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that these bytes complete."""
        return self._take(self._decoder.decode(chunk))

    def end(self) -> list[ServerEvent]:
        """What is left when the stream ends: some providers forget the last empty line."""
        return self._take(self._decoder.decode(b"", final=True) + "\n\n")

    def _take(self, text: str) -> list[ServerEvent]:
        if not text:
            return []
        if self._ended_with_cr:
            text = text.removeprefix("\n")
        self._ended_with_cr = text.endswith("\r")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        self._held += len(text)
        events = []
        begin = 0
        while (end := text.find("\n", begin)) >= 0:
            line = "".join((*self._pieces, text[begin:end]))
            self._pieces.clear()
            begin = end + 1
            if line:
                self._lines.append(line)
                continue
            if self._lines:
                events.append(ServerEvent(tuple(self._lines)))
                self._lines.clear()
            self._held = len(text) - begin
        if begin < len(text):
            self._pieces.append(text[begin:])
        return events
