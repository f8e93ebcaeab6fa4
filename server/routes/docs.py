"""The OpenAPI document, and Swagger UI that shows it."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from server.auth import DOCS_FILES_PREFIX, DOCS_PATH
from server.router import Router
from server.settings import ServerSettings
from server.static_files import StaticFile

if TYPE_CHECKING:
    from engine.engine import Engine

OPENAPI_PATH = "/openapi.json"

_FOLDER = Path(__file__).parents[1] / "docs_page"
_INDEX = "index.html"
_OWN = ("docs.js", "docs.css", "swagger-ui.LICENSE.txt", "swagger-ui-bundle.js.LICENSE.txt")
"""Also the licences of Swagger UI and of what its bundle holds, which the package leaves out."""
_SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")
_PACKAGE = "fastapi_offline"
"""Ships the files of Swagger UI. Nothing of it is imported."""


def docs_router(engine: Engine, settings: ServerSettings) -> Router:
    """`GET /openapi.json`, `GET /docs`, and the files of the page under `/docs/`.

    The page and its files are as open as the dashboard: a browser cannot send a key with them. The
    document needs a key as every other route, and the page asks for it.
    """
    router = Router("docs")

    @cache
    def files() -> dict[str, StaticFile]:
        # At the first use: a server that nobody asks for the page needs not hold its 1.7 MB.
        package = find_spec(_PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise HTTPException(404, f"The package {_PACKAGE} is not installed.")
        static = Path(package.submodule_search_locations[0]) / "static"
        paths = [_FOLDER / name for name in (_INDEX, *_OWN)] + [static / n for n in _SWAGGER_UI]
        return {path.name: StaticFile.read(path) for path in paths}

    document: bytes | None = None

    @router.get(OPENAPI_PATH)
    async def openapi(request: Request) -> Response:
        nonlocal document
        if document is None:
            # At the first use, as it takes a moment.
            from server.openapi.document import document_text

            routes = request.app.routes
            document = await asyncio.to_thread(document_text, routes, engine.config, settings)
        return Response(document, media_type="application/json")

    @router.route(DOCS_PATH, "GET", "HEAD")
    async def page(request: Request) -> Response:
        return (await asyncio.to_thread(files))[_INDEX].response(request)

    @router.route(DOCS_FILES_PREFIX + "{name}", "GET", "HEAD")
    async def file(name: str, request: Request) -> Response:
        if name not in (*_OWN, *_SWAGGER_UI):
            raise HTTPException(404)
        return (await asyncio.to_thread(files))[name].response(request)

    return router
