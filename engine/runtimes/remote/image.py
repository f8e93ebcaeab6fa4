"""Images from a provider: generations, edits and variations."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageOps

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Event, ImageResult
from engine.requests import ImageOperation, ImageRequest, Quality
from engine.runtimes.remote.counts import token_count
from engine.runtimes.remote.failures import garbage
from engine.runtimes.remote.fields import extra_fields
from engine.runtimes.remote.options import RemoteOptions
from engine.runtimes.remote.provider import Call, Provider
from engine.runtimes.remote.reply import Reply
from engine.runtimes.remote.target import Target
from engine.usage import Usage

PATHS = {
    ImageOperation.GENERATION: "/images/generations",
    ImageOperation.EDIT: "/images/edits",
    ImageOperation.VARIATION: "/images/variations",
}

MOST_PIXELS = 2**26
"""Of one image of an answer."""

READABLE = ("PNG", "JPEG", "WEBP")

ALWAYS_BASE64 = ("gpt-image", "chatgpt-image")
"""Names that begin so are models that answer base64 and refuse `response_format`."""

DALL_E_QUALITIES = {Quality.LOW: "standard", Quality.MEDIUM: "standard", Quality.HIGH: "hd"}


@dataclass(frozen=True, slots=True)
class ImageCall:
    """An image request for a provider."""

    path: str
    fields: Mapping[str, Any]
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None


def prepare_image(model: ModelConfig, request: ImageRequest, options: RemoteOptions) -> ImageCall:
    """The fields for the provider.

    Raises:
        InvalidRequest: naming a field that the provider does not take.

    """
    for name, given in (
        ("loras", request.loras),
        ("control_image", request.control_image),
        ("reference_image", request.reference_image),
        ("partial_images", request.partial_images),
    ):
        if given:
            raise InvalidRequest(f"{name}: the model {model.id!r} does not take it.", param=name)
    fields: dict[str, Any] = {"model": options.model, "n": request.n}
    if request.operation is not ImageOperation.VARIATION:
        fields["prompt"] = request.prompt
    if request.width is not None and request.height is not None:
        fields["size"] = f"{request.width}x{request.height}"
    if request.quality is not Quality.AUTO:
        dall_e = options.model.startswith("dall-e")
        quality = DALL_E_QUALITIES[request.quality] if dall_e else request.quality.value
        fields["quality"] = quality
    if not options.model.rpartition("/")[2].startswith(ALWAYS_BASE64):
        fields["response_format"] = "b64_json"
    fields |= extra_fields(
        model.id,
        options,
        {
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "seed": request.seed,
            "strength": request.strength,
        },
    )
    return ImageCall(PATHS[request.operation], fields, request.images, request.mask)


async def run_image(
    provider: Provider, target: Target, request: ImageRequest, call: ImageCall, usage: Usage
) -> AsyncGenerator[Event, None]:
    """The finished images.

    Raises:
        EngineError: see `Provider.answer`.

    """
    body: dict[str, Any]
    if request.operation is ImageOperation.GENERATION:
        body = {"json": json.dumps(call.fields).encode()}
    else:
        files = await asyncio.to_thread(_files, call, request.operation)
        body = {"form": {name: str(value) for name, value in call.fields.items()}, "files": files}
    sent = Call(
        target=target,
        path=call.path,
        kind=request.operation.value,
        request_id=request.request_id,
        **body,
    )

    async def images_of(reply: Reply) -> tuple[dict[str, Any], list[Any]]:
        document = await reply.document()
        data = document.get("data")
        if not isinstance(data, list) or not data:
            raise garbage(provider.name, "no images")
        return document, data

    async with await provider.answer(sent, images_of) as answer:
        document, data = answer.first
    images = []
    for item in data:
        raw = await _bytes_of(provider, target, request, item)
        image = await asyncio.to_thread(_decoded, raw)
        if image is None:
            raise garbage(provider.name, "an image that cannot be read")
        images.append(image)
    usage.images = len(images)
    usage.pixels = images[0].width * images[0].height
    _count_tokens(document.get("usage"), usage)
    seed = document.get("seed", request.seed)
    known = isinstance(seed, int) and not isinstance(seed, bool)
    yield ImageResult(tuple(images), seed if known else None)


def _count_tokens(counts: Any, usage: Usage) -> None:
    if isinstance(counts, Mapping):
        for name in ("input_tokens", "output_tokens"):
            setattr(usage, name, token_count(counts.get(name)) or 0)


def _files(call: ImageCall, operation: ImageOperation) -> list[tuple[str, tuple[str, bytes, str]]]:
    several = operation is ImageOperation.EDIT and len(call.images) > 1
    name = "image[]" if several else "image"
    files = [
        (name, (f"image-{index}.png", _png(image), "image/png"))
        for index, image in enumerate(call.images)
    ]
    if call.mask is not None:
        # OpenAI's masks are transparent where the image is painted anew.
        mask = call.images[0].convert("RGBA")
        mask.putalpha(ImageOps.invert(call.mask.convert("L")))
        files.append(("mask", ("mask.png", _png(mask), "image/png")))
    return files


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


async def _bytes_of(provider: Provider, target: Target, request: ImageRequest, item: Any) -> bytes:
    """The file of one image of an answer.

    Raises:
        ProviderFailed: there is none, or it is at a host that may not be asked.

    """
    encoded = item.get("b64_json") if isinstance(item, Mapping) else None
    url = item.get("url") if isinstance(item, Mapping) else None
    if not isinstance(encoded, str) and isinstance(url, str) and url.startswith("data:"):
        encoded = url.partition(",")[2]
    if isinstance(encoded, str):
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise garbage(provider.name, "an image that is not base64") from None
    if not isinstance(url, str):
        raise garbage(provider.name, "no images")
    return await fetch(provider, target, url, request.request_id)


async def fetch(provider: Provider, target: Target, url: str, request_id: str) -> bytes:
    """A file that an answer names, of the provider's own host or one that `media_hosts` names.

    Raises:
        ProviderFailed: its host may not be asked, or did not answer.

    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise garbage(provider.name, "an image at what is no URL") from None
    own = target.is_own(host) and f"{parts.scheme}://{parts.netloc}" == target.address.origin
    named = host in target.options.media_hosts and port is None and parts.scheme == "https"
    if not (own or named) or not url.isprintable() or "\\" in url or "@" in parts.netloc:
        raise garbage(
            provider.name, f"an image at {host}, which the option 'media_hosts' does not name"
        )
    call = Call(target=target, path=url, kind="file", request_id=request_id)

    async def whole(reply: Reply) -> bytes:
        return await reply.whole()

    async with await provider.answer(call, whole) as answer:
        return answer.first


def _decoded(raw: bytes) -> Image.Image | None:
    """The picture; None if it is none, or too large."""
    try:
        image = Image.open(io.BytesIO(raw), formats=READABLE)
        if image.width * image.height > MOST_PIXELS:
            return None
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception:  # decoders fail in a dozen ways on bytes that are no picture
        return None
