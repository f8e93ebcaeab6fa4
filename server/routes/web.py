"""The dashboard and playground: hand-written files, served as they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from server.auth import WEB_FILES_PREFIX, WEB_PATH

_FOLDER = Path(__file__).parents[1] / "web"
_INDEX = "index.html"

_MEDIA_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}

_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # generated images come as base64
        "media-src blob:",  # videos and speech are fetched with the key
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # text can become markup nowhere
    )
)

_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # The names stay the same from version to version, so each use asks whether there is a new one.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        headers = {**_HEADERS, "etag": self.etag}
        # A proxy that compresses makes the tag a weak one.
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in (tag.removeprefix("W/") for tag in known):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def web_router() -> APIRouter:
    """`GET /`, and the files it consists of under `/web/`.

    They are read once, here: what a request names is looked up among them and never on the disk.
    """
    router = APIRouter(tags=["web"])
    files = {path.name: _read(path) for path in _FOLDER.iterdir() if path.suffix in _MEDIA_TYPES}
    index = files.pop(_INDEX)

    @router.api_route(WEB_PATH, methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return index.response(request)

    @router.api_route(WEB_FILES_PREFIX + "{name}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].response(request)

    return router


def _read(path: Path) -> _File:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, _MEDIA_TYPES[path.suffix], etag)
