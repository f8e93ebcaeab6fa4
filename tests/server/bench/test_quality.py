"""The measures of quality: what they count, and how a report and a plot show it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import ModelConfig
from server.bench.quality import chart, embedding, language, report
from server.bench.quality.client import Heard, Said, unit_vectors
from server.bench.quality.facts import FACTS, is_right
from server.bench.quality.language import Language, equal_beginning, known_facts
from server.bench.quality.measure import Measure, largest, mean, median, share
from server.bench.quality.ranks import rank_correlation
from server.bench.quality.recordings import Clip
from server.bench.quality.sentences import PASSAGES, QUESTIONS
from server.bench.quality.subject import Subject, precision_of
from server.bench.quality.transcription import start_errors, word_error_share
from server.bench.quality.words import matched_words, normal_words, word_error_rate, word_errors

MACHINE: dict[str, Any] = {
    "date": "2026-11-28 10:00 UTC",
    "commit": "abc1234",
    "cpu": "A Processor",
    "cores": 2,
    "load_average": 1.5,
    "memory_bytes": 24 * 2**30,
    "gpus": [],
    "versions": {"torch": "2.13.0"},
}


class TestWords:
    def test_case_punctuation_and_titles_make_no_error(self) -> None:
        assert normal_words("Mr. Well-known, it's ME!") == ["mister", "well", "known", "its", "me"]

    def test_each_kind_of_error_counts_once(self) -> None:
        said = ["the cat sat on the mat", "a dog"]
        heard = ["the hat sat on mat", "a big dog"]  # one other, one missing, one more
        assert word_errors(said, heard) == (3, 8)
        assert word_error_rate(said, heard) == 3 / 8

    def test_only_what_was_misheard_is_listed(self) -> None:
        measure = word_error_share(["one two", "three four"], ["One two.", "three for"])
        assert (measure.value, measure.counted) == (25, "1 of 4 words in 2 sentences")
        assert measure.items == ("'three four', heard 'three for'",)

    def test_equal_words_are_matched(self) -> None:
        assert matched_words(["a", "b", "c"], ["x", "a", "c"]) == [(0, 1), (2, 2)]

    def test_starts_are_those_of_words_that_were_heard_rightly(self) -> None:
        clip = Clip(b"", ("one", "two"), (0.5, 1.0))
        heard = Heard("", ((" One", 0.75), (" too,", 1.5)), 1.0)
        assert start_errors([clip], [heard]) == [0.25]


class TestLanguage:
    def test_a_fact_is_a_whole_word_in_any_case(self) -> None:
        assert is_right("It is PARIS.", ("Paris",))
        assert not is_right("A parisian street", ("Paris",))
        assert not is_right("There are 14.", ("four", "4"))

    def test_wrong_facts_are_listed(self) -> None:
        answers = [words[0] for words in FACTS.values()]
        assert known_facts(answers).value == 100
        answers[1] = "Milan"
        measure = known_facts(answers)
        assert (measure.value, measure.counted) == (90, "9 of 10 facts")
        assert measure.items == ("What is the capital of Italy? 'Milan'",)

    @pytest.mark.parametrize(
        ("first", "second", "equal"),
        [([], [], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1, 5, 3], [2, 5, 3], 0)],
    )
    def test_tokens_count_up_to_the_first_other_one(
        self, first: list[int], second: list[int], equal: int
    ) -> None:
        assert equal_beginning(first, second) == equal

    def test_a_comparison(self) -> None:
        same = Said("yes", (1, 2))
        answers = (Said("no", (1, 3)), *[same] * (len(QUESTIONS) - 1))
        ours = Language("a", answers, ((-1.0, -2.0),) * len(PASSAGES))
        other = Language("b", (same,) * len(QUESTIONS), ((-1.5, -1.0),) * len(PASSAGES))
        found = {each.name: each for each in language.compare(ours, other)}
        assert {each.part for each in found.values()} == {"against b"}
        assert found["same answer"].counted == "7 of 8 answers"
        assert found["same answer"].items == (f"{QUESTIONS[0]} 'no', not 'yes'",)
        assert found["same tokens up to the first other one"].counted == "15 of 16 tokens"
        assert found["change of log probability"].value == -0.25  # of +0.5 and -1
        assert found["distance of log probability"].value == 0.75

    def test_tokens_of_another_tokenizer_are_not_paired(self) -> None:
        answers = (Said("yes", (1,)),) * len(QUESTIONS)
        ours = Language("a", answers, ((-1.0,),) * len(PASSAGES))
        other = Language("b", answers, ((-1.0, -1.0),) * len(PASSAGES))
        assert [each.unit for each in language.compare(ours, other)] == ["%", "%"]


class TestEmbedding:
    def test_equal_values_share_their_rank(self) -> None:
        assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
        assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
        # Ranks 1, 2.5, 2.5 and 4.
        assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(math.sqrt(0.9))

    def test_vectors_have_length_one(self) -> None:
        assert unit_vectors([[3, 4]]).tolist() == [[0.6, 0.8]]

    def test_the_text_with_the_largest_difference_is_named(self) -> None:
        vectors = np.zeros((len(embedding.TEXTS), 2))
        others = vectors.copy()
        others[3, 1] = 0.5
        measure = embedding.difference("difference", vectors, others)
        assert measure.value == 0.5
        assert measure.items == (f"largest: {embedding.TEXTS[3]}",)


class TestMeasures:
    def test_a_share_of_nothing_is_none(self) -> None:
        with pytest.raises(ValueError, match="no answers"):
            share("same answer", 0, 0, "answers")

    def test_spreads(self) -> None:
        of_median = median("m", [1, 2, 3, 4, 5], "clips", higher_is_better=False)
        assert (of_median.value, of_median.low, of_median.high) == (3, 2, 4)
        of_mean = mean("m", [1, 3], "tokens", higher_is_better=None)
        # The standard deviation is the root of 2; the error is that over the root of 2.
        assert of_mean.value == 2
        assert of_mean.low == pytest.approx(1)
        assert of_mean.high == pytest.approx(3)
        assert mean("m", [1], "tokens", higher_is_better=None).low is None
        assert largest("d", [0.0, 0.0], ["a", "b"], "texts").items == ()


class TestReport:
    def subject(self, model: str, value: float) -> Subject:
        measures = (
            Measure("rate", value, "8 words", "%", False, items=("'a', heard 'b|c'",)),
            Measure("speed", 2.0, "3 clips", part="a voice", low=1.5, high=2.5, spread="quartiles"),
        )
        return Subject(model, "generate", "me/it", {"dtype": "bfloat16"}, measures, ("a reason",))

    def test_the_table_has_every_count_and_the_page_every_item(self, tmp_path: Path) -> None:
        page, data = report.write(tmp_path, [self.subject("m", 12.5)], MACHINE, "the command")
        text = page.read_text()
        assert "| m | bfloat16 | rate |  | 12.5 % |  | 8 words |" in text
        assert "| m | bfloat16 | speed | a voice | 2 | 1.5 to 2.5 (quartiles) | 3 clips |" in text
        assert "  * 'a', heard 'b|c'" in text
        assert "m: not measured: a reason" in text
        assert "the command" in text and "2 cores" in text and "no GPU" in text
        document = json.loads(data.read_text())
        assert document["models"][0]["measures"][0]["value"] == 12.5

    def test_a_panel_has_a_bar_for_each_model(self, tmp_path: Path) -> None:
        subjects = [self.subject("m", 12.5), self.subject("n", 0.0)]
        panels = chart.bars(subjects)
        assert [label for label, _ in panels["rate"]] == ["m (bfloat16)", "n (bfloat16)"]
        assert [label for label, _ in panels["speed"]][1] == "n (bfloat16)\na voice"
        (path,) = chart.draw(subjects, tmp_path)
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_the_numbers_are_those_that_auto_stands_for(self) -> None:
        whisper = ModelConfig(id="w", runtime="whisper", task="transcribe", source="me/it")
        assert precision_of(whisper, "cpu") == {"compute_type": "int8"}
        assert precision_of(whisper, "cuda") == {"compute_type": "float16"}
        assert precision_of(whisper, "") == {"compute_type": "auto"}
