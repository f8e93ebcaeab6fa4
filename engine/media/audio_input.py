"""Audio files that came in, decoded from memory with a bound on what they may become."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import av
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest
from engine.events import Samples

NO_PROTOCOL = {"protocol_whitelist": "none"}
"""A playlist or session description must not make FFmpeg open files and addresses it names."""

WAV_PROBE_BYTES = 8192
"""The header of a WAV file says what is in it. FFmpeg decodes five seconds all the same to make
sure, half as long as it takes to decode twenty (5 of 11 ms); two packets do."""

MAX_RATE = 768_000
"""Hertz, the highest of any converter. The filter of a resampler grows with the rate it comes from:
a header that says gigahertz would keep a processor busy for half a minute."""

RAW_FORMATS = frozenset({"aac", "ac3", "eac3", "mp3"})
"""Containers with no duration: FFmpeg guesses it from the first frame's bit rate."""


def decode_audio(
    data: bytes, *, rate: int, max_seconds: float, check: Callable[[], None] = lambda: None
) -> Samples:
    """The first audio stream of a file as mono samples at `rate` hertz.

    Takes any container and codec that FFmpeg knows, by its content and not by its name. What
    cannot be decoded in the middle is left out. The samples are those of 16 bits, as
    `faster_whisper.decode_audio` gives them. `check` is called once a packet and may raise
    to stop.

    Raises:
        InvalidRequest: naming `file`: there is no audio in it, or more than `max_seconds`.

    """
    if not data:
        raise InvalidRequest("The file is empty.", param="file")
    pieces: list[NDArray[np.int16]] = []
    count, most = 0, int(rate * max_seconds)
    try:
        for piece in _pieces(data, rate, max_seconds, check):
            pieces.append(piece)
            count += len(piece)
            if count > most:
                raise _too_long(max_seconds)
    except (av.error.FFmpegError, ValueError) as error:
        # A ValueError where the stream's own claims make no sense, as a rate of 0.
        reason = error.strerror if isinstance(error, av.error.FFmpegError) else error
        raise InvalidRequest(
            f"The file is no audio that can be decoded: {reason}.", param="file"
        ) from error
    if not count:
        raise InvalidRequest("There is no sound in the file.", param="file")
    samples: Samples = np.concatenate(pieces).astype(np.float32)
    samples /= 32768.0
    return samples


def _pieces(
    data: bytes, rate: int, max_seconds: float, check: Callable[[], None]
) -> Iterator[NDArray[np.int16]]:
    options = dict(NO_PROTOCOL)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        options["probesize"] = str(WAV_PROBE_BYTES)
    with av.open(
        io.BytesIO(data), mode="r", metadata_errors="ignore", options=options
    ) as container:
        if not container.streams.audio:
            raise InvalidRequest("There is no audio in the file.", param="file")
        stream = container.streams.audio[0]
        if container.format.name not in RAW_FORMATS:
            seconds = (container.duration or 0) / av.time_base
            if seconds > max_seconds:
                raise _too_long(max_seconds)
        layout, part = None, _Part(rate)
        for packet in container.demux(stream):
            check()
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if frame.sample_rate > MAX_RATE:
                    raise InvalidRequest(
                        f"The recording has {frame.sample_rate} samples a second; at most"
                        f" {MAX_RATE} are taken.",
                        param="file",
                    )
                # Some streams change in the middle, such as internet radio kept as Ogg.
                if layout not in (None, _layout(frame)):
                    yield from part.end()
                    part = _Part(rate)
                layout = _layout(frame)
                yield from part.add(frame)
        yield from part.end()


def _layout(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


class _Part:
    """Frames of one format on their way to mono, gathered, as each call costs more than a frame."""

    GATHERED = 500_000
    """Samples to resample at once."""

    def __init__(self, rate: int) -> None:
        self._gathered = av.AudioFifo()
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)

    def add(self, frame: av.AudioFrame) -> Iterator[NDArray[np.int16]]:
        frame.pts = None  # else a gap would be an error
        self._gathered.write(frame)
        if self._gathered.samples >= self.GATHERED:
            yield from self._resample(self._gathered.read())

    def end(self) -> Iterator[NDArray[np.int16]]:
        if self._gathered.samples:
            yield from self._resample(self._gathered.read())
            yield from self._resample(None)

    def _resample(self, frame: av.AudioFrame | None) -> Iterator[NDArray[np.int16]]:
        for piece in self._resampler.resample(frame):
            yield piece.to_ndarray()[0]


def _too_long(max_seconds: float) -> InvalidRequest:
    return InvalidRequest(
        f"The recording is longer than {max_seconds:g} seconds, the most that is taken.",
        param="file",
    )
