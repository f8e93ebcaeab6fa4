"""Video files, probed with the library that browsers' decoders are tested against."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from engine.events import Frames
from engine.media.mp4 import THUMBNAIL_PX, write_mp4, write_thumbnail


def moving(count: int, height: int, width: int) -> Frames:
    """Colours that move, so that frames out of order or channels mixed up show."""
    down, right = np.mgrid[0:height, 0:width]
    frames = [
        np.stack(
            (255 * right / width, 255 * down / height, np.full_like(down, 255 * index / count)), -1
        )
        for index in range(count)
    ]
    return np.asarray(frames).astype(np.uint8)


def psnr_db(one: Frames, other: Frames) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize(
    ("count", "height", "width", "fps"), [(25, 64, 96, 7), (1, 48, 32, 30), (49, 40, 64, 24)]
)
def test_the_file_is_what_was_asked(
    tmp_path: Path, count: int, height: int, width: int, fps: int
) -> None:
    path = tmp_path / "video.part"
    frames = moving(count, height, width)
    write_mp4(path, frames, fps)
    with av.open(str(path)) as container:
        assert "mp4" in container.format.name
        (stream,) = container.streams
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == (width, height)
        assert (stream.average_rate, stream.frames) == (fps, count)
        assert stream.duration * stream.time_base == Fraction(count, fps)
        tags = (context.color_primaries, context.color_trc, context.colorspace)
        assert (*tags, context.color_range) == (1, 1, 1, 1)  # BT.709 thrice, limited range
        decoded = list(container.decode(stream))
    assert [frame.pts * frame.time_base for frame in decoded] == [
        Fraction(index, fps) for index in range(count)
    ]
    shown = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert psnr_db(frames, shown) > 35


def test_the_index_comes_before_the_pictures(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(path, moving(5, 64, 64), 8)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 63, 64, 3), np.uint8),
        np.zeros((2, 64, 63, 3), np.uint8),
        np.zeros((0, 64, 64, 3), np.uint8),
        np.zeros((2, 64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
    ],
    ids=lambda frames: f"{frames.dtype}{frames.shape}",
)
def test_frames_that_cannot_be_written_are_refused(tmp_path: Path, frames: Frames) -> None:
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "video.mp4", frames, 8)
    assert not (tmp_path / "video.mp4").exists()


def test_a_frame_rate_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fps"):
        write_mp4(tmp_path / "video.mp4", moving(2, 64, 64), 0)


@pytest.mark.parametrize(("size", "expected"), [((1024, 576), (512, 288)), ((64, 96), (64, 96))])
def test_a_thumbnail_keeps_its_shape_and_is_not_enlarged(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    frame = moving(1, size[1], size[0])[0]
    write_thumbnail(tmp_path / "thumbnail.part", frame)
    with Image.open(tmp_path / "thumbnail.part") as image:
        assert (image.format, image.size) == ("WEBP", expected)
        assert max(image.size) <= THUMBNAIL_PX
        shown = np.asarray(image.convert("RGB"))
    small = np.asarray(Image.fromarray(frame).resize(expected))
    assert psnr_db(small, shown) > 30
