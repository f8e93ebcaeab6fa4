"""The dashboard and playground: hand-written files, served unchanged."""

from __future__ import annotations

from pathlib import Path

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from server.auth import WEB_FILES_PREFIX, WEB_PATH
from server.router import Router
from server.static_files import MEDIA_TYPES, StaticFile

_FOLDER = Path(__file__).parents[1] / "web"
_INDEX = "index.html"


def web_router() -> Router:
    """`GET /`, and its files under `/web/`.

    They are read once, here. A name in a request is looked up among them, and never on the disk.
    """
    router = Router("web")
    files = {
        path.name: StaticFile.read(path) for path in _FOLDER.iterdir() if path.suffix in MEDIA_TYPES
    }
    index = files.pop(_INDEX)

    @router.route(WEB_PATH, "GET", "HEAD")
    async def page(request: Request) -> Response:
        return index.response(request)

    @router.route(WEB_FILES_PREFIX + "{name}", "GET", "HEAD")
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].response(request)

    return router
