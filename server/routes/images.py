"""OpenAI's image endpoints, and the files that their URLs name."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from PIL.Image import Image
from starlette.types import Receive, Scope, Send

from engine.errors import RuntimeFailed
from engine.events import Frame, ImageResult, PartialImage
from engine.requests import ImageRequest
from server.auth import IMAGE_FILES_PREFIX
from server.connection import run_while_connected
from server.forms import read_fields
from server.headers import answer_headers
from server.image_io import Picture, decode_pictures, encode_picture
from server.schemas.images import EditBody, GenerationBody, ImageBody, VariationBody
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import event_frame, stream_answer

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.outputs import Outputs
    from engine.session import Session

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
            fields = await read_fields(request, settings.max_body_bytes)
            scheduling = take_scheduling_options(request.headers, fields)
            body = kind.of(fields)
            pictures: list[Picture] = []
            if uploads := body.uploads():
                pictures = await asyncio.to_thread(
                    decode_pictures, uploads, settings.max_image_pixels
                )
            image_request = body.to_request(
                pictures, request_id=request.state.request_id, scheduling=scheduling
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
        if self._body_asked.stream:
            await stream_answer(self._engine, self._request, self._frames, send)
        else:
            await self._send_document(scope, receive, send)

    async def _send_document(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await self._engine.open(self._request)
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
        content = await asyncio.to_thread(self._render, result)
        headers = answer_headers(session, ran_ms)
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

    async def _frames(self, session: Session) -> AsyncGenerator[Frame, None]:
        yield Frame("")  # it runs: the response begins, though its first event may take minutes
        body, result = self._body_asked, None
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, PartialImage):
                    b64_json = await asyncio.to_thread(self._encode, event.image)
                    document = body.partial_event(
                        b64_json, event.image, event.index, int(time.time())
                    )
                    yield event_frame(document)
                elif isinstance(event, ImageResult):
                    result = event
        if result is None:
            raise RuntimeFailed("The model gave no image.")
        for index, image in enumerate(result.images):
            b64_json = await asyncio.to_thread(self._encode, image)
            document = body.completed_event(b64_json, image, result.seed + index, int(time.time()))
            yield event_frame(document)

    def _encode(self, image: Image) -> str:
        body = self._body_asked
        encoded = encode_picture(image, body.output_format, body.output_compression)
        return base64.b64encode(encoded).decode()
