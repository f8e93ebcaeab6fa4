"""Turns from made-up probabilities. A window has 32 ms, so 16 windows are 512 ms."""

from __future__ import annotations

import pytest

from engine.media.turns import (
    WAITS_MS,
    Eagerness,
    IdleTimeout,
    SemanticTurns,
    SpeechPaused,
    SpeechResumed,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
    TurnEvent,
    ending,
)

SILENCE, BETWEEN, SPEECH = 0.1, 0.4, 0.9


def fed(turns: TurnDetector | SemanticTurns, *parts: tuple[float, int]) -> list[TurnEvent]:
    """The events of windows, each part a probability and a number of windows."""
    return [event for value, count in parts for event in turns.feed([value] * count)]


class TestServerVad:
    def test_a_turn_has_its_padding_its_pause_and_its_silence(self) -> None:
        turns = TurnDetector()
        assert fed(turns, (SILENCE, 20), (SPEECH, 2)) == []
        assert fed(turns, (SPEECH, 1)) == [SpeechStarted(640 - 300)]
        assert turns.in_turn
        assert fed(turns, (SPEECH, 7), (SILENCE, 6)) == []
        assert fed(turns, (SILENCE, 1)) == [SpeechPaused(960 + 224, 960)]
        assert turns.paused_at_ms == 1184
        assert fed(turns, (SILENCE, 8)) == []
        assert fed(turns, (SILENCE, 1)) == [SpeechStopped(960 + 512, 960)]
        assert not turns.in_turn and turns.paused_at_ms is None
        assert turns.now_ms == 1472
        assert fed(turns, (SILENCE, 100)) == []

    def test_speech_after_a_pause_resumes_the_turn(self) -> None:
        turns = TurnDetector()
        fed(turns, (SPEECH, 5), (SILENCE, 10))
        assert fed(turns, (SPEECH, 1)) == [SpeechResumed(480)]
        assert turns.paused_at_ms is None
        # The silence counts from anew.
        assert fed(turns, (SILENCE, 15)) == [SpeechPaused(736, 512)]
        assert fed(turns, (SILENCE, 1)) == [SpeechStopped(1024, 512)]

    def test_a_gap_between_words_is_no_event(self) -> None:
        turns = TurnDetector()
        fed(turns, (SPEECH, 5))
        assert fed(turns, (SILENCE, 6), (SPEECH, 5), (SILENCE, 6), (SPEECH, 5)) == []

    @pytest.mark.parametrize("windows", [1, 2])
    def test_a_click_starts_no_turn(self, windows: int) -> None:
        turns = TurnDetector()
        assert fed(turns, *[(SPEECH, windows), (SILENCE, 1)] * 20) == []

    def test_what_lies_between_the_thresholds_keeps_the_state(self) -> None:
        turns = TurnDetector()
        assert fed(turns, (BETWEEN, 50)) == []
        # A beginning may falter, and silence with a little noise is still one.
        assert fed(turns, (SPEECH, 1), (BETWEEN, 2)) == [SpeechStarted(1600 - 300)]
        assert fed(turns, (BETWEEN, 50)) == []
        stopped = fed(turns, *[(SILENCE, 1), (BETWEEN, 1)] * 10)
        assert stopped == [SpeechPaused(3296 + 224, 3296), SpeechStopped(3296 + 544, 3296)]

    def test_the_thresholds_follow_the_setting(self) -> None:
        high = TurnDetector(threshold=0.95)
        assert fed(high, (SPEECH, 50)) == []
        low = TurnDetector(threshold=0.05)
        assert fed(low, (SILENCE, 3)) == [SpeechStarted(0)]
        assert fed(low, (0.02, 50)) == []  # silence is below 0.01, not below -0.10
        assert fed(low, (0.0, 16))[-1] == SpeechStopped(96 + 1600 + 512, 96 + 1600)

    def test_padding_does_not_reach_into_the_turn_before(self) -> None:
        turns = TurnDetector(silence_duration_ms=100)
        assert fed(turns, (SPEECH, 5), (SILENCE, 4))[-1] == SpeechStopped(288, 160)
        assert fed(turns, (SILENCE, 2), (SPEECH, 3)) == [SpeechStarted(288)]

    def test_a_silence_that_is_shorter_than_a_pause_has_none(self) -> None:
        turns = TurnDetector(silence_duration_ms=200)
        assert fed(turns, (SPEECH, 5), (SILENCE, 20))[1:] == [SpeechStopped(160 + 224, 160)]

    def test_windows_may_have_another_length(self) -> None:
        turns = TurnDetector(prefix_padding_ms=0)
        assert turns.feed([SILENCE, SPEECH], 96) == [SpeechStarted(96)]

    def test_time_goes_on_from_where_the_session_is(self) -> None:
        turns = TurnDetector(at_ms=5000)
        assert fed(turns, (SPEECH, 3)) == [SpeechStarted(5000)]

    def test_a_reset_forgets_the_turn(self) -> None:
        turns = TurnDetector()
        fed(turns, (SPEECH, 5), (SILENCE, 10))
        turns.reset()
        assert not turns.in_turn and turns.paused_at_ms is None
        assert fed(turns, (SILENCE, 20)) == []
        fed(turns, (SPEECH, 2))
        turns.reset()
        assert fed(turns, (SPEECH, 2)) == []
        assert fed(turns, (SPEECH, 1)) == [SpeechStarted(37 * 32)]


class TestIdleTimeout:
    def test_it_comes_once_after_the_playback_of_a_response(self) -> None:
        turns = TurnDetector(idle_timeout_ms=5000)
        assert fed(turns, (SILENCE, 1000)) == []  # no response yet
        turns.wait_for_speech(after_ms=1000)
        assert fed(turns, (SILENCE, 187)) == []
        assert fed(turns, (SILENCE, 1)) == [IdleTimeout(32_000 + 6016, 33_000)]
        assert fed(turns, (SILENCE, 1000)) == []

    def test_a_turn_ends_the_wait(self) -> None:
        turns = TurnDetector(idle_timeout_ms=5000)
        turns.wait_for_speech()
        assert len(fed(turns, (SILENCE, 100), (SPEECH, 300), (SILENCE, 1000))) == 3
        fed(turns, (SPEECH, 5))
        turns.wait_for_speech()  # a response that nobody interrupts ends during speech
        assert IdleTimeout not in map(type, fed(turns, (SILENCE, 1000)))

    def test_a_response_cancels_it(self) -> None:
        turns = TurnDetector(idle_timeout_ms=5000)
        turns.wait_for_speech()
        fed(turns, (SILENCE, 100))
        turns.cancel_wait()
        assert fed(turns, (SILENCE, 1000)) == []

    def test_without_the_setting_there_is_none(self) -> None:
        turns = TurnDetector()
        turns.wait_for_speech()
        assert fed(turns, (SILENCE, 1000)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the capital of France?", "finished"),
        ("I said so. ", "finished"),
        ('He said "stop!"', "finished"),
        ("東京です。", "finished"),
        ("ما هذا؟", "finished"),
        ("We took plan A.", "finished"),
        ("What comes after and?", "finished"),
        ("hello there", "unclear"),
        ("สวัสดี", "unclear"),
        ("I would like,", "unfinished"),
        ("I would like a", "unfinished"),
        ("Bread, butter and", "unfinished"),
        ("I wanted to come, but.", "unfinished"),
        ("Well... And.", "unfinished"),
        ("Ich komme, weil", "unfinished"),
        ("Let me see...", "unfinished"),
        ("Let me see…", "unfinished"),
        ("東京、", "unfinished"),
        ("", "unfinished"),
        (" . ", "unfinished"),
    ],
)
def test_the_ending_of_a_transcript(text: str, expected: str) -> None:
    assert ending(text) == expected


class TestSemanticVad:
    LIMITS_MS: tuple[tuple[Eagerness, int], ...] = (
        ("low", 8000), ("medium", 4000), ("high", 2000), ("auto", 4000)
    )  # fmt: skip

    @pytest.mark.parametrize(("eagerness", "limit_ms"), LIMITS_MS)
    def test_without_a_transcript_it_waits_for_the_limit(
        self, eagerness: Eagerness, limit_ms: int
    ) -> None:
        turns = SemanticTurns(eagerness)
        events = fed(turns, (SPEECH, 10), (SILENCE, 300))
        assert [type(event) for event in events] == [SpeechStarted, SpeechPaused, SpeechStopped]
        assert limit_ms <= events[-1].at_ms - 320 < limit_ms + 32

    @pytest.mark.parametrize("eagerness", WAITS_MS)
    def test_the_more_it_sounds_complete_the_sooner_it_ends(self, eagerness: Eagerness) -> None:
        waits = []
        for text in ("I am done.", "I am done", "I am done and"):
            turns = SemanticTurns(eagerness)
            fed(turns, (SPEECH, 10), (SILENCE, 7))
            turns.heard(text, 320 + 224)
            (stopped,) = fed(turns, (SILENCE, 300))
            waits.append(stopped.at_ms - 320)
        assert 300 <= waits[0] < waits[1] < waits[2]
        assert waits[0] < 1050

    def test_a_late_transcript_ends_the_turn_with_the_next_window(self) -> None:
        turns = SemanticTurns("medium")
        fed(turns, (SPEECH, 10), (SILENCE, 40))
        turns.heard("Is it late?", 544)
        assert fed(turns, (SILENCE, 1)) == [SpeechStopped(320 + 41 * 32, 320)]

    def test_a_transcript_of_a_pause_that_is_over_says_nothing(self) -> None:
        turns = SemanticTurns("medium")
        fed(turns, (SPEECH, 10), (SILENCE, 7), (SPEECH, 10))
        turns.heard("I am done.", 544)
        fed(turns, (SILENCE, 7))
        turns.heard("I am done.", 544)
        assert turns.paused_at_ms == 1088
        assert fed(turns, (SILENCE, 100)) == []

    def test_what_ended_a_turn_does_not_end_the_next(self) -> None:
        turns = SemanticTurns("medium")
        fed(turns, (SPEECH, 10), (SILENCE, 40))
        turns.heard("I am done.", 544)
        assert [type(event) for event in fed(turns, (SILENCE, 1))] == [SpeechStopped]
        events = fed(turns, (SPEECH, 10), (SILENCE, 100))
        assert [type(event) for event in events] == [SpeechStarted, SpeechPaused]

    def test_each_pause_and_each_turn_is_judged_anew(self) -> None:
        turns = SemanticTurns("medium")
        for _ in range(2):
            fed(turns, (SPEECH, 10), (SILENCE, 7))
            assert turns.paused_at_ms is not None
            turns.heard("I am done.", turns.paused_at_ms)
            assert [type(event) for event in fed(turns, (SPEECH, 1))] == [SpeechResumed]
            assert [type(event) for event in fed(turns, (SILENCE, 100))] == [SpeechPaused]
            assert turns.in_turn
            turns.heard("I am done, really.", turns.now_ms - 93 * 32)
            assert [type(event) for event in fed(turns, (SILENCE, 1))] == [SpeechStopped]
        turns.reset()
        assert not turns.in_turn
