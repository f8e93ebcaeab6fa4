"""Speech as a file or stream for players, encoded piece by piece while it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import av
import numpy as np

if TYPE_CHECKING:
    from av.audio.stream import AudioStream

    from engine.events import Samples

AudioFormat: TypeAlias = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
"""OpenAI's names."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one format is encoded."""

    media_type: str
    muxer: str
    """FFmpeg's name, like `codec`."""
    codec: str
    sample_rate: int | None = None
    """Hertz; None keeps the model's."""
    bit_rate: int | None = None
    """Bits a second of lossy formats: more than one voice needs to be transparent."""


# MP3 and ADTS cannot record the length of the encoder's run-in and of the last frame's padding,
# unless the file is written again at its end. Both have a fixed number of samples, so they are
# shortest at the highest rate. At 48 kHz MP3 adds at most 48 ms of silence (1105 to 2303 samples)
# and AAC at most 43 ms (1024 to 2047). Kokoro's 24 kHz would double that.
ENCODINGS: Mapping[AudioFormat, Encoding] = MappingProxyType(
    {
        "mp3": Encoding("audio/mpeg", "mp3", "libmp3lame", 48_000, 128_000),
        "opus": Encoding("audio/opus", "ogg", "libopus", 48_000, 64_000),
        "aac": Encoding("audio/aac", "adts", "aac", 48_000, 128_000),
        "flac": Encoding("audio/flac", "flac", "flac"),
        "wav": Encoding("audio/wav", "wav", "pcm_s16le"),
        # "24kHz (16-bit signed, low-endian), without the header": OpenAI's guide to text to speech.
        "pcm": Encoding("audio/pcm", "s16le", "pcm_s16le", 24_000),
    }
)

_MUXER_OPTIONS = {
    # Keeps the library's name and version out of the file. WAV then has the header of 44 bytes that
    # simple readers expect.
    "fflags": "+bitexact",
    # Microseconds. Ogg gathers packets to pages, by default of a second.
    "page_duration": "100000",
}


class AudioEncoder:
    """One stream of mono audio. Any thread may use it, but only one at a time.

    Opus, FLAC, WAV and PCM have exactly the samples that came in, rounded if the rate changes. MP3
    and AAC add at most 50 ms of silence, see above. FLAC, WAV and PCM have 16 bits.

    The header of WAV and FLAC is written once, at the start, so it cannot hold the length. WAV's
    sizes are 0xFFFFFFFF and FLAC's number of samples is 0, as is usual for streamed audio.
    """

    def __init__(self, audio_format: AudioFormat, sample_rate: int) -> None:
        """`sample_rate` in hertz is the rate of the samples that come in.

        Raises:
            ValueError: the rate is below 1.

        """
        if sample_rate < 1:
            raise ValueError(f"a sample rate is 1 or more, not {sample_rate}")
        encoding = ENCODINGS[audio_format]
        self._sample_rate = sample_rate
        self._count = 0
        self._sink = _Sink()
        self._container = av.open(
            self._sink,
            "w",
            format=encoding.muxer,
            container_options=_MUXER_OPTIONS,
        )
        self._stream = cast(
            "AudioStream",
            self._container.add_stream(encoding.codec, rate=encoding.sample_rate or sample_rate),
        )
        self._stream.layout = "mono"
        if encoding.bit_rate is not None:
            self._stream.bit_rate = encoding.bit_rate

    def encode(self, samples: Samples) -> bytes:
        """The bytes that are ready after these samples. Encoders look ahead, so some stay inside.

        Samples beyond -1 and 1 are clipped.

        Raises:
            ValueError: not one row of float32.

        """
        if samples.dtype != np.float32 or samples.ndim != 1:
            raise ValueError(f"expected float32 (samples,), got {samples.dtype} {samples.shape}")
        if len(samples):
            row = np.ascontiguousarray(samples)[np.newaxis]
            frame = av.AudioFrame.from_ndarray(row, format="flt", layout="mono")
            frame.sample_rate = self._sample_rate
            frame.pts, frame.time_base = self._count, Fraction(1, self._sample_rate)
            self._count += len(samples)
            self._container.mux(self._stream.encode(frame))
        return self._sink.take()

    def finish(self) -> bytes:
        """The remaining bytes. Nothing can be encoded afterwards."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()


class _Sink:
    """The file that FFmpeg writes to. It has no `seek`, so FFmpeg writes it front to back."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        """Take what FFmpeg wrote."""
        self._held += data
        return len(data)

    def take(self) -> bytes:
        """The bytes written since the last call."""
        held = bytes(self._held)
        self._held.clear()
        return held
