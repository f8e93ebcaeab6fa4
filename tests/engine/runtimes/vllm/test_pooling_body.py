"""Rerank, moderation and prompts, without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from engine.errors import InvalidRequest, LoadFailed
from engine.requests import TextOperation
from engine.runtimes.vllm.options import ModerationOptions, VllmOptions
from engine.runtimes.vllm.pooling_answers import (
    CATEGORIES,
    moderation_document,
    rerank_document,
)
from engine.runtimes.vllm.pooling_body import MOST_TEXTS, check_format, pooling_body
from engine.runtimes.vllm.prompts import FILE, Prompts, prefixed, read_prompts
from engine.runtimes.vllm.rerank_format import QWEN3_INSTRUCTION, rerank_format

RERANK = TextOperation.RERANK


def test_the_documents_of_a_rerank_become_texts() -> None:
    body: dict[str, Any] = {
        "query": {"text": "q"},
        "documents": ["a", {"text": "b", "id": 3}],
        "top_n": None,
        "return_documents": False,
        "rank_fields": ["text"],
        "max_chunks_per_doc": None,
        "truncation": True,
    }
    assert pooling_body(RERANK, body) == {
        "query": "q",
        "documents": ["a", "b"],
        "truncate_prompt_tokens": -1,
    }
    assert body["documents"][1] == {"text": "b", "id": 3}, "the client's own body is kept"


def test_a_rerank_has_a_bounded_number_of_documents() -> None:
    pooling_body(RERANK, {"query": "q", "documents": ["a"] * MOST_TEXTS})
    with pytest.raises(InvalidRequest) as caught:
        pooling_body(RERANK, {"query": "q", "documents": ["a"] * (MOST_TEXTS + 1)})
    assert caught.value.param == "documents"


def test_results_show_what_the_client_sent() -> None:
    answer = json.dumps(
        {
            "id": "score-1",
            "model": "m",
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
            "results": [
                {"index": 1, "relevance_score": 0.9, "document": {"text": "passage: b"}},
                {"index": 0, "relevance_score": 0.1, "document": {"text": "passage: a"}},
            ],
        }
    ).encode()
    body = {"documents": ["a", {"text": "b", "id": 3}]}
    found = json.loads(rerank_document(answer, body))
    assert [each["document"] for each in found["results"]] == [
        {"text": "b", "id": 3},
        {"text": "a"},
    ]
    assert found["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    bare = json.loads(rerank_document(answer, {**body, "return_documents": False}))
    assert all("document" not in each for each in bare["results"])


def moderated(probabilities: list[float], *, exclusive: bool) -> dict[str, Any]:
    options = ModerationOptions(
        categories={"ok": None, "rude": "harassment", "cruel": "harassment", "spam": "spam"}
    )
    answer = json.dumps(
        {"id": "classify-1", "model": "m", "data": [{"probs": probabilities}]}
    ).encode()
    labels = ("ok", "rude", "cruel", "spam")
    document = json.loads(moderation_document(answer, labels, options, exclusive=exclusive))
    assert document["id"] == "modr-1"
    (result,) = document["results"]
    assert isinstance(result, dict)
    return result


def test_labels_of_one_category_count_together() -> None:
    """Probabilities that exclude each other add up. Of others the largest counts."""
    found = moderated([0.4, 0.3, 0.25, 0.05], exclusive=True)
    assert found["category_scores"]["harassment"] == pytest.approx(0.55)
    assert found["flagged"] and found["categories"]["harassment"]
    found = moderated([0.9, 0.3, 0.4, 0.2], exclusive=False)
    assert found["category_scores"]["harassment"] == pytest.approx(0.4)
    assert not found["flagged"]


def test_a_moderation_has_every_category_and_those_of_the_model() -> None:
    found = moderated([0.1, 0.1, 0.1, 0.7], exclusive=True)
    assert {*found["categories"]} == {*found["category_scores"]} == {*CATEGORIES, "spam"}
    assert found["categories"]["spam"] and found["flagged"]
    assert found["category_applied_input_types"]["spam"] == ["text"]
    assert found["category_applied_input_types"]["violence"] == []
    assert not moderated([1.0, 0.0, 0.0, 0.0], exclusive=True)["flagged"]


def test_the_prompt_of_qwen3_reranker_is_its_publishers() -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    found = rerank_format(config, VllmOptions())
    assert found.overrides["is_original_qwen3_reranker"]
    assert found.overrides["classifier_from_token"] == ["no", "yes"]
    assert found.template is not None
    template = jinja2.Environment().from_string(found.template)
    pair = [{"role": "query", "content": "{{ q }}"}, {"role": "document", "content": " d\n"}]
    for given, instruction in (({}, QWEN3_INSTRUCTION), ({"instruction": "Do"}, "Do")):
        assert template.render(messages=pair, **given) == (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the"
            ' Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
            f"<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {{{{ q }}}}\n"
            "<Document>:  d\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )


@pytest.mark.parametrize(
    ("architecture", "options", "templated", "overridden"),
    [
        ("Qwen3ForSequenceClassification", {}, True, False),
        ("Qwen3ForSequenceClassification", {"reranker": "plain"}, False, False),
        ("BertForSequenceClassification", {}, False, False),
        ("Qwen2ForSequenceClassification", {"reranker": "qwen3"}, True, False),
        ("Qwen2ForSequenceClassification", {"chat_template": "own.jinja"}, True, False),
        ("JinaForRanking", {}, False, False),
    ],
)
def test_the_format_is_that_of_the_files_or_the_options(
    architecture: str, options: dict[str, Any], templated: bool, overridden: bool
) -> None:
    found = rerank_format({"architectures": [architecture]}, VllmOptions(**options))
    assert (found.template is not None) == templated
    assert bool(found.overrides) == overridden
    assert found.takes_instruction == (templated or architecture == "JinaForRanking")


def test_what_a_prompt_would_lose_is_refused() -> None:
    check_format({"truncate": False, "instruction": "x"}, templated=True, takes_instruction=True)
    for name, value in (("truncation", True), ("truncate_prompt_tokens", 9)):
        with pytest.raises(InvalidRequest, match="max_tokens_per_doc") as caught:
            check_format({name: value}, templated=True, takes_instruction=True)
        assert caught.value.param == name


def test_prompts_are_those_of_the_file_and_the_options(tmp_path: Path) -> None:
    assert read_prompts(tmp_path, VllmOptions()) == Prompts()
    texts = {"query": "q: ", "passage": "p: ", "s2s": "s: "}
    document = {"prompts": texts, "default_prompt_name": "s2s"}
    (tmp_path / FILE).write_text(json.dumps(document))
    found = read_prompts(tmp_path, VllmOptions(prompts={"query": "Q: "}))
    assert found.texts == {**texts, "query": "Q: "}
    assert found.chosen({}) == "s: "
    assert found.chosen({"input_type": "search_query"}) == "Q: "
    assert found.chosen({"input_type": "document"}) == "p: "
    assert found.chosen({"prompt_name": "s2s"}) == "s: "
    only = Prompts({"query": "q: "})
    assert only.chosen({"input_type": "passage"}) == ""
    assert only.chosen({}) == ""
    for prompts, name in ((found, "nope"), (Prompts(), "query")):
        with pytest.raises(InvalidRequest) as caught:
            prompts.chosen({"prompt_name": name})
        assert caught.value.param == "prompt_name"
    (tmp_path / FILE).write_text("[")
    with pytest.raises(LoadFailed, match=FILE):
        read_prompts(tmp_path, VllmOptions())


def test_a_prompt_stands_before_texts_only() -> None:
    assert prefixed("a", "p: ", {}) == "p: a"
    assert prefixed(["a", "b"], "p: ", {}) == ["p: a", "p: b"]
    assert prefixed([1, 2], "p: ", {}) == [1, 2]
    with pytest.raises(InvalidRequest) as caught:
        prefixed([1, 2], "p: ", {"input_type": "query"})
    assert caught.value.param == "input_type"
