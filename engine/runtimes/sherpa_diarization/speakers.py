"""The names of speakers: those that the request knows, and letters for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from engine.events import SpeakerTurn

Voice = NDArray[np.float32]
"""The numbers of a voice, of length 1."""


def recognised(
    voices: Mapping[int, Voice], known: Mapping[str, Voice], least: float
) -> dict[int, str]:
    """The name of each speaker whose voice is like a known one, by cosine similarity.

    Several may have one name: the clustering took its voice for two.
    """
    names = {}
    for speaker, voice in voices.items():
        likeness = {name: float(voice @ other) for name, other in known.items()}
        best = max(likeness, key=likeness.__getitem__, default=None)
        if best is not None and likeness[best] >= least:
            names[speaker] = best
    return names


def named_turns(
    spans: Sequence[Sequence[tuple[float, float]]],
    names: Mapping[int, str],
    taken: Sequence[str] = (),
) -> tuple[SpeakerTurn, ...]:
    """All turns by their start. `spans` has those of each speaker, in seconds.

    A speaker without a name gets `A`, `B` and so on in the order of first turns, as OpenAI has it.
    No letter is one of the names that are `taken`.
    """
    ordered = sorted((*span, speaker) for speaker, own in enumerate(spans) for span in own)
    letters = _letters(taken)
    found = dict(names)
    turns = []
    for start_s, end_s, speaker in ordered:
        if speaker not in found:
            found[speaker] = next(letters)
        turns.append(SpeakerTurn(start_s, end_s, found[speaker]))
    return tuple(turns)


def _letters(taken: Sequence[str]) -> Iterator[str]:
    """`A` to `Z`, then `AA` and so on."""
    for number in count():
        name = ""
        while number >= 0:
            number, letter = divmod(number, 26)
            name = chr(ord("A") + letter) + name
            number -= 1
        if name not in taken:
            yield name
