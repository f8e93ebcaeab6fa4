"""The text of an HTML page, as a reader sees it.

As a program it reads the page from its input, apart from the server.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

from server.vector_stores.process_limits import limit_this_process

_SKIPPED = frozenset({"script", "style", "template", "noscript", "svg", "math"})
_PARAGRAPHS = frozenset(
    {"article", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "main", "p", "pre", "section"}
    | {"table", "title"}
)
_BLOCKS = _PARAGRAPHS | {
    *("address", "aside", "body", "br", "caption", "dd", "div", "dl", "dt", "fieldset"),
    *("figcaption", "figure", "footer", "form", "head", "header", "hr", "html", "li", "nav"),
    *("ol", "option", "select", "tbody", "tfoot", "thead", "tr", "ul"),
}
_SPACES = re.compile(r"[ \t\r\n\f\v\u00a0]+")
_MANY_LINES = re.compile(r"\n{3,}")


def html_text(page: str) -> str:
    """Its text: one line a block, and an empty line round paragraphs and headings."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = "".join(reader.pieces).split("\n")
    text = "\n".join(line if reader.kept and line.strip() else line.strip() for line in lines)
    return _MANY_LINES.sub("\n\n", text).strip()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.kept = False
        """Whether the page has text whose spaces count."""
        self._skipped: list[str] = []
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._skipped.append(tag)
            return
        self._break(tag)
        if tag == "pre":
            self._preformatted += 1
            self.kept = True
        elif tag in ("td", "th"):
            self.pieces.append(" ")
        elif tag == "li":
            self.pieces.append("- ")
        elif tag == "img":
            described = next((value for name, value in attrs if name == "alt" and value), None)
            if described and not self._skipped:
                self.pieces.append(f" {described} ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            if tag in self._skipped:
                del self._skipped[self._skipped.index(tag) :]
            return
        self._break(tag)
        if tag == "pre" and self._preformatted:
            self._preformatted -= 1

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.pieces.append(data if self._preformatted else _SPACES.sub(" ", data))

    def _break(self, tag: str) -> None:
        if self._skipped or tag not in _BLOCKS:
            return
        self.pieces.append("\n\n" if tag in _PARAGRAPHS else "\n")


def main() -> int:
    """Write the text of the page that is the input."""
    limit_this_process()
    try:
        sys.stdout.write(html_text(sys.stdin.buffer.read().decode()))
    except MemoryError:
        print("it takes too much memory", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
