"""A program: writes the text of a PDF to its output. It runs apart from the server.

It ends with 1 and a line of reason if the PDF cannot be read. Otherwise, limits on its memory and
time end it.
"""

from __future__ import annotations

import logging
import sys

from server.vector_stores.process_limits import limit_this_process

MAX_PAGES = 10_000
MAX_CHARS = 60_000_000


def main(path: str) -> int:
    """Write the text, page by page."""
    limit_this_process()
    logging.disable(logging.CRITICAL)
    try:
        from pypdf import PdfReader
    except ImportError:
        print("the package pypdf is not installed", file=sys.stderr)  # noqa: T201
        return 1
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it needs a password")
        if len(reader.pages) > MAX_PAGES:
            raise ValueError(f"it has more than {MAX_PAGES} pages")
        left = MAX_CHARS
        for page in reader.pages:
            text = page.extract_text()
            left -= len(text)
            if left < 0:
                raise ValueError("its text is too long")
            sys.stdout.write(text + "\n\n")
    except MemoryError:
        print("it takes too much memory", file=sys.stderr)  # noqa: T201
        return 1
    except Exception as error:  # the library raises many kinds for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(reason, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
