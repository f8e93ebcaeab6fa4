"""One diarization, on the thread of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.events import Progress, Samples, Speakers
from engine.media.audio_input import decode_audio
from engine.requests import DiarizationRequest
from engine.runtimes.common.thread_run import Emit
from engine.runtimes.common.transcription import Cancelled, RecordingRun
from engine.runtimes.sherpa_diarization.files import RATE
from engine.runtimes.sherpa_diarization.model import DiarizationModel
from engine.runtimes.sherpa_diarization.options import SherpaDiarizationOptions
from engine.runtimes.sherpa_diarization.speakers import Voice, named_turns, recognised
from engine.runtimes.sherpa_diarization.turns import (
    Labels,
    LocalSpeaker,
    Span,
    joined,
    local_speakers,
    spans_of,
)


class Run(RecordingRun):
    """One request on one model."""

    def __init__(
        self,
        model: DiarizationModel,
        options: SherpaDiarizationOptions,
        request: DiarizationRequest,
        emit: Emit,
    ) -> None:
        super().__init__(emit)
        self._model = model
        self._options = options
        self._request = request

    def cancel(self) -> None:
        """Make `execute` return soon, also from within a window."""
        super().cancel()
        self._model.stop()  # the model has no other run before this one has ended

    def execute(self) -> None:
        """Decode, look at each window, compare the voices, and emit who speaks when.

        Raises:
            InvalidRequest: the file is not audio, or too long.

        """
        self._model.run_options.terminate = False
        try:
            self._diarize()
        except Cancelled:
            return
        except Exception:
            if not self._cancelled:  # otherwise the graph failed because it was stopped
                raise

    def _diarize(self) -> None:
        samples = decode_audio(
            self._request.audio,
            rate=RATE,
            max_seconds=self._options.max_seconds,
            check=self._check,
        )
        known = self._known_voices()
        spans, voices = self._speakers(samples, wants_voices=bool(known))
        names = recognised(voices, known, self._options.known_threshold)
        taken = [each.name for each in self._request.known_speakers]
        self._emit(Speakers(len(samples) / RATE, named_turns(spans, names, taken)))

    def _known_voices(self) -> dict[str, Voice]:
        found = {}
        for speaker in self._request.known_speakers:
            self._check()
            voice = self._model.embed([speaker.samples])
            if voice is not None:
                found[speaker.name] = voice
        return found

    def _speakers(
        self, samples: Samples, *, wants_voices: bool
    ) -> tuple[Sequence[Sequence[tuple[float, float]]], Mapping[int, Voice]]:
        """The turns of each speaker, in seconds, and each speaker's voice."""
        shape = self._model.shape
        starts = shape.starts(len(samples))
        labels = []
        for start in starts:
            self._check()
            labels.append(self._model.segment(samples[start : start + shape.window]))
            self._emit(Progress(0.5 * len(labels) / len(starts)))
        if len(labels) == 1 and not wants_voices:
            return spans_of(shape, labels[0]), {}  # the model itself tells its speakers apart
        members, heard = self._voices(samples, local_speakers(shape, labels))
        if len(labels) == 1:
            own = {each.speaker: voice for each, voice in zip(members, heard, strict=True)}
            return spans_of(shape, labels[0]), own
        if not members:
            return (), {}
        return self._compared(samples, labels, members, heard)

    def _voices(
        self, samples: Samples, speakers: Sequence[LocalSpeaker]
    ) -> tuple[list[LocalSpeaker], list[Voice]]:
        """The voices of the speakers of all windows; who says too little is left out."""
        members, voices = [], []
        for index, speaker in enumerate(speakers):
            self._check()
            voice = self._model.embed(_pieces(samples, speaker.spans))
            if voice is not None:
                members.append(speaker)
                voices.append(voice)
            self._emit(Progress(0.5 + 0.5 * (index + 1) / len(speakers)))
        return members, voices

    def _compared(
        self,
        samples: Samples,
        labels: Sequence[Labels],
        members: Sequence[LocalSpeaker],
        voices: Sequence[Voice],
    ) -> tuple[Sequence[Sequence[tuple[float, float]]], Mapping[int, Voice]]:
        clusters = self._model.cluster(np.array(voices), self._options.threshold)
        self._check()
        heard = joined(self._model.shape, labels, members, clusters, len(samples))
        sums: dict[int, Voice] = {}
        for member, voice, cluster in zip(members, voices, clusters, strict=True):
            weight = np.float32(sum(end - first for first, end in member.spans))
            sums[cluster] = sums.get(cluster, np.zeros_like(voice)) + weight * voice
        means = {cluster: each / (np.linalg.norm(each) or 1) for cluster, each in sums.items()}
        return spans_of(self._model.shape, heard), means


def _pieces(samples: Samples, spans: Sequence[Span]) -> list[Samples]:
    """The samples of the spans that lie within the recording."""
    pieces = (samples[first:end] for first, end in spans)
    return [piece for piece in pieces if len(piece)]
