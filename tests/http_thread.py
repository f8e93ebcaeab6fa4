"""A server of the standard library on a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer

POLL_S = 0.02
"""How often it looks whether it is to end; by itself each half second, for every such test."""


@contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    """Let it answer, give its URL, and close it in the end."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
