"""Cross-origin requests: which web pages may read the answers of this server."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.headers import ANSWER_HEADERS
from server.keys.limiter import RATE_LIMIT_HEADERS
from server.settings import ServerSettings

METHODS = ("GET", "HEAD", "POST", "DELETE")
"""Every method that a route has."""

EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "www-authenticate",
    "allow",
    "content-disposition",
    "mcp-session-id",
    *RATE_LIMIT_HEADERS,
    *ANSWER_HEADERS,
)
"""What a script may read besides the headers that every page may read."""


def allow_origins(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The application for pages of `server.cors_origins`; unchanged if there are none.

    It must be outside of every layer that answers by itself. Then an error has the headers too, and
    a preflight request, which never carries a key, does not reach the check of keys.
    """
    if not settings.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=METHODS,
        allow_headers=("*",),  # those that a page asks for: each client library has its own
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )
