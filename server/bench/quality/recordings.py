"""Read English with its words and their times: the LibriVox clips that come with pocketsphinx.

`scripts/setup --dev` fetches the source package that holds them. They were aligned by force, with
the transcript known.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from server.bench.audio_length import audio_seconds

FOLDER = Path(__file__).parents[3] / ".venv" / "recordings"
CLIPS = "test/data/librivox/"


@dataclass(frozen=True, slots=True)
class Clip:
    """One sentence: a WAV file, its words in lower case, and when each begins (seconds)."""

    wav: bytes
    words: tuple[str, ...]
    starts_s: tuple[float, ...]

    @property
    def text(self) -> str:
        """All words."""
        return " ".join(self.words)

    @property
    def seconds(self) -> float:
        """The length of the recording."""
        return audio_seconds(self.wav)


def clips() -> tuple[Clip, ...]:
    """All of them; none if the package is not here."""
    archive = next(iter(FOLDER.glob("pocketsphinx-*.tar.gz")), None)
    if archive is None:
        return ()
    with tarfile.open(archive) as files:
        names = [name for name in files.getnames() if CLIPS in name]
        return tuple(
            _clip(_read(files, name), _read(files, f"{name.removesuffix('.wav')}.json"))
            for name in sorted(names)
            if name.endswith(".wav")
        )


def _read(files: tarfile.TarFile, name: str) -> bytes:
    file = files.extractfile(name)
    assert file is not None
    return file.read()


def _clip(wav: bytes, alignment: bytes) -> Clip:
    # A second pronunciation has a number in parentheses; silence is `<sil>`.
    said = [word for word in json.loads(alignment)["w"] if not word["t"].startswith(("<", "["))]
    return Clip(
        wav,
        tuple(word["t"].partition("(")[0] for word in said),
        tuple(float(word["b"]) for word in said),
    )
