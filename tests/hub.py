"""A model hub on loopback: the part of its HTTP API that the real client asks for files with.

As the hub does, it answers HEAD and GET of a large file with a redirect to another address that
serves ranges, and names it by its SHA-256; a small file it serves itself, named as git names it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.http_thread import running

LARGE = (".safetensors", ".pth", ".pt", ".bin", ".npy")
WAIT_S = 60
TOKEN = "hf_let_me_in"


class Hub:
    """What the hub holds, and what it was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, Mapping[str, bytes]] = {}
        self.gated: set[str] = set()
        """Their files are for who has the token."""
        self.stall: dict[str, int] = {}
        """Paths whose next answer stops after so many bytes, until `let_go`."""
        self.corrupt: set[str] = set()
        """Paths that are sent with other bytes than were promised."""
        self.let_go = threading.Event()
        self.sent: Counter[str] = Counter()
        """Bytes of bodies by path."""
        self.listed: list[str] = []
        """Repositories whose files were asked for, once for each time."""
        self.ranges: list[tuple[str, int]] = []
        """Path and first byte of every GET of a file."""
        self.url = ""

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1(repr(sorted(self.repos[repo].items())).encode())
        return digest.hexdigest()


def etag(path: str, data: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def point_client_at(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the client of this process ask that hub and keep its cache there; returns the cache.

    It has read the environment long ago, when it was imported.
    """
    from huggingface_hub import constants

    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return home / "hub"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or cancelled, resets its connections."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = _Server(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    with running(server) as hub.url:
        try:
            yield hub
        finally:
            hub.let_go.set()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
                self._info(match[1], match[2])
            elif match := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)", path):
                self._tree(match[1], match[2])
            elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
                self._body(match[2], hub.repos[match[1]][match[2]], {})
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            else:
                self._json({})

        def _found(self, repo: str, revision: str) -> bool:
            if repo not in hub.repos:
                self._refuse(404, "RepoNotFound")
                return False
            if revision not in ("main", hub.commit(repo)):
                self._refuse(404, "RevisionNotFound")
                return False
            return True

        def _info(self, repo: str, revision: str) -> None:
            if self._found(repo, revision):
                self._json({"id": repo, "modelId": repo, "sha": hub.commit(repo), "siblings": []})

        def _tree(self, repo: str, revision: str) -> None:
            if not self._found(repo, revision):
                return
            hub.listed.append(repo)
            entries: list[dict[str, Any]] = []
            for path, data in hub.repos[repo].items():
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
                if path.endswith(LARGE):
                    entry["oid"] = "0" * 40
                    entry["lfs"] = {
                        "oid": etag(path, data),
                        "size": len(data),
                        "pointerSize": 130,
                    }
                else:
                    entry["oid"] = etag(path, data)
                entries.append(entry)
            self._json(entries)

        def _resolve(self, repo: str, revision: str, path: str) -> None:
            if not self._found(repo, revision):
                return
            if repo in hub.gated and self.headers.get("authorization") != f"Bearer {TOKEN}":
                self._refuse(401, "GatedRepo")
                return
            data = hub.repos[repo].get(path)
            if data is None:
                self._refuse(404, "EntryNotFound")
                return
            headers = {"x-repo-commit": hub.commit(repo)}
            if path.endswith(LARGE):
                headers["x-linked-etag"] = f'"{etag(path, data)}"'
                headers["x-linked-size"] = str(len(data))
                # Another host, as a content delivery network is.
                cdn = hub.url.replace("127.0.0.1", "localhost")
                headers["location"] = f"{cdn}/cdn/{repo}/{path}"
                self._begin(302, {**headers, "content-length": "0"})
            else:
                self._body(path, data, {**headers, "etag": f'"{etag(path, data)}"'})

        def _body(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
            first = 0
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", "")):
                first = int(match[1])
                headers = {
                    **headers,
                    "content-range": f"bytes {first}-{len(data) - 1}/{len(data)}",
                }
            self._begin(
                206 if first else 200,
                {**headers, "content-length": str(len(data) - first), "accept-ranges": "bytes"},
            )
            if self.command == "HEAD":
                return
            hub.ranges.append((path, first))
            body = data[first:]
            if path in hub.corrupt:
                body = bytes(byte ^ 1 for byte in body)
            stop = hub.stall.pop(path, None)
            if stop is not None:
                body = body[:stop]
            hub.sent[path] += len(body)
            self.wfile.write(body)
            if stop is not None:
                self.wfile.flush()
                hub.let_go.wait(WAIT_S)
                self.close_connection = True

        def _json(self, document: Any) -> None:
            body = json.dumps(document).encode()
            self._begin(200, {"content-type": "application/json", "content-length": str(len(body))})
            if self.command != "HEAD":
                self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self._begin(status, {"x-error-code": code, "content-length": "0"})

        def _begin(self, status: int, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler
