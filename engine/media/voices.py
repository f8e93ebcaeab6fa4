"""Cloned voices: recordings of a speaker, checked once and kept for every model that can clone.

Each voice is a folder of its own, `voice_HEX/` with `sample.wav` and `voice.json`. It appears and
disappears whole, even in a crash.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import wave
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.config import EngineConfig
from engine.errors import Conflict, InvalidRequest, NotFound
from engine.files.atomic import new_folder, remove_folder, remove_leftovers
from engine.media.audio_input import decode_audio
from engine.words import echoed

if TYPE_CHECKING:
    from engine.events import Samples

log = logging.getLogger(__name__)

FOLDER = "voices"
"""Under `data_dir`."""

SAMPLE_RATE = 24_000
"""Hertz, of the recordings that are kept."""

MIN_SAMPLE_S = 3.0
"""XTTS asks for more than three seconds of reference audio (its `synthesize`)."""
MAX_SAMPLE_S = 60.0

MAX_SAMPLE_BYTES = 10 * 2**20
"""Of the file as it comes. OpenAI's limit for `audio_sample`."""

MAX_VOICES = 500
"""At sixty seconds each they are 1.4 GB."""

MIN_LOUDNESS_DBFS = -50.0
"""Root mean square. Speech is recorded at -30 to -15; a quiet room is below -60."""

FULL_SCALE = 0.999
MAX_CLIPPED = 0.05
"""Share of the samples that may be at full scale. Loud speech has less than a hundredth there."""

CONTAINERS = "aac,flac,matroska,mov,mp3,ogg,wav"
"""FFmpeg's names of the demuxers that may run. Those of playlists may not: they open more files."""

MAX_NAME = 64
"""Characters."""

_ID = re.compile(r"voice_[0-9a-f]{24}")
_SAMPLE, _CARD = "sample.wav", "voice.json"


@dataclass(frozen=True, slots=True)
class ClonedVoice:
    """A voice that a client added."""

    id: str
    """`voice_` and 24 hexadecimal digits."""
    name: str
    created_at: int
    """Unix seconds."""
    duration_s: float
    """Of the recording."""


class VoiceStore:
    """The folder of cloned voices. Threads may share it. Every method blocks on the disk."""

    def __init__(self, config: EngineConfig, *, clock: Callable[[], float] = time.time) -> None:
        """Delete what a crash left unfinished. `clock` gives unix seconds."""
        self._folder = config.data_dir / FOLDER
        self._clock = clock
        remove_leftovers(self._folder)

    def add(self, name: str, sample: bytes) -> ClonedVoice:
        """Check a recording and keep it as mono of 24 kHz under a new id.

        `sample` is a file of WAV, FLAC, MP3, AAC, Ogg, WebM or MP4. May take a second.

        Raises:
            InvalidRequest: naming `name`, or `audio_sample` where the recording is too large,
                cannot be decoded, is shorter than 3 s or longer than 60 s, silent or clipped.
            Conflict: there are `MAX_VOICES` already.
            OSError: the disk is full or cannot be written.

        """
        name = name.strip()
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidRequest(
                f"name must be 1 to {MAX_NAME} printable characters.", param="name"
            )
        if len(sample) > MAX_SAMPLE_BYTES:
            raise InvalidRequest(
                f"The recording must be at most {MAX_SAMPLE_BYTES // 2**20} MiB.",
                param="audio_sample",
            )
        samples = decode_audio(
            sample,
            rate=SAMPLE_RATE,
            max_seconds=MAX_SAMPLE_S,
            sample_format="flt",
            containers=CONTAINERS,
            strict=True,
            param="audio_sample",
        )
        _check(samples)
        if len(self.list()) >= MAX_VOICES:
            raise Conflict(f"There are {MAX_VOICES} voices; delete one first.")
        voice = ClonedVoice(
            id=f"voice_{secrets.token_hex(12)}",
            name=name,
            created_at=int(self._clock()),
            duration_s=round(len(samples) / SAMPLE_RATE, 3),
        )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_folder(self._folder / voice.id, mode=0o700) as unfinished:
            _write_wav(unfinished / _SAMPLE, samples)
            (unfinished / _CARD).write_text(json.dumps(asdict(voice)) + "\n", encoding="utf-8")
        return voice

    def list(self) -> tuple[ClonedVoice, ...]:
        """Every voice, the oldest first. One whose card cannot be read is logged and left out."""
        found = []
        for path in self._folder.glob("voice_*"):
            if _ID.fullmatch(path.name):
                voice = self._read(path)
                if voice is not None:
                    found.append(voice)
        return tuple(sorted(found, key=lambda voice: (voice.created_at, voice.id)))

    def get(self, voice_id: str) -> ClonedVoice:
        """The voice with this id.

        Raises:
            NotFound: there is none.

        """
        voice = self._read(self._path(voice_id))
        if voice is None:
            raise _not_found(voice_id)
        return voice

    def sample(self, voice_id: str) -> Path:
        """The recording as a WAV file, mono, 24 kHz, 16 bit: `SpeechRequest.voice_sample`.

        Raises:
            NotFound: there is no such voice.

        """
        path = self._path(voice_id) / _SAMPLE
        if not path.is_file():
            raise _not_found(voice_id)
        return path

    def find_sample(self, voice: str) -> Path | None:
        """The recording, if that is a cloned voice. Otherwise it is a model's own, or wrong."""
        try:
            return self.sample(voice)
        except NotFound:
            return None

    def delete(self, voice_id: str) -> None:
        """Delete the voice. A run that has read its recording continues with it.

        Raises:
            NotFound: there is no such voice.
            OSError: the disk cannot be written.

        """
        try:
            remove_folder(self._path(voice_id))
        except FileNotFoundError as error:
            raise _not_found(voice_id) from error

    def _path(self, voice_id: str) -> Path:
        if not _ID.fullmatch(voice_id):
            raise _not_found(voice_id)
        return self._folder / voice_id

    def _read(self, path: Path) -> ClonedVoice | None:
        try:
            return ClonedVoice(**json.loads((path / _CARD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("cannot read the voice %s: %s", path.name, error)
            return None


def _not_found(voice_id: str) -> NotFound:
    return NotFound(f"There is no voice {echoed(voice_id)}.", param="voice")


def _check(samples: Samples) -> None:
    duration_s = len(samples) / SAMPLE_RATE
    if duration_s < MIN_SAMPLE_S:
        raise InvalidRequest(
            f"The recording must be at least {MIN_SAMPLE_S:g} seconds long, not {duration_s:.1f}.",
            param="audio_sample",
        )
    if not np.isfinite(samples).all():
        raise InvalidRequest("The recording is not audio.", param="audio_sample")
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    if rms < 10 ** (MIN_LOUDNESS_DBFS / 20):
        raise InvalidRequest("The recording is silent or too quiet.", param="audio_sample")
    if float(np.mean(np.abs(samples) >= FULL_SCALE)) > MAX_CLIPPED:
        raise InvalidRequest(
            "The recording is clipped: record it at a lower level.", param="audio_sample"
        )


def _write_wav(path: Path, samples: Samples) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
