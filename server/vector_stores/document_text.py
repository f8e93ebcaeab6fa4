"""The text of a file: plain text, markdown, HTML or PDF."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from pathlib import Path

from server.vector_stores.html_text import html_text

READ_TIMEOUT_S = 120
"""For the text of one file that is read apart."""

MAX_HTML_CHARS = 16_384
"""A longer page is read apart, in a process of its own."""

MAX_TEXT_CHARS = 50_000_000
"""Of one file. A small PDF may unfold to any size."""

_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH")
_PDF_MARK = b"%PDF-"
_MARK_WITHIN = 1024
"""Readers of PDF find the mark within so many bytes."""
_HTML_NAMES = (".html", ".htm", ".xhtml")
_HTML_MARKS = ("<!doctype html", "<html")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class UnreadableFile(Exception):
    """A file has no text that could be searched; `code` is OpenAI's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def document_text(path: Path, name: str) -> str:
    """The text of the file `path`, which a client called `name`. It blocks.

    Raises:
        UnreadableFile: it is of another kind, damaged, or without text.
        OSError: it cannot be read.

    """
    data = path.read_bytes()
    if _PDF_MARK in data[:_MARK_WITHIN]:
        text = _pdf_text(path)
    else:
        text = _decoded(data)
        lowered = name.lower()
        begin = text[:200].lstrip().lower()
        if lowered.endswith(_HTML_NAMES) or begin.startswith(_HTML_MARKS):
            text = _html_text(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    if not text.strip():
        raise UnreadableFile("invalid_file", "The file has no text.")
    if len(text) > MAX_TEXT_CHARS:
        raise UnreadableFile("invalid_file", f"Its text has more than {MAX_TEXT_CHARS} characters.")
    return text


def _decoded(data: bytes) -> str:
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise _unsupported() from None
    if "\0" in text:
        raise _unsupported()
    return text


def _unsupported() -> UnreadableFile:
    return UnreadableFile(
        "unsupported_file", "It is not text in UTF-8 or UTF-16, markdown, HTML or PDF."
    )


def _pdf_text(path: Path) -> str:
    """The text of a PDF. The library is Python: here it would also hold up the event loop."""
    return _read_apart("PDF", "server.vector_stores.pdf_text", str(path.resolve()))


def _html_text(page: str) -> str:
    """The text of an HTML page. Python's parser takes for ever with one made of `<a<a<a`."""
    if len(page) <= MAX_HTML_CHARS:
        return html_text(page)
    return _read_apart("HTML", "server.vector_stores.html_text", page=page.encode())


def _read_apart(kind: str, program: str, *arguments: str, page: bytes = b"") -> str:
    """The text of a file, read in a process of its own.

    A file may be made to take all memory or to take for ever.
    """
    # Not the rest of the environment, which may hold keys.
    environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environ |= {"PYTHONPATH": str(_ROOT), "PYTHONIOENCODING": "utf-8:replace"}
    command = [sys.executable, "-m", program, *arguments]
    try:
        done = subprocess.run(
            command,
            env=environ,
            input=page,
            capture_output=True,
            timeout=READ_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnreadableFile(
            "invalid_file", f"Its text could not be read in {READ_TIMEOUT_S} seconds."
        ) from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines and done.returncode == 1 else "it takes too much memory"
        raise UnreadableFile("invalid_file", f"The {kind} cannot be read: {reason[:200]}")
    return done.stdout.decode("utf-8", "replace")
