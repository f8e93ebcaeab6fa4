"""OpenAI's image endpoints, and the files behind their URLs."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request, Response
from PIL.Image import Image

from engine.errors import RuntimeFailed
from engine.events import Event, Frame, ImageResult, PartialImage
from server.answer import stream_answer, whole_answer
from server.auth import IMAGE_FILES_PREFIX
from server.connection import ConnectedResponse
from server.file_answer import FileAnswer
from server.forms import read_fields
from server.image_io import Picture, decode_pictures, encode_picture
from server.public_address import base_url
from server.response_cache.cache import Answer, ResponseCache, cached
from server.router import Router
from server.schemas.images import EditBody, GenerationBody, ImageBody, VariationBody
from server.schemas.scheduling_options import take_scheduling_options
from server.settings import ServerSettings
from server.sse import event_frame

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.outputs import Outputs
    from engine.session import Session

_PATHS: dict[str, type[ImageBody]] = {
    "/v1/images/generations": GenerationBody,
    "/v1/images/edits": EditBody,
    "/v1/images/variations": VariationBody,
}


def images_router(
    engine: Engine,
    outputs: Outputs,
    settings: ServerSettings,
    cache: ResponseCache | None = None,
) -> Router:
    """Generations, edits and variations, from JSON or forms; `GET /v1/images/files/{name}`."""
    router = Router("images")

    def add(path: str, kind: type[ImageBody]) -> None:
        async def endpoint(request: Request) -> Response:
            fields = await read_fields(request, settings.max_body_bytes)
            scheduling = take_scheduling_options(request, fields)
            body = kind.of(fields)
            pictures: list[Picture] = []
            if uploads := body.uploads():
                pictures = await asyncio.to_thread(
                    decode_pictures, uploads, settings.max_image_pixels
                )
            image_request = body.to_request(
                pictures, request_id=request.state.request_id, scheduling=scheduling
            )
            answer = _Answer(body, outputs, f"{base_url(request, settings)}{IMAGE_FILES_PREFIX}")
            if body.stream:
                send: Answer = partial(stream_answer, engine, image_request, answer.frames)
            else:
                send = lambda _: whole_answer(engine, image_request, answer.document)  # noqa: E731
            # An image behind a URL is deleted some day, so an answer with one is not kept.
            keeps = not body.answers_with_url
            return ConnectedResponse(
                cached(cache, request, fields, image_request, send, keeps=keeps)
            )

        router.add(path, endpoint, ["POST"], name=kind.operation.value)

    for path, kind in _PATHS.items():
        add(path, kind)

    @router.route(IMAGE_FILES_PREFIX + "{name}", "GET", "HEAD")
    async def image_file(name: str) -> Response:
        path = await asyncio.to_thread(outputs.path, name)
        return FileAnswer(path, headers={"cache-control": "private"})

    return router


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to one request, as a document or as events."""

    body: ImageBody
    outputs: Outputs
    files_url: str
    """The URL of an image file without its name."""

    async def document(self, events: Sequence[Event]) -> Response:
        """OpenAI's ImagesResponse.

        Raises:
            RuntimeFailed: the model gave no image.

        """
        content = await asyncio.to_thread(self._render, _result(events))
        return Response(content, media_type="application/json")

    def _render(self, result: ImageResult) -> bytes:
        data = []
        for image in result.images:
            encoded = self._encode(image)
            if self.body.answers_with_url:
                name = self.outputs.put(encoded, f".{self.body.output_format}")
                data.append({"url": f"{self.files_url}{name}"})
            else:
                data.append({"b64_json": base64.b64encode(encoded).decode()})
        document = self.body.document(data, result.images[0], result.seed, int(time.time()))
        return json.dumps(document).encode()

    async def frames(self, session: Session) -> AsyncGenerator[Frame, None]:
        """Previews, then each image.

        Raises:
            RuntimeFailed: the model gave no image.

        """
        yield Frame("")  # it runs: the response begins, though its first event may take minutes
        body, results = self.body, []
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, PartialImage):
                    b64_json = await asyncio.to_thread(self._base64, event.image)
                    document = body.partial_event(
                        b64_json, event.image, event.index, int(time.time())
                    )
                    yield event_frame(document)
                else:
                    results.append(event)
        result = _result(results)
        for index, image in enumerate(result.images):
            b64_json = await asyncio.to_thread(self._base64, image)
            seed = None if result.seed is None else result.seed + index
            document = body.completed_event(b64_json, image, seed, int(time.time()))
            yield event_frame(document)

    def _base64(self, image: Image) -> str:
        return base64.b64encode(self._encode(image)).decode()

    def _encode(self, image: Image) -> bytes:
        return encode_picture(image, self.body.output_format, self.body.output_compression)


def _result(events: Sequence[Event]) -> ImageResult:
    results = [event for event in events if isinstance(event, ImageResult)]
    if not results:
        raise RuntimeFailed("The model gave no image.")
    return results[-1]
