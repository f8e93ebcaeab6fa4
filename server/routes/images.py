"""OpenAI's image endpoints, and the files that their URLs name."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from PIL.Image import Image
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError, RuntimeFailed
from engine.requests import ImageRequest, ImageResult, PartialImage
from server.auth import IMAGE_FILES_PREFIX
from server.connection import run_while_connected
from server.errors import Failure
from server.forms import read_fields
from server.headers import read_priority, read_timeout_s, timing_headers
from server.pictures import decode_pictures, encode_picture
from server.schemas.images import EditBody, GenerationBody, ImageBody, VariationBody
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine, Session
    from engine.outputs import Outputs

logger = logging.getLogger(__name__)

_PATHS: dict[str, type[ImageBody]] = {
    "/v1/images/generations": GenerationBody,
    "/v1/images/edits": EditBody,
    "/v1/images/variations": VariationBody,
}


def images_router(engine: Engine, outputs: Outputs, settings: ServerSettings) -> APIRouter:
    """Generations, edits and variations, from JSON or forms; `GET /v1/images/files/{name}`."""
    router = APIRouter(tags=["images"])

    def add(path: str, kind: type[ImageBody]) -> None:
        async def endpoint(request: Request) -> Response:
            body = kind.of(await read_fields(request, settings.max_body_bytes))
            pictures = await asyncio.to_thread(
                decode_pictures, body.uploads(), settings.max_image_pixels
            )
            image_request = body.to_request(
                pictures,
                request_id=request.state.request_id,
                priority=read_priority(request.headers),
                queue_timeout_s=read_timeout_s(request.headers),
            )
            files_url = f"{str(request.base_url).rstrip('/')}{IMAGE_FILES_PREFIX}"
            return ImageResponse(engine, outputs, image_request, body, files_url)

        router.add_api_route(
            path, endpoint, methods=["POST"], name=kind.operation.value, response_model=None
        )

    for path, kind in _PATHS.items():
        add(path, kind)

    @router.api_route(IMAGE_FILES_PREFIX + "{name}", methods=["GET", "HEAD"])
    async def image_file(name: str) -> Response:
        path = await asyncio.to_thread(outputs.path, name)
        return FileResponse(path, headers={"cache-control": "private"})

    return router


class ImageResponse(Response):
    """The answer to one request: opened, sent and closed while the client stays.

    Whatever fails before the first byte is raised and becomes an ordinary error response.
    """

    def __init__(
        self,
        engine: Engine,
        outputs: Outputs,
        request: ImageRequest,
        body: ImageBody,
        files_url: str,
    ) -> None:
        super().__init__()
        self._engine = engine
        self._outputs = outputs
        self._request = request
        self._body_asked = body
        self._files_url = files_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request, giving it up when the client leaves."""
        await run_while_connected(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await self._engine.open(self._request)
        try:
            if self._body_asked.stream:
                await self._stream(session, send)
            else:
                await self._send_document(session, scope, receive, send)
        finally:
            await session.close()
        if self._body_asked.stream:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_document(
        self, session: Session, scope: Scope, receive: Receive, send: Send
    ) -> None:
        began_s = time.perf_counter()
        result = None
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, ImageResult):
                    result = event
        if result is None:
            raise RuntimeFailed("The model gave no image.")
        # The session ended with its events: the device is free while the images are encoded.
        ran_ms = (time.perf_counter() - began_s) * 1e3
        timings = replace(session.timings, run_ms=session.timings.run_ms + ran_ms)
        content = await asyncio.to_thread(self._render, result)
        headers = timing_headers(timings)
        await Response(content, headers=headers, media_type="application/json")(
            scope, receive, send
        )

    def _render(self, result: ImageResult) -> bytes:
        body = self._body_asked
        data = []
        for image in result.images:
            encoded = encode_picture(image, body.output_format, body.output_compression)
            if body.response_format == "url":
                name = self._outputs.put(encoded, f".{body.output_format}")
                data.append({"url": f"{self._files_url}{name}"})
            else:
                data.append({"b64_json": base64.b64encode(encoded).decode()})
        document = body.document(data, result.images[0], result.seed, int(time.time()))
        return json.dumps(document).encode()

    async def _stream(self, session: Session, send: Send) -> None:
        head = Response(
            headers={
                **timing_headers(session.timings),
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            },
            media_type="text/event-stream",
        )
        del head.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": head.raw_headers})
        try:
            await self._send_events(session, send)
        except Exception as error:
            # The status is sent already: the stream itself must tell.
            request = self._request
            expected = isinstance(error, EngineError)
            logger.error("stream %s failed: %s", request.request_id, error, exc_info=not expected)
            frame = Failure.of(error).frame(request.operation, request.request_id)
            await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})

    async def _send_events(self, session: Session, send: Send) -> None:
        body, result = self._body_asked, None
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, PartialImage):
                    b64_json = await asyncio.to_thread(self._encode, event.image)
                    document = body.partial_event(
                        b64_json, event.image, event.index, int(time.time())
                    )
                    await _send_event(send, document)
                elif isinstance(event, ImageResult):
                    result = event
        if result is None:
            raise RuntimeFailed("The model gave no image.")
        for index, image in enumerate(result.images):
            b64_json = await asyncio.to_thread(self._encode, image)
            document = body.completed_event(b64_json, image, result.seed + index, int(time.time()))
            await _send_event(send, document)

    def _encode(self, image: Image) -> str:
        body = self._body_asked
        encoded = encode_picture(image, body.output_format, body.output_compression)
        return base64.b64encode(encoded).decode()


async def _send_event(send: Send, document: dict[str, Any]) -> None:
    text = f"event: {document['type']}\ndata: {json.dumps(document)}\n\n"
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
