"""The outermost layer of every request: its id, its time, its metrics, and the plain 500."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import PROBES
from server.errors import Failure, is_anthropic
from server.metrics import HttpMetrics

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The counted status of a request whose client left before the response (nginx's convention)."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """ASGI middleware: `x-request-id`, `openai-processing-ms`, metrics, log, and a plain 500.

    The id is the client's if it is sane, otherwise a new one. It is `request.state.request_id`.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. Measure and count its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = self._clock()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_LEFT

        async def send_with_context(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_anthropic(scope["path"]):
                    headers["request-id"] = request_id  # the name that its clients read
                headers["openai-processing-ms"] = f"{(self._clock() - began_s) * 1000:.0f}"
            await send(message)

        try:
            await self._app(scope, receive, send_with_context)
        except ClientDisconnect:
            pass  # the client left while it sent its body
        except Exception as error:
            logger.exception("request %s failed unexpectedly", request_id)
            if status == CLIENT_LEFT:  # the response has not begun
                response = Failure.of(error).response(scope["path"], request_id)
                await response(scope, receive, send_with_context)
        finally:
            elapsed_s = self._clock() - began_s
            route = getattr(scope.get("route"), "path", None)
            self._metrics.observe(route, scope["method"], status, elapsed_s)
            logger.log(
                logging.DEBUG if scope["path"] in PROBES else logging.INFO,
                "%s %s %d in %.0f ms (%s)",
                scope["method"],
                quote(scope["path"]),
                status,
                elapsed_s * 1000,
                request_id,
            )
