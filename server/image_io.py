"""Pictures on the wire: decodes uploads within limits, and encodes the images of models.

All of it is slow work for a thread. None of it belongs on the event loop.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from PIL import Image, ImageFile, ImageOps

from engine.errors import InvalidRequest

PictureFormat: TypeAlias = Literal["png", "jpeg", "webp"]
"""The formats of results."""

PNG_LEVEL = 1
"""Every level is lossless. A photograph of 1024x1024 takes 115 ms, and 165 ms with zlib's usual 6.
That file is a tenth smaller, which pays only below 30 Mbit/s."""

_ENDS = {"PNG": b"IEND\xaeB`\x82", "GIF": b"\0;"}
"""What is in each whole file of a format. Pillow takes a picture without it in silence."""

_PLAIN_MODES = ("RGB", "L")
_MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "WEBP": "image/webp",
}

_READABLE = ("PNG", "JPEG", "WEBP", "GIF")
"""Pillow reads some fifty formats. Clients should reach as few decoders as possible."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An undecoded picture: the bytes of a file, or a `data:` URL, or plain base64."""

    param: str
    """The field of the request that has it."""
    content: bytes | str


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture, upright."""

    rgb: Image.Image
    """RGB, laid over white where it is transparent."""
    alpha: Image.Image | None
    """Greyscale, 0 where it is transparent; None if it is opaque everywhere."""
    media_type: str | None = None
    """That of its file, if a reader that follows EXIF sees the same in it as here."""

    @property
    def mask(self) -> Image.Image:
        """Greyscale. White is to be repainted: what is transparent, otherwise what is white."""
        return ImageOps.invert(self.alpha) if self.alpha is not None else self.rgb.convert("L")


def decode_pictures(uploads: Sequence[Upload], max_pixels: int) -> list[Picture]:
    """Decode the pictures of one request, which together may have `max_pixels` pixels.

    All headers are read before any picture is decoded. So a file of some kilobytes that would
    unfold to gigabytes costs nothing.

    Raises:
        InvalidRequest: naming the field: not a picture, not whole, animated, or too large.

    """
    opened = [_open(upload) for upload in uploads]
    pixels = 0
    for upload, image in zip(uploads, opened, strict=True):
        pixels += image.width * image.height
        if pixels > max_pixels:
            raise _too_large(upload, f"{image.width}x{image.height}", max_pixels)
    return [_decode(upload, image) for upload, image in zip(uploads, opened, strict=True)]


def encode_picture(
    image: Image.Image, picture_format: PictureFormat, quality: int | None = None
) -> bytes:
    """The image as a file. Lossy formats have a `quality` of 0 to 100, by default 100."""
    buffer = io.BytesIO()
    if picture_format == "png":
        image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    else:
        image.save(buffer, picture_format.upper(), quality=100 if quality is None else quality)
    return buffer.getvalue()


def _open(upload: Upload) -> ImageFile.ImageFile:
    content = upload.content
    raw = _from_text(upload, content) if isinstance(content, str) else content
    if not raw:
        raise InvalidRequest("The picture is empty.", param=upload.param)
    try:
        image = Image.open(io.BytesIO(raw), formats=_READABLE)
        # An MPO is a photograph with a depth map or a smaller copy behind it, for example.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest(f"The picture is too large: {error}", param=upload.param) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders fail in a dozen ways on bytes that are not a picture
        raise _unreadable(upload) from error
    if animated:
        raise InvalidRequest("The picture must not be animated.", param=upload.param)
    return image


def _decode(upload: Upload, image: ImageFile.ImageFile) -> Picture:
    assert isinstance(image.fp, io.BytesIO)
    if _ENDS.get(image.format or "", b"") not in image.fp.getvalue():
        raise _unreadable(upload)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
        rgb = _scaled_to_8_bits(upright).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above: the bytes cause every error
        raise _unreadable(upload) from error
    if alpha is None or alpha.getextrema()[0] == 255:
        plain = alpha is None and image.mode in _PLAIN_MODES
        return Picture(rgb, None, _MEDIA_TYPES.get(image.format or "") if plain else None)
    over_white = Image.new("RGB", rgb.size, "white")
    over_white.paste(rgb, mask=alpha)
    return Picture(over_white, alpha)


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    # Pillow clips when it converts grey from 16 to 8 bits, and a depth map would become white.
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda level: level * (1 / 257)).convert("L")


def _from_text(upload: Upload, text: str) -> bytes:
    encoded = text
    if text[:5].lower() == "data:":
        head, _, encoded = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidRequest("The data: URL must be base64.", param=upload.param)
    elif text[:8].lower().startswith(("http://", "https://")):
        raise InvalidRequest(
            "Pictures must be given as a data: URL, base64 or an uploaded file;"
            " this server does not fetch other URLs.",
            param=upload.param,
        )
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            "The picture is neither a data: URL nor base64.", param=upload.param
        ) from error


def _unreadable(upload: Upload) -> InvalidRequest:
    return InvalidRequest(
        "The picture cannot be read: it must be a whole PNG, JPEG, WebP or GIF.",
        param=upload.param,
    )


def _too_large(upload: Upload, size: str, max_pixels: int) -> InvalidRequest:
    return InvalidRequest(
        f"The picture of {size} is too large: those of one request may have"
        f" {max_pixels} pixels together.",
        param=upload.param,
    )
