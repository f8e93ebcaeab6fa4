"""The pictures of text requests: fetched, looked at within limits, and made what a model may read.

After that each picture stands in its request as a file in base64: whole, upright, not animated,
and opaque. All slow work is on threads.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.errors import InvalidRequest, ModelNotFound
from engine.media.attachments import Attachment, Kind, attachments
from engine.words import echoed
from server.image_io import Upload, decode_pictures, encode_picture
from server.picture_fetch import PictureFetcher, too_many_bytes
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.requests import TextRequest

DETAILS = ("auto", "low", "high", "original")
LOW_PIXELS = 512
"""The longer side of a picture with `detail: low`, as OpenAI has it."""
DECODED_AT_ONCE = 2
"""Requests whose pictures are decoded at a time: each may hold `max_image_pixels`."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A picture in a request, with the text that stands for it."""

    attachment: Attachment
    content: str
    """A URL, also a `data:` URL, or base64 alone."""
    low: bool

    @property
    def param(self) -> str:
        return self.attachment.param


class Pictures:
    """Reads the pictures of text requests. `close` it."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._fetcher = PictureFetcher(settings)
        self._turn = asyncio.Semaphore(DECODED_AT_ONCE)
        # It would write each URL to the log, and whoever has a URL may be able to read it.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    async def settle(self, request: TextRequest) -> None:
        """Read the pictures of a request, and put them back into its body as the model reads them.

        A request that only a provider can answer is left as it is.

        Raises:
            InvalidRequest: naming the field: the model takes none, there are too many, or one is
                not a whole picture.

        """
        found = [each for each in attachments(request.body)]
        if not found or self._is_remote(request.model):
            return
        self._check_taken(request.model, found)
        pictures = [_read(each) for each in found if each.kind is Kind.IMAGE]
        if not pictures:
            return
        most = self._settings.max_images
        if len(pictures) > most:
            param = pictures[most].param
            raise InvalidRequest(
                f"{param}: a request may have {most} pictures (server.max_images).", param=param
            )
        uploads = await self._uploads(pictures)
        async with self._turn:
            files = await asyncio.to_thread(self._files, pictures, uploads)
        for picture, (media_type, content) in zip(pictures, files, strict=True):
            _put_back(picture.attachment, media_type, content)

    async def close(self) -> None:
        """Close all connections."""
        await self._fetcher.close()

    def _is_remote(self, name: str) -> bool:
        engine = self._engine
        if name in engine.router:
            return False
        try:
            model, _ = engine.config.find_adapter(name)
        except ModelNotFound:
            return True  # the engine says so
        return model.runtime == "remote" and not model.fallbacks

    def _check_taken(self, name: str, found: Sequence[Attachment]) -> None:
        taken = self._engine.inputs(name)
        for each in found if taken is not None else ():
            if each.kind.value not in (taken or ()):
                only = ", only text" if len(taken or ()) == 1 else ""
                raise InvalidRequest(
                    f"{each.param}: the model {name!r} takes no {each.kind.value}{only}.",
                    param=each.param,
                )

    async def _uploads(self, pictures: Sequence[_Found]) -> list[Upload]:
        """The files of the pictures. Those behind URLs are fetched beside each other."""
        remote = [each for each in pictures if _is_url(each.content)]
        fetched: dict[int, bytes] = {}
        left = self._settings.max_body_bytes

        async def fetch(picture: _Found) -> None:
            nonlocal left
            content = await self._fetcher.fetch(picture.content, picture.param)
            left -= len(content)
            if left < 0:
                raise InvalidRequest(
                    f"{picture.param}: the pictures behind URLs are larger together than a request"
                    " may be (server.max_body_bytes).",
                    param=picture.param,
                )
            fetched[id(picture)] = content

        try:
            async with asyncio.TaskGroup() as group:
                for each in remote:
                    group.create_task(fetch(each))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [
            Upload(each.param, fetched[id(each)] if _is_url(each.content) else each.content)
            for each in pictures
        ]

    def _files(
        self, pictures: Sequence[_Found], uploads: Sequence[Upload]
    ) -> list[tuple[str, str]]:
        """Media type and base64 of each picture."""
        most = self._settings.max_image_bytes
        for upload in uploads:
            if isinstance(upload.content, str) and len(upload.content) * 3 // 4 > most + 256:
                raise too_many_bytes(upload.param, most)
        decoded = decode_pictures(uploads, self._settings.max_image_pixels)
        files = []
        for found, upload, picture in zip(pictures, uploads, decoded, strict=True):
            image = picture.rgb
            shrunk = found.low and max(image.size) > LOW_PIXELS
            if shrunk:
                image.thumbnail((LOW_PIXELS, LOW_PIXELS), Image.Resampling.LANCZOS)
            if picture.media_type is None or shrunk:
                content: bytes | str = encode_picture(image, "png")
                media_type = "image/png"
            else:
                content, media_type = upload.content, picture.media_type
            if isinstance(content, bytes):
                content = base64.b64encode(content).decode()
            elif content[:5].lower() == "data:":
                content = content.partition(",")[2]
            files.append((media_type, "".join(content.split())))
        return files


def _read(attachment: Attachment) -> _Found:
    """The picture of a part.

    Raises:
        InvalidRequest: naming what is missing or unknown.

    """
    part, param = attachment.part, attachment.param
    value = part.get(attachment.field)
    detail, named = part.get("detail"), f"{attachment.place}.detail"
    content: Any = value
    if attachment.field == "source" and isinstance(value, dict):
        content = value.get("url") if value.get("type") == "url" else value.get("data")
        if value.get("type") not in ("url", "base64"):
            raise InvalidRequest(
                f"{param}.type: {echoed(value.get('type'))} is none of 'base64', 'url';"
                " pictures are not read from stored files.",
                param=f"{param}.type",
            )
    elif isinstance(value, dict):
        content = value.get("url")
        if "detail" in value:
            detail, named = value["detail"], f"{param}.detail"
    if detail is not None and detail not in DETAILS:
        known = ", ".join(map(repr, DETAILS))
        raise InvalidRequest(f"{named}: {echoed(detail)} is none of {known}.", param=named)
    if part.get("file_id") is not None:
        place = f"{attachment.place}.file_id"
        raise InvalidRequest(
            f"{place}: pictures are not read from stored files; send a data: URL as image_url.",
            param=place,
        )
    if not isinstance(content, str) or not content:
        raise InvalidRequest(f"{param}: the picture is missing.", param=param)
    return _Found(attachment, content, detail == "low")


def _put_back(attachment: Attachment, media_type: str, content: str) -> None:
    part, value = attachment.part, attachment.part.get(attachment.field)
    url = f"data:{media_type};base64,{content}"
    if attachment.field == "source" and isinstance(value, dict):
        part["source"] = {"type": "base64", "media_type": media_type, "data": content}
    elif isinstance(value, dict):
        value["url"] = url
        value.pop("detail", None)  # it was followed
    elif part.get("type") == "image_url":
        part[attachment.field] = {"url": url}  # some clients write the URL alone
        part.pop("detail", None)
    else:
        part[attachment.field] = url
        if "type" in part:
            part["detail"] = "auto"  # vLLM wants it in the output of a tool


def _is_url(content: str) -> bool:
    return content[:8].lower().startswith(("http://", "https://"))
