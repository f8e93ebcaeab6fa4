"""Audio files that came in, decoded from memory with a bound on what they may become."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import av
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest
from engine.events import Samples

SampleFormat: TypeAlias = Literal["s16", "flt"]
"""FFmpeg's names for integers of 16 bits and for floats of 32."""

NO_PROTOCOL = {"protocol_whitelist": "none"}
"""Keeps FFmpeg from opening files and addresses that a playlist or session description names."""

WAV_PROBE_BYTES = 8192
"""The header of a WAV file says what is in it, but FFmpeg decodes five seconds of it to make sure.
That takes half as long as decoding twenty seconds twice (5 of 11 ms). Two packets are enough."""

MAX_RATE = 768_000
"""Hertz, the highest rate of any converter. The filter of a resampler grows with the source rate: a
header that says gigahertz would keep a processor busy for half a minute."""

PADDING_S = 0.1
"""A recording may be this much longer than the limit, because codecs pad the end."""

RAW_FORMATS = frozenset({"aac", "ac3", "eac3", "mp3"})
"""Containers without a duration. FFmpeg guesses it from the first frame's bit rate."""


def decode_audio(
    data: bytes,
    *,
    rate: int,
    max_seconds: float,
    sample_format: SampleFormat = "s16",
    containers: str | None = None,
    strict: bool = False,
    param: str = "file",
    check: Callable[[], None] = lambda: None,
) -> Samples:
    """The first audio stream of a file as mono samples at `rate` hertz.

    Takes any container and codec that FFmpeg knows, by its content and not by its name.
    `containers` narrows that to some of FFmpeg's demuxers, by their names. The samples are those of
    16 bits, as `faster_whisper.decode_audio` gives them. With the `sample_format` "flt" they are
    neither rounded nor clipped.

    Packets that cannot be decoded are left out, and a container that claims too many seconds is
    refused at once. With `strict`, one such packet refuses the file, and claims do not count.
    `check` is called once a packet and may raise to stop.

    Raises:
        InvalidRequest: there is no audio in the file, or more than `max_seconds`. Names `param`.

    """
    options = dict(NO_PROTOCOL)
    if containers is not None:
        options["format_whitelist"] = containers
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        options["probesize"] = str(WAV_PROBE_BYTES)
    try:
        if not data:
            raise _Refused("The file is empty.")
        with av.open(
            io.BytesIO(data), mode="r", metadata_errors="ignore", options=options
        ) as container:
            pieces = list(_pieces(container, rate, max_seconds, sample_format, strict, check))
        if not pieces:
            raise _Refused("There is no sound in the file.")
    except _Refused as refusal:
        raise InvalidRequest(str(refusal), param=param) from refusal
    except (av.error.FFmpegError, ValueError) as error:
        # A ValueError where the stream's own claims make no sense, such as a rate of 0.
        reason = error.strerror if isinstance(error, av.error.FFmpegError) else error
        raise InvalidRequest(f"The recording cannot be decoded: {reason}.", param=param) from error
    samples: Samples = np.concatenate(pieces).astype(np.float32, copy=False)
    if sample_format == "s16":
        samples /= 32768.0
    return samples


class _Refused(Exception):
    """Why a file is refused, in words for the client."""


def _pieces(
    container: Any,
    rate: int,
    max_seconds: float,
    sample_format: SampleFormat,
    strict: bool,
    check: Callable[[], None],
) -> Iterator[NDArray[Any]]:
    """The samples in pieces, none of them empty."""
    too_long = _Refused(
        f"The recording is longer than {max_seconds:g} seconds, the most that is taken."
    )
    limit_s = max_seconds + PADDING_S
    if not container.streams.audio:
        raise _Refused("There is no audio in the file.")
    stream = container.streams.audio[0]
    claims_duration = container.format.name not in RAW_FORMATS
    if claims_duration and not strict and (container.duration or 0) / av.time_base > limit_s:
        raise too_long
    part = None
    ended_s = 0.0
    for packet in container.demux(stream):
        check()
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # Codecs have several errors for a damaged packet: AAC says that it is not implemented.
            if strict:
                raise
            continue
        for frame in frames:
            if not 1 <= frame.sample_rate <= MAX_RATE:
                raise _Refused(
                    f"The recording has {frame.sample_rate} samples a second; at most {MAX_RATE}"
                    " are taken."
                )
            # Some streams change in the middle, such as internet radio kept as Ogg.
            if part is None or not part.has_layout_of(frame):
                if part is not None:
                    yield from part.end()
                    ended_s += part.seconds
                part = _Part(frame, rate, sample_format)
            # Counted before it is resampled: a file may claim to have one sample a second.
            part.count(frame)
            if ended_s + part.seconds > limit_s:
                raise too_long
            yield from part.add(frame)
    if part is not None:
        yield from part.end()


class _Part:
    """Frames of one layout on their way to mono.

    They are gathered, because a call of the resampler costs more than a frame.
    """

    GATHERED = 100_000
    """Samples to resample at once."""

    def __init__(self, frame: av.AudioFrame, rate: int, sample_format: SampleFormat) -> None:
        self._layout = _layout(frame)
        self._rate: int = frame.sample_rate
        self._count = 0
        self._gathered = av.AudioFifo()
        self._resampler = av.AudioResampler(format=sample_format, layout="mono", rate=rate)

    @property
    def seconds(self) -> float:
        return self._count / self._rate

    def has_layout_of(self, frame: av.AudioFrame) -> bool:
        return _layout(frame) == self._layout

    def count(self, frame: av.AudioFrame) -> None:
        self._count += frame.samples

    def add(self, frame: av.AudioFrame) -> Iterator[NDArray[Any]]:
        frame.pts = None  # otherwise a gap would be an error
        self._gathered.write(frame)
        if self._gathered.samples >= self.GATHERED:
            yield from self._resample(self._gathered.read())

    def end(self) -> Iterator[NDArray[Any]]:
        if self._gathered.samples:
            yield from self._resample(self._gathered.read())
            yield from self._resample(None)

    def _resample(self, frame: av.AudioFrame | None) -> Iterator[NDArray[Any]]:
        for piece in self._resampler.resample(frame):
            if piece.samples:
                yield piece.to_ndarray()[0]


def _layout(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate
