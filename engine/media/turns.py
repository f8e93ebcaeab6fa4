"""When a speaker's turn begins and ends, from the probability of speech in each window.

Times are in milliseconds of audio since the beginning of the session, never of a clock: a client
that sends faster or slower than it speaks changes nothing.

The thresholds are those of silero's own VADIterator: speech begins at `threshold`, and silence
below `threshold` less 0.15. What lies between keeps the present state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

MIN_SPEECH_MS = 90
"""Shorter speech begins no turn: three windows. Loud white noise reaches 0.5 for one or two at a
time. The 250 ms of silero's batch function would be long for somebody who interrupts."""

PAUSE_MS = 200
"""Silence within a turn that is worth a transcription. People answer most often within 200 ms
(Stivers et al. 2009, in ten languages), so a longer gap may be the end."""

HYSTERESIS = 0.15
"""Of silero's VADIterator."""

LEAST_THRESHOLD = 0.01
"""For silence, as in faster-whisper, whatever the threshold for speech."""


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """A turn began. At once when it is long enough to be speech."""

    at_ms: int
    """OpenAI's audio_start_ms: the begin of speech less the padding, and not before the end of
    the turn before."""


@dataclass(frozen=True, slots=True)
class SpeechPaused:
    """A short silence within a turn: a good moment to transcribe what was said so far."""

    at_ms: int
    """Now: the end of the audio to transcribe."""
    speech_end_ms: int
    """Where the silence began."""


@dataclass(frozen=True, slots=True)
class SpeechResumed:
    """Speech goes on after a pause: what was begun on it was in vain."""

    at_ms: int
    """The begin of speech, without padding."""


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """The turn ended."""

    at_ms: int
    """OpenAI's audio_end_ms: now, with all of the silence."""
    speech_end_ms: int
    """Where the silence began."""


@dataclass(frozen=True, slots=True)
class IdleTimeout:
    """Nobody spoke for `idle_timeout_ms` after a response was heard."""

    at_ms: int
    """OpenAI's audio_end_ms: now."""
    start_ms: int
    """OpenAI's audio_start_ms: the end of the response's playback."""


TurnEvent: TypeAlias = SpeechStarted | SpeechPaused | SpeechResumed | SpeechStopped | IdleTimeout


class TurnDetector:
    """OpenAI's server_vad: a turn ends after a fixed silence."""

    def __init__(
        self,
        threshold: float = 0.5,
        prefix_padding_ms: int = 300,
        silence_duration_ms: int = 500,
        idle_timeout_ms: int | None = None,
        *,
        at_ms: int = 0,
    ) -> None:
        """The defaults are OpenAI's. `at_ms` is the audio that the session has had before."""
        self.silence_duration_ms = silence_duration_ms
        """May be changed within a turn, and holds from the next window on."""
        self._threshold = threshold
        self._silence_threshold = max(threshold - HYSTERESIS, LEAST_THRESHOLD)
        self._prefix_padding_ms = prefix_padding_ms
        self._idle_timeout_ms = idle_timeout_ms
        self._now_ms = at_ms
        self._turn_end_ms = at_ms
        self._in_turn = False
        self._paused_at_ms: int | None = None
        self._speech_ms: int | None = None
        """Where what may become a turn began."""
        self._silence_ms: int | None = None
        """Where the present silence within a turn began."""
        self._idle_ms: int | None = None

    @property
    def now_ms(self) -> int:
        """The end of the last window."""
        return self._now_ms

    @property
    def in_turn(self) -> bool:
        """Whether a turn has started and not stopped."""
        return self._in_turn

    @property
    def paused_at_ms(self) -> int | None:
        """`at_ms` of the pause that lasts; None during speech and between turns."""
        return self._paused_at_ms

    def feed(self, probabilities: Sequence[float], window_ms: int = 32) -> list[TurnEvent]:
        """What the next windows mean, in order."""
        events: list[TurnEvent] = []
        for probability in probabilities:
            begin_ms = self._now_ms
            self._now_ms += window_ms
            in_window = self._turn_window if self._in_turn else self._quiet_window
            if event := in_window(probability, begin_ms):
                events.append(event)
        return events

    def wait_for_speech(self, after_ms: int = 0) -> None:
        """Begin `idle_timeout_ms`, once `after_ms` more of audio have come.

        For the end of a response, with the playback that is still to come. OpenAI counts so too.
        A turn ends the wait; a new call begins it again.
        """
        self._idle_ms = self._now_ms + after_ms

    def cancel_wait(self) -> None:
        """No `IdleTimeout` before the next `wait_for_speech`: for the begin of a response."""
        self._idle_ms = None

    def reset(self) -> None:
        """Forget the turn, if there is one: for a client that commits or clears its audio."""
        self._end_turn()

    def _quiet_window(self, probability: float, begin_ms: int) -> TurnEvent | None:
        if probability < self._silence_threshold:
            self._speech_ms = None
        elif self._speech_ms is None and probability >= self._threshold:
            self._speech_ms = begin_ms
        if self._speech_ms is not None:
            if self._now_ms - self._speech_ms < MIN_SPEECH_MS:
                return None
            self._in_turn = True
            self._idle_ms = None
            return SpeechStarted(max(self._speech_ms - self._prefix_padding_ms, self._turn_end_ms))
        if self._idle_timeout_ms is None or self._idle_ms is None:
            return None
        if self._now_ms - self._idle_ms < self._idle_timeout_ms:
            return None
        start_ms, self._idle_ms = self._idle_ms, None
        return IdleTimeout(self._now_ms, start_ms)

    def _turn_window(self, probability: float, begin_ms: int) -> TurnEvent | None:
        if probability >= self._threshold:
            was_paused = self._paused_at_ms is not None
            self._silence_ms = self._paused_at_ms = None
            return SpeechResumed(begin_ms) if was_paused else None
        if probability >= self._silence_threshold:
            return None
        if self._silence_ms is None:
            self._silence_ms = begin_ms
        silence_ms, silent_ms = self._silence_ms, self._now_ms - self._silence_ms
        if silent_ms >= self.silence_duration_ms:
            self._end_turn()
            self._idle_ms = None
            return SpeechStopped(self._now_ms, silence_ms)
        if silent_ms >= PAUSE_MS and self._paused_at_ms is None:
            self._paused_at_ms = self._now_ms
            return SpeechPaused(self._now_ms, silence_ms)
        return None

    def _end_turn(self) -> None:
        self._in_turn = False
        self._turn_end_ms = self._now_ms
        self._paused_at_ms = self._speech_ms = self._silence_ms = None


