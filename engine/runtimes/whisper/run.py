"""One transcription, on the thread of its model. Importing this module imports faster-whisper."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Self
from unicodedata import category

import numpy as np
from ctranslate2 import StorageView
from ctranslate2.models import Whisper
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.tokenizer import _LANGUAGE_CODES, Tokenizer
from faster_whisper.transcribe import Segment as LibrarySegment
from faster_whisper.transcribe import TranscriptionInfo
from faster_whisper.vad import get_vad_model

from engine.errors import InvalidRequest, RuntimeFailed
from engine.events import Cut, Event, Heard, Progress, Samples, Segment, Word
from engine.media.audio_input import decode_audio
from engine.requests import TranscriptionOperation, TranscriptionRequest
from engine.runtimes.common.transcription import Cancelled, TranscriptionRun
from engine.runtimes.whisper.options import WhisperOptions
from engine.runtimes.whisper.window_batcher import Call, Step, WindowBatcher

BUSY_S = 2.0
"""How long the library's worker may take to register the end of a run."""


class SharedModel:
    """CTranslate2's model as one run sees it: its calls go through the batcher of all runs.

    Encoded windows come to host memory if several may be decoded in one call, as the library
    itself has them with several GPUs. CTranslate2 takes them from there.
    """

    def __init__(
        self, library: Whisper, batcher: WindowBatcher, cancelled: Callable[[], bool]
    ) -> None:
        self._library = library
        self._batcher = batcher
        self._cancelled = cancelled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def encode(self, features: StorageView, to_cpu: bool = False) -> StorageView:
        """Encode windows. The caller has gone through the batcher."""
        return self._library.encode(features, to_cpu=to_cpu or self._batcher.limit > 1)

    def generate(self, features: StorageView, prompts: list[list[int]], **options: Any) -> Any:
        """Decode windows. One window at temperature 0 may go with others of the same options."""

        def compute(items: Sequence[tuple[StorageView, list[list[int]]]]) -> Any:
            joined = [prompt for _, prompts in items for prompt in prompts]
            return self._library.generate(_join([each for each, _ in items]), joined, **options)

        if len(prompts) != 1 or options.get("sampling_temperature", 0) > 0:
            return self._alone(Step.DECODE, partial(compute, [(features, prompts)]))
        # CTranslate2 wants prompts of one length in a batch.
        key = (Step.DECODE, len(prompts[0]), _hashable(options))
        item = (features, prompts)
        call = Call(Step.DECODE, key, item, compute, self._cancelled, size=_token_count)
        return [self._batcher.make(call)]

    def detect_language(self, features: StorageView) -> Any:
        """The languages of encoded windows."""
        return self._alone(Step.ENCODE, partial(self._library.detect_language, features))

    def align(self, *arguments: Any, **options: Any) -> Any:
        """When the words of a window were said."""
        return self._alone(Step.ENCODE, partial(self._library.align, *arguments, **options))

    def encode_together(self, window: Any, encode: Callable[[Any], StorageView]) -> StorageView:
        """Encode one window (mel bands x frames), with those of other runs where that pays."""
        if window.ndim != 2:
            return self._alone(Step.ENCODE, partial(encode, window))

        def compute(windows: Sequence[Any]) -> Sequence[StorageView]:
            if len(windows) == 1:
                return [encode(windows[0])]
            return _split(encode(np.stack(windows)))

        key = (Step.ENCODE, window.shape)
        return self._batcher.make(Call(Step.ENCODE, key, window, compute, self._cancelled))

    def _alone(self, step: Step, make: Callable[[], Any]) -> Any:
        call = Call(step, None, None, lambda _: [make()], self._cancelled)
        return self._batcher.make(call)


def _hashable(options: dict[str, Any]) -> Hashable:
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(options.items())
    )


def _token_count(result: Any) -> int:
    return len(result.sequences_ids[0]) + 1


def _join(encoded: Sequence[StorageView]) -> StorageView:
    if len(encoded) == 1:
        return encoded[0]
    return StorageView.from_array(np.concatenate([np.asarray(each) for each in encoded]))


