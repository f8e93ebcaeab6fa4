"""Images and sound in results, and those that a caller names."""

from __future__ import annotations

import asyncio
import base64
import binascii
import mimetypes
from io import BytesIO
from typing import TYPE_CHECKING

from mcp_types import AudioContent, ContentBlock, ImageContent, ResourceLink
from PIL import Image

from engine.errors import NotFound
from server.mcp.tool import Call, ToolFailure

if TYPE_CHECKING:
    from engine.media.outputs import Outputs

MAX_INLINE_BYTES = 600 * 2**10
"""Bytes of images and sound in one result. Official clients take messages of 1 MiB by default."""

_PREVIEW_QUALITY = 85

LINK_ONLY = {
    "type": "boolean",
    "default": False,
    "description": "Return links to the files alone, without their content.",
}
FILE_FORMS = "as base64, as a data: URL, or as the URL of a file that a tool of this server made"


def link_to(url: str, title: str, nbytes: int | None = None) -> ResourceLink:
    """A link to a file behind a URL."""
    kind = mimetypes.guess_type(url)[0]
    name = url.rpartition("/")[2]
    return ResourceLink(uri=url, name=name, title=title, mime_type=kind, size=nbytes)


async def image_contents(call: Call, urls: list[str]) -> list[ContentBlock]:
    """The images behind URLs of this server, and a link to each."""
    files = [await kept_file(call, url) for url in urls]
    links: list[ContentBlock] = [
        link_to(url, f"Image {number}", len(data))
        for number, (url, data) in enumerate(zip(urls, files, strict=True), start=1)
    ]
    if call.arguments.get("link_only"):
        return links
    share = MAX_INLINE_BYTES // len(files)
    shown = [await asyncio.to_thread(shown_image, data, share) for data in files]
    return [*shown, *links]


def shown_image(data: bytes, max_bytes: int) -> ImageContent:
    """An image as content. One that is too long is a JPEG in its place, smaller if need be."""
    with Image.open(BytesIO(data)) as image:
        kind = Image.MIME[image.format or "PNG"]
        if len(data) > max_bytes:
            kind = Image.MIME["JPEG"]
            picture = image.convert("RGB")
            while len(data) > max_bytes:
                file = BytesIO()
                picture.save(file, "JPEG", quality=_PREVIEW_QUALITY)
                data = file.getvalue()
                picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))
    return ImageContent(data=base64.b64encode(data).decode(), mime_type=kind)


def sound_contents(call: Call, url: str, audio: bytes, media_type: str) -> list[ContentBlock]:
    """Sound, unless it is too long, and a link to its file."""
    link = link_to(url, "Speech", len(audio))
    if call.arguments.get("link_only") or len(audio) > MAX_INLINE_BYTES:
        return [link]
    data = base64.b64encode(audio).decode()
    return [AudioContent(data=data, mime_type=media_type), link]


async def keep(outputs: Outputs, data: bytes, suffix: str, files_url: str) -> str:
    """Keep a file; returns its URL."""
    return files_url + await asyncio.to_thread(outputs.put, data, suffix)


async def kept_file(call: Call, url: str) -> bytes:
    """The file of this server behind a URL.

    Raises:
        ToolFailure: there is none.

    """
    name = url.rpartition("/")[2]
    try:
        path = await asyncio.to_thread(call.outputs.path, name)
        return await asyncio.to_thread(path.read_bytes)
    except (NotFound, FileNotFoundError) as error:
        raise ToolFailure(f"There is no file {name[:80]}, or it has expired.") from error


async def given_file(call: Call, name: str) -> bytes:
    """The bytes of an argument that is a file, in one of the `FILE_FORMS`.

    Raises:
        ToolFailure: it is in none of them.

    """
    value = call.arguments.get(name)
    if not isinstance(value, str) or not value:
        raise ToolFailure(f"{name}: it is a file, {FILE_FORMS}.")
    if value.startswith(("http://", "https://")):
        if "/v1/images/files/" not in value:
            raise ToolFailure(f"{name}: this server fetches no URLs. Give it {FILE_FORMS}.")
        return await kept_file(call, value)
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ToolFailure(f"{name}: it is no base64. Give it {FILE_FORMS}.") from error