Eagerness: TypeAlias = Literal["low", "medium", "high", "auto"]

Ending: TypeAlias = Literal["finished", "unclear", "unfinished"]

WAITS_MS: Mapping[Eagerness, Mapping[Ending, int]] = MappingProxyType(
    {
        "low": {"finished": 1000, "unclear": 4000, "unfinished": 8000},
        "medium": {"finished": 500, "unclear": 2000, "unfinished": 4000},
        "high": {"finished": 300, "unclear": 1000, "unfinished": 2000},
        "auto": {"finished": 500, "unclear": 2000, "unfinished": 4000},
    }
)
"""Silence after which a turn ends. The longest are OpenAI's: "`low`, `medium`, and `high` have max
timeouts of 8s, 4s, and 2s", and `auto` is `medium`. OpenAI publishes no others. 500 ms is its
`silence_duration_ms` and LiveKit's least delay; it is doubled for `low`, and 300 ms leaves `high`
a pause and its transcription. An unclear end waits half of the longest."""

_FINAL_MARKS = ".?!。？！．｡؟۔।॥։።"
_OPEN_MARKS = ",;:-–—、，；：،؛/"
_CLOSING = "\"'”’»›)]}」』）】"

_GO_ON = frozenset(
    (
        *("and", "or", "but", "because", "if", "the", "a", "an", "um", "uh", "er"),
        *("und", "oder", "aber", "weil", "wenn", "dass", "äh", "ähm"),
        *("et", "ou", "mais", "que", "euh"),
        *("y", "o", "pero", "porque", "e", "però", "mas"),
    )
)
"""Words after which a sentence goes on: conjunctions, articles and hesitations of English, German,
French, Spanish, Italian and Portuguese. Prepositions often end a sentence, so none is here."""


def ending(text: str) -> Ending:
    """How a transcript ends.

    A mark of sentences finishes it; Whisper sets one after almost all that sounds complete. It also
    sets a full stop after a cut, so a conjunction before it counts for more. Three dots, a comma
    and a conjunction leave it unfinished. Without a mark it is unclear, and without a word it is
    unfinished.
    """
    text = text.rstrip().rstrip(_CLOSING).rstrip()
    said = text.rstrip(_FINAL_MARKS + _OPEN_MARKS + "… ")
    if not said or text.endswith(("…", "..", *_OPEN_MARKS)):
        return "unfinished"
    if text.endswith(tuple(_FINAL_MARKS.replace(".", ""))):
        return "finished"
    word = said.split()[-1]
    # A single capital is a name or a letter: plan A.
    if (word if len(word) == 1 else word.casefold()) in _GO_ON:
        return "unfinished"
    return "finished" if text != said else "unclear"


class SemanticTurns:
    """OpenAI's semantic_vad, cheaply: the transcript at a pause decides how long to wait.

    No model judges the end, but the marks that the speech recognition sets, as AssemblyAI's turn
    detection does. At each `SpeechPaused` the caller transcribes and calls `heard`. Without an
    answer the turn ends after the longest wait.
    """

    def __init__(
        self,
        eagerness: Eagerness = "auto",
        *,
        threshold: float = 0.5,
        prefix_padding_ms: int = 300,
        at_ms: int = 0,
    ) -> None:
        self._waits_ms = WAITS_MS[eagerness]
        self._turns = TurnDetector(
            threshold, prefix_padding_ms, self._waits_ms["unfinished"], at_ms=at_ms
        )

    @property
    def now_ms(self) -> int:
        """The end of the last window."""
        return self._turns.now_ms

    @property
    def in_turn(self) -> bool:
        """Whether a turn has started and not stopped."""
        return self._turns.in_turn

    @property
    def paused_at_ms(self) -> int | None:
        """`at_ms` of the pause that lasts; None during speech and between turns."""
        return self._turns.paused_at_ms

    def feed(self, probabilities: Sequence[float], window_ms: int = 32) -> list[TurnEvent]:
        """What the next windows mean, in order. There is no `IdleTimeout`."""
        events: list[TurnEvent] = []
        for probability in probabilities:
            found = self._turns.feed([probability], window_ms)
            if any(isinstance(event, SpeechResumed | SpeechStopped) for event in found):
                self._turns.silence_duration_ms = self._waits_ms["unfinished"]
            events += found
        return events

    def heard(self, transcript: str, paused_at_ms: int) -> None:
        """Judge the transcript of the whole turn up to the pause with that `at_ms`.

        A turn that has waited long enough ends with the next window. Nothing happens if that pause
        is over.
        """
        if paused_at_ms == self._turns.paused_at_ms:
            self._turns.silence_duration_ms = self._waits_ms[ending(transcript)]

    def reset(self) -> None:
        """Forget the turn, if there is one: for a client that commits or clears its audio."""
        self._turns.reset()
        self._turns.silence_duration_ms = self._waits_ms["unfinished"]
