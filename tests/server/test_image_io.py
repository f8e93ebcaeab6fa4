"""Decoding what strangers send, and encoding what models made."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops

from engine.errors import InvalidRequest
from server.image_io import Picture, PictureFormat, Upload, decode_pictures, encode_picture

MAX_PIXELS = 2**25
RED = (255, 0, 0)
WHITE = (255, 255, 255)


def file_of(image: Image.Image, picture_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, picture_format, **options)
    return buffer.getvalue()


def blank_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, written without ever being in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def decode(content: bytes | str, max_pixels: int = MAX_PIXELS) -> Picture:
    (picture,) = decode_pictures([Upload("image", content)], max_pixels)
    return picture


def refusal(content: bytes | str, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(content, max_pixels)
    assert (caught.value.param, caught.value.status) == ("image", 400)
    return caught.value.message


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(picture_format: str) -> None:
    picture = decode(file_of(Image.new("RGB", (8, 6), RED), picture_format))
    assert (picture.rgb.mode, picture.rgb.size, picture.alpha) == ("RGB", (8, 6), None)
    off_by = ImageChops.difference(picture.rgb, Image.new("RGB", (8, 6), RED))
    assert all(max(level) < 5 for level in np.asarray(off_by).reshape(-1, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_become_rgb(mode: str) -> None:
    picture_format = "JPEG" if mode == "CMYK" else "PNG"
    picture = decode(file_of(Image.new("RGB", (4, 4), WHITE).convert(mode), picture_format))
    assert picture.rgb.mode == "RGB"
    assert picture.rgb.getpixel((0, 0)) == WHITE
    assert picture.alpha is None, "it is opaque"


def test_sixteen_bits_of_grey_keep_their_shades() -> None:
    image = Image.new("I;16", (3, 1))
    for x, level in enumerate((0, 32_768, 65_535)):
        image.putpixel((x, 0), level)
    rgb = decode(file_of(image)).rgb
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (127,) * 3, (255,) * 3]


def test_a_photograph_is_turned_upright() -> None:
    image = Image.new("RGB", (8, 4), WHITE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode(file_of(image, "JPEG", exif=exif)).rgb.size == (4, 8)


def test_transparency_lies_over_white_and_is_kept() -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    picture = decode(file_of(image))
    assert [picture.rgb.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]
    assert picture.alpha is not None
    assert [picture.alpha.getpixel((x, 0)) for x in range(2)] == [255, 0]
    assert [picture.mask.getpixel((x, 0)) for x in range(2)] == [0, 255]


def test_an_opaque_mask_is_read_by_its_grey() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (*WHITE, 255))
    mask = decode(file_of(image)).mask
    assert (mask.mode, [mask.getpixel((x, 0)) for x in range(2)]) == ("L", [0, 255])


def test_what_lies_behind_a_photograph_is_passed_over() -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (4, 4), WHITE)
    raw = file_of(first, "MPO", save_all=True, append_images=[second])
    assert decode(raw).rgb.size == (8, 8)


@pytest.mark.parametrize("picture_format", ["GIF", "WEBP", "PNG"])
def test_animation_is_refused(picture_format: str) -> None:
    frames = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100, 200)]
    raw = file_of(frames[0], picture_format, save_all=True, append_images=frames[1:])
    assert "animated" in refusal(raw)


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_without_its_last_bytes_is_refused(picture_format: str) -> None:
    raw = file_of(Image.new("RGB", (64, 64), RED), picture_format)
    decode(raw + b"more")
    for count in (1, 2, 4, 12, 16):
        assert "cannot be read" in refusal(raw[:-count])


def cut_short(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_file_is_refused(picture_format: str) -> None:
    image = Image.effect_noise((64, 64), 100)
    assert "cannot be read" in refusal(cut_short(file_of(image, picture_format)))


@pytest.mark.parametrize(
    "raw",
    [
        b"hello, I am no picture",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        file_of(Image.new("RGB", (2, 2)), "BMP"),
        file_of(Image.new("RGB", (2, 2)), "TIFF"),
    ],
)
def test_what_is_no_picture_is_refused(raw: bytes) -> None:
    assert "cannot be read" in refusal(raw)


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_bytes_never_get_further(picture_format: str) -> None:
    raw = file_of(Image.effect_noise((16, 16), 100), picture_format)
    for position in range(0, len(raw), 7):
        damaged = raw[:position] + bytes([raw[position] ^ 0xFF]) + raw[position + 1 :]
        try:
            picture = decode(damaged, max_pixels=2**20)
        except InvalidRequest:
            continue
        assert picture.rgb.mode == "RGB"


def test_empty_file_is_refused() -> None:
    assert "empty" in refusal(b"")


def test_size_is_looked_at_before_anything_is_decoded() -> None:
    # Cut short, it fails as soon as it is decoded: that it fails by its size shows the order.
    raw = cut_short(file_of(Image.effect_noise((64, 64), 100)))
    assert "64x64" in refusal(raw, max_pixels=64 * 64 - 1)
    assert "cannot be read" in refusal(raw, max_pixels=64 * 64)


def test_pictures_of_a_request_share_the_limit() -> None:
    raw = blank_png(10, 10)
    uploads = [Upload(f"image[{index}]", raw) for index in range(3)]
    assert len(decode_pictures(uploads, 300)) == 3
    with pytest.raises(InvalidRequest) as caught:
        decode_pictures(uploads, 299)
    assert caught.value.param == "image[2]"


def test_text() -> None:
    raw = file_of(Image.new("RGB", (2, 2), RED))
    plain = base64.b64encode(raw).decode()
    broken = base64.encodebytes(raw).decode()
    for text in (plain, broken, f"data:image/png;base64,{plain}", f"DATA:;base64,{plain}"):
        assert decode(text).rgb.getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://169.254.169.254/latest", "does not fetch"),
        ("HTTPS://example.com/a.png", "does not fetch"),
        ("data:image/png,abc", "must be base64"),
        ("file:///etc/passwd", "neither"),
        ("ä", "neither"),
        ("abcde", "neither"),
        ("", "empty"),
        ("data:;base64,", "empty"),
    ],
)
def test_text_that_is_no_picture_is_refused(text: str, reason: str) -> None:
    assert reason in refusal(text)


@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
def test_encoding(picture_format: PictureFormat) -> None:
    noise = Image.effect_noise((64, 48), 100).convert("RGB")
    best = encode_picture(noise, picture_format)
    with Image.open(io.BytesIO(best)) as image:
        assert (image.format, image.size) == (picture_format.upper(), (64, 48))
    if picture_format != "png":
        assert len(encode_picture(noise, picture_format, 10)) < len(best) / 2
        assert encode_picture(noise, picture_format, 100) == best
    else:
        assert decode(best).rgb.tobytes() == noise.tobytes()
