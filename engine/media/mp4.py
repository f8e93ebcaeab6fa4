"""Video files for browsers: H.264 in MP4, and a picture to show before the video plays."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

from engine.events import Frames

CRF = 18
"""x264's constant rate factor; 17–18 is "visually lossless" (FFmpeg's H.264 encoding guide)."""

THUMBNAIL_PX = 512
"""The longest side of a thumbnail, at most."""

_BT709 = 1
"""The number for primaries, transfer and matrix alike (ITU-T H.273)."""


def write_mp4(path: Path, frames: Frames, fps: int) -> None:
    """Write every frame to `path`, at `fps` frames a second, whatever the suffix of `path`.

    The file is 4:2:0 in BT.709, which every browser plays. The index comes first, so that playing
    can begin before the whole file has arrived. The file is complete when this returns.

    Raises:
        ValueError: not RGB bytes of (frames, height, width, 3), no frame, an odd width or height
            (4:2:0 halves both), or fps below 1.
        OSError: the file cannot be written.

    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"expected uint8 (n, h, w, 3), got {frames.dtype} {frames.shape}")
    count, height, width, _ = frames.shape
    if not (count and height and width) or height % 2 or width % 2:
        raise ValueError(f"H.264 in 4:2:0 needs frames of even sizes, got {frames.shape}")
    if fps < 1:
        raise ValueError(f"fps must be 1 or more, got {fps}")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(CRF)})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, fps)
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        for index, pixels in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = rgb.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = index, context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_thumbnail(path: Path, frame: NDArray[np.uint8]) -> None:
    """Write one frame, uint8 (height, width, 3), as WebP of at most `THUMBNAIL_PX` a side."""
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    image.save(path, format="WEBP")
