"""Whether a transcription model hears what a voice was told to say, and how fast it speaks."""

from __future__ import annotations

from collections.abc import Sequence

from server.bench.quality.client import Client
from server.bench.quality.measure import Measure, median
from server.bench.quality.sentences import SPOKEN
from server.bench.quality.transcription import word_error_share


def measure(client: Client, model: str, hearing: str | None, voices: Sequence[str]
) -> list[Measure]:  # fmt: skip
    """The measures of each voice. `hearing` is the model that hears; None: only the speed."""
    measures = []
    for voice in voices:
        client.speak(model, voice, SPOKEN[0])  # loads and warms up what is to be timed
        spoken = [client.speak(model, voice, text) for text in SPOKEN]
        if hearing is not None:
            heard = [client.transcribe(hearing, each.wav, words=False).text for each in spoken]
            measures.append(word_error_share(SPOKEN, heard, part=f"{voice}, heard by {hearing}"))
        speeds = [each.seconds / each.took_s for each in spoken]
        measures.append(speed(speeds, voice))
    return measures


def speed(values: Sequence[float], voice: str) -> Measure:
    """Seconds of speech that a voice makes in a second."""
    return median("speech a second", values, "sentences", "s", higher_is_better=True, part=voice)
