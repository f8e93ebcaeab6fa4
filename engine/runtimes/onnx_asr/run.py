"""One transcription, on the thread of its model. Importing this module imports the libraries."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

from faster_whisper.vad import VadOptions, get_speech_timestamps, get_vad_model
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from engine.errors import InvalidRequest
from engine.events import Event, Heard, Progress, Samples, Segment, Word
from engine.media.audio_input import decode_audio
from engine.requests import TranscriptionOperation, TranscriptionRequest
from engine.runtimes.common.transcription import Cancelled, TranscriptionRun
from engine.runtimes.onnx_asr.checks import CANARY, check_kind, language_of
from engine.runtimes.onnx_asr.model import OnnxModel
from engine.runtimes.onnx_asr.options import ModelType, OnnxAsrOptions
from engine.words import echoed
from onnx_asr.asr import TimestampedResult

PAUSE_MS = 500
"""A shorter silence ends no window."""

PAD_MS = 200
"""Kept before and after what the detector takes for speech."""


def import_everything() -> None:
    """Load what the first run would otherwise load: the voice activity detector (2 MB)."""
    get_vad_model()


class Run(TranscriptionRun):
    """One request on one model."""

    def __init__(
        self,
        model: OnnxModel,
        kind: ModelType,
        options: OnnxAsrOptions,
        request: TranscriptionRequest,
        emit: Callable[[Event], None],
    ) -> None:
        self._model = model
        self._kind = kind
        self._options = options
        super().__init__(request, emit)

    def cancel(self) -> None:
        """Make `execute` return soon, also from within a graph."""
        super().cancel()
        self._model.control.stop()  # the model has no other run before this one has ended

    def execute(self) -> None:
        """Decode, emit what was heard, then a segment for each window.

        Raises:
            InvalidRequest: the file is not audio, or the model cannot serve the request.

        """
        self._model.control.begin(self._check)
        try:
            self._transcribe()
        except Cancelled:
            return
        except (Fail, RuntimeException):
            if not self._cancelled:  # otherwise a graph failed because it was stopped
                raise
        finally:
            self._model.control.end()

    def _transcribe(self) -> None:
        check_kind(self._request, self._options, self._kind)
        language = language_of(self._request, self._options, self._kind)
        arguments = self._arguments(language)
        rate = self._model.rate
        samples = decode_audio(
            self._request.audio,
            rate=rate,
            max_seconds=self._options.max_seconds,
            check=self._check,
        )
        duration_s = len(samples) / rate
        self._emit(Heard(language, duration_s))
        count = 0
        for start, end in self._windows(samples, duration_s):
            self._check()
            result = self._model.hear(samples[start:end], **arguments)
            self._emit(Progress(min(1.0, end / len(samples))))
            if result.text.strip():
                self._emit(self._segment(result, count, start / rate, end / rate))
                count += 1

    def _arguments(self, language: str) -> dict[str, str]:
        """What Canary is told.

        Raises:
            InvalidRequest: it has no token for the language.

        """
        if self._kind != CANARY:
            return {}
        if not self._model.knows_language(language):
            raise InvalidRequest(
                f"The model {echoed(self._request.model)} does not know the language"
                f" {echoed(language)}.",
                param="language",
            )
        translates = self._request.operation is TranscriptionOperation.TRANSLATION
        return {"language": language, "target_language": "en" if translates else language}

    def _windows(self, samples: Samples, duration_s: float) -> Iterator[tuple[int, int]]:
        """First and last sample of each window. A short recording is one, unless `vad` is set."""
        if not self._request.vad and duration_s <= self._options.window_s:
            yield 0, len(samples)
            return
        options = VadOptions(
            max_speech_duration_s=self._options.window_s,
            min_silence_duration_ms=PAUSE_MS,
            speech_pad_ms=PAD_MS,
        )
        for speech in get_speech_timestamps(samples, options, self._model.rate):
            yield int(speech["start"]), int(speech["end"])

    def _segment(
        self, result: TimestampedResult, number: int, start_s: float, end_s: float
    ) -> Segment:
        """A window's text. Its times are those of its first and last word, where they are known."""
        words = _words(result, start_s, end_s, self._model.frame_s)
        logprobs = result.logprobs or [0.0]
        text = result.text.strip().encode()
        return Segment(
            id=number,
            start_s=words[0].start_s if words else start_s,
            end_s=words[-1].end_s if words else end_s,
            text=f" {result.text.strip()}",
            seek=int(start_s * 100),
            tokens=self._model.token_ids(result.tokens or ()),
            temperature=0.0,
            avg_logprob=sum(logprobs) / len(logprobs),
            compression_ratio=len(text) / len(zlib.compress(text)),
            no_speech_prob=0.0,
            words=tuple(words) if self._request.word_times else (),
        )


def _words(result: TimestampedResult, start_s: float, end_s: float, frame_s: float) -> list[Word]:
    """Tokens put together to words, as the library puts them together to text.

    A token with a space before a letter or digit begins a word. The times of a token are where it
    was emitted, so a word ends one frame after its last token, or where the next one begins.
    """
    if result.timestamps is None or result.tokens is None:
        return []
    spans: list[tuple[str, float, float, list[float]]] = []
    logprobs = result.logprobs or [0.0] * len(result.tokens)
    spaced = True
    for token, at_s, logprob in zip(result.tokens, result.timestamps, logprobs, strict=True):
        text = token.strip()
        spaced = spaced or token.startswith(" ")
        if not text:
            continue
        begins = spaced and (text[0].isalnum() or text[0] == "_")
        spaced = token.endswith(" ")
        if begins or not spans:
            spans.append((text, at_s, at_s, [logprob]))
        else:
            before, first_s, _, known = spans[-1]
            spans[-1] = (before + text, first_s, at_s, [*known, logprob])
    words = []
    for index, (text, first_s, last_s, known) in enumerate(spans):
        until_s = last_s + frame_s
        if index + 1 < len(spans):
            until_s = min(until_s, spans[index + 1][1])
        words.append(
            Word(
                f" {text}",
                min(start_s + first_s, end_s),
                min(start_s + max(until_s, last_s), end_s),
                math.exp(min(0.0, sum(known) / len(known))),
            )
        )
    return words
