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
OLLAMA_RUNS = "Ollama is running"
"""What Ollama answers at `/`. The page has it too, as a comment, for programs that search it."""


def web_router() -> Router:
    """`GET /`, and its files under `/web/`. A program that accepts plain text gets Ollama's words.

    They are read once, here. A name in a request is looked up among them, and never on the disk.
    """
    router = Router("web")
    files = {
        path.name: StaticFile.read(path) for path in _FOLDER.iterdir() if path.suffix in MEDIA_TYPES
    }
    index = files.pop(_INDEX)
    vary = {"vary": "accept"}

    @router.route(WEB_PATH, "GET", "HEAD")
    async def page(request: Request) -> Response:
        accepted = request.headers.get("accept", "")
        if "text/plain" in accepted and "text/html" not in accepted:
            # Programs look here for an Ollama. A browser accepts HTML.
            return Response(OLLAMA_RUNS, headers=vary, media_type="text/plain")
        response = index.response(request)
        response.headers.update(vary)
        return response

    @router.route(WEB_FILES_PREFIX + "{name}", "GET", "HEAD")
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].response(request)

    return router