def _split(encoded: StorageView) -> list[StorageView]:
    # Copies: a window that waits would otherwise keep those of all others.
    return [StorageView.from_array(each[np.newaxis].copy()) for each in np.asarray(encoded)]


class CancellableWhisper(WhisperModel):  # type: ignore[misc]
    """A model that checks before every window whether to continue, and bounds what it is told.

    The library's generator yields nothing for a window without speech. Hours of silence are one
    call of `next`, which can only be stopped from inside.
    """

    check: Callable[[], None] = staticmethod(lambda: None)

    hotwords: Sequence[int] = ()
    """Tokens of the words to expect, in every window: `prompt_room` at most."""

    def for_run(self, batcher: WindowBatcher, cancelled: Callable[[], bool]) -> Self:
        """The same weights with the settings of one run."""
        view = copy.copy(self)
        view.model = SharedModel(self.model, batcher, cancelled)
        return view

    @property
    def prompt_room(self) -> int:
        """Tokens before a window's own. Whisper was trained with half of the positions, less one.

        The rest is for the answer. The library allows as many for hotwords and again for the text
        before: no room is then left for an answer.
        """
        return int(self.max_length) // 2 - 1

    def get_prompt(
        self,
        tokenizer: Tokenizer,
        previous_tokens: Sequence[int],
        without_timestamps: bool = False,
        prefix: str | None = None,
        hotwords: str | None = None,
    ) -> Any:
        """The tokens before the answer: hotwords, then the end of the text before.

        The library calls it for every window, without `prefix` or `hotwords`.
        """
        assert prefix is None and hotwords is None
        before = previous_tokens[max(0, len(previous_tokens) - self._room_before()) :]
        told = [*self.hotwords, *before]
        return super().get_prompt(tokenizer, told, without_timestamps=without_timestamps)

    def _room_before(self) -> int:
        return self.prompt_room - len(self.hotwords)

    def tell(self, prompt: str | None, hotwords: str | None) -> tuple[Cut, ...]:
        """Set the hotwords of a run, and say what of them and of its prompt is cut.

        Hotwords may have half of the room, and what the prompt leaves. Of a prompt the end counts,
        as of the text before a window.
        """
        prompt_count = len(self._tokens(prompt))
        asked = self._tokens(hotwords)
        self.hotwords = asked[: max(self.prompt_room - prompt_count, self.prompt_room // 2)]
        counts = (
            ("hotwords", len(self.hotwords), len(asked)),
            ("prompt", min(prompt_count, self._room_before()), prompt_count),
        )
        return tuple(Cut(param, kept, given) for param, kept, given in counts if kept < given)

    def _tokens(self, text: str | None) -> Sequence[int]:
        if not text:
            return ()
        found: Sequence[int] = self.hf_tokenizer.encode(
            f" {text.strip()}", add_special_tokens=False
        ).ids
        return found

    def encode(self, features: Any) -> Any:
        """Encode a window as the library does. Every window begins with this call."""
        self.check()
        encode = super().encode
        if isinstance(self.model, SharedModel):
            return self.model.encode_together(features, encode)
        return encode(features)

    def leave_device(self, *, to_host: bool) -> None:
        """Take the weights off the device, into host memory or for good.

        The library silently ignores the call while it counts a run as under way, which lasts a
        moment longer than the run. There is nothing to wait for, so the call is repeated.

        Raises:
            RuntimeFailed: the weights are still on the device.

        """
        deadline_s = time.monotonic() + BUSY_S
        self.model.unload_model(to_cpu=to_host)
        while self.model.model_is_loaded:
            if time.monotonic() >= deadline_s:
                raise RuntimeFailed("CTranslate2 kept the model on the device.")
            time.sleep(0.001)
            self.model.unload_model(to_cpu=to_host)


def import_everything() -> frozenset[str]:
    """Load what the first run would otherwise load. Return the codes of the languages."""
    get_vad_model()
    return frozenset(_LANGUAGE_CODES)


class Run(TranscriptionRun):
    """One request on one model."""

    def __init__(
        self,
        model: CancellableWhisper,
        batcher: WindowBatcher,
        options: WhisperOptions,
        request: TranscriptionRequest,
        emit: Callable[[Event], None],
    ) -> None:
        self._shared = model
        self._batcher = batcher
        self._options = options
        super().__init__(request, emit)

    def execute(self) -> None:
        """Decode, emit what was heard, then each segment as it is known.

        Raises:
            InvalidRequest: the file is not audio, or the model cannot serve the request.

        """
        self._model = self._shared.for_run(self._batcher, lambda: self._cancelled)
        self._model.check = self._check
        try:
            self._check_model()
            samples = decode_audio(
                self._request.audio,
                rate=self._model.feature_extractor.sampling_rate,
                max_seconds=self._options.max_seconds,
                check=self._check,
            )
            for cut in self._model.tell(self._request.prompt, self._request.hotwords):
                self._emit(cut)
            segments, info = self._transcribe(samples)
            self._emit(Heard(info.language, info.duration))
            count = 0
            for found in segments:
                self._emit(Progress(min(1.0, float(found.end) / info.duration)))
                segment = _segment(found, count, float(info.duration))
                if segment is not None:
                    self._emit(segment)
                    count += 1
        except Cancelled:
            return
        finally:
            del self._model  # which holds this run, as its check

    def _check_model(self) -> None:
        """Check the language and the task, which only the loaded model shows."""
        language = self._request.language
        multilingual = self._model.model.is_multilingual
        if self._request.operation is TranscriptionOperation.TRANSLATION and not multilingual:
            raise InvalidRequest(
                f"The model {self._request.model!r} knows only English, so it cannot translate.",
                param="model",
            )
        if language is None or (language == "en" and not multilingual):
            return
        known = self._model.hf_tokenizer.token_to_id(f"<|{language}|>") is not None
        if not multilingual or not known:
            raise InvalidRequest(
                f"The model {self._request.model!r} does not know the language {language!r}.",
                param="language",
            )

    def _transcribe(self, samples: Samples) -> tuple[Iterable[LibrarySegment], TranscriptionInfo]:
        request, options = self._request, self._options
        arguments: dict[str, Any] = {
            "language": request.language,
            "task": "translate"
            if request.operation is TranscriptionOperation.TRANSLATION
            else "transcribe",
            "beam_size": options.beam_size,
            # The batched pipeline, unlike the other, does not put the space before it.
            "initial_prompt": f" {request.prompt.strip()}" if request.prompt else None,
            "word_timestamps": request.word_times,
        }
        if request.temperature > 0:
            # Otherwise the library goes up its list of temperatures if a window came out badly.
            arguments["temperature"] = request.temperature
        seconds = len(samples) / self._model.feature_extractor.sampling_rate
        if options.batch_after is None or seconds <= options.batch_after:
            found = self._model.transcribe(samples, vad_filter=request.vad, **arguments)
        else:
            # A new pipeline for each run: it remembers where the last run's speech ended.
            found = BatchedInferencePipeline(self._model).transcribe(
                samples,
                batch_size=options.batch_size,
                # By default it makes one segment of each window, up to half a minute.
                without_timestamps=False,
                **arguments,
            )
        segments, info = found
        return segments, info


def _segment(segment: LibrarySegment, number: int, duration_s: float) -> Segment | None:
    """The segment in Python's types. The library leaves some of NumPy's, which are not JSON.

    The model hears windows of half a minute, the last one filled up with silence, and may put text
    there. What begins after the recording is left out, as is a segment of punctuation alone:
    silence is heard as `...`.
    """
    if segment.start >= duration_s or _is_silent(segment.text):
        return None
    return Segment(
        id=number,
        start_s=float(segment.start),
        end_s=min(float(segment.end), duration_s),
        text=segment.text,
        seek=int(segment.seek),
        tokens=tuple(segment.tokens),
        temperature=float(segment.temperature or 0.0),
        avg_logprob=float(segment.avg_logprob),
        compression_ratio=float(segment.compression_ratio),
        no_speech_prob=float(segment.no_speech_prob),
        words=tuple(
            Word(
                word.word,
                min(float(word.start), duration_s),
                min(float(word.end), duration_s),
                float(word.probability),
            )
            for word in segment.words or ()
        ),
    )


def _is_silent(text: str) -> bool:
    return all(character.isspace() or category(character)[0] == "P" for character in text)
