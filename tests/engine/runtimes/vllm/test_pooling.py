"""Rerankers, classifiers and embeddings: the scores are those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.events import Document
from engine.memory.host_memory import HostMemory
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.checkpoint import Checkpoint
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.starters.registry import ensure_starter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
]

QUERY = "What is the weather in Paris today?"
DOCUMENTS = (
    "It will be sunny with a light wind from the west.",
    "A locomotive stands on the turntable.",
    "no yes",
    "The driver asks for another track. " * 8,
)
CATEGORIES = {
    "OK": None,
    "harassment": "harassment",
    "hate": "hate",
    "sexual": "sexual",
    "violence": "of our own",
}
PROMPTS = {"query": "find: ", "document": "text: "}
OPTIONS = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16}


def xlm_roberta(folder: Path, starter: Path) -> None:
    """A cross-encoder of the architecture of bge-reranker-v2-m3."""
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(starter).save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.3,
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)


def qwen3_reranker(folder: Path, starter: Path, *, tied: bool) -> None:
    """A language model whose tokenizer has the two words that it answers."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(starter)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("yes", "no")])
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("pooling")
    starters = {
        name: ensure_starter(name, cache_dir)
        for name in ("tiny-rerank", "tiny-classify", "tiny-embed", "tiny-qwen")
    }
    xlm_roberta(folder / "xlm", starters["tiny-rerank"])
    qwen3_reranker(folder / "Qwen3-Reranker", starters["tiny-qwen"], tied=True)
    qwen3_reranker(folder / "untied", starters["tiny-qwen"], tied=False)
    shutil.copytree(starters["tiny-embed"], folder / "embed")
    (folder / "embed" / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {**PROMPTS, "query": "other: "}, "default_prompt_name": None})
    )
    shutil.copytree(starters["tiny-classify"], folder / "labels")
    config = json.loads((folder / "labels" / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (folder / "labels" / "config.json").write_text(json.dumps(config))
    entries: dict[str, tuple[str, Path, Mapping[str, Any]]] = {
        "bert": ("rerank", starters["tiny-rerank"], {}),
        "xlm": ("rerank", folder / "xlm", {}),
        "qwen3": ("rerank", folder / "Qwen3-Reranker", {"kv_cache": "16MiB"}),
        "untied": ("rerank", folder / "untied", {"kv_cache": "16MiB"}),
        "classify": (
            "classify",
            starters["tiny-classify"],
            {"moderation": {"categories": CATEGORIES, "threshold": 0.3}},
        ),
        "labels": (
            "classify",
            folder / "labels",
            {"moderation": {"categories": dict.fromkeys(CATEGORIES, "hate")}},
        ),
        "embed": (
            "embed",
            folder / "embed",
            {"prompts": {"query": PROMPTS["query"]}, "matryoshka_dimensions": [16, 64]},
        ),
    }
    return {
        name: ModelConfig(id=name, task=task, source=str(source), options={**OPTIONS, **options})
        for name, (task, source, options) in entries.items()
    }


class Served:
    """Models that stay loaded, each from its first request on."""

    def __init__(self, runtime: VllmRuntime, models: dict[str, ModelConfig]) -> None:
        self.runtime = runtime
        self.models = models
        self.loaded: dict[str, VllmModel] = {}
        self.input_tokens = 0

    async def load(self, name: str) -> VllmModel:
        if name not in self.loaded:
            found = await self.runtime.load(self.models[name], pytest.fail)
            assert isinstance(found, VllmModel)
            self.loaded[name] = found
        return self.loaded[name]

    async def ask(self, name: str, operation: TextOperation, /, **body: Any) -> dict[str, Any]:
        model = self.models[name]
        prepared = self.runtime.prepare(model, TextRequest(name, operation, body, "test"))
        (event,) = [each async for each in (await self.load(name)).run(prepared)]
        assert isinstance(event, Document)
        self.input_tokens = prepared.usage.input_tokens
        answer: dict[str, Any] = json.loads(event.body)
        return answer

    async def scores(self, name: str, **body: Any) -> list[float]:
        """The relevance of each document, in their order."""
        given = {"query": QUERY, "documents": [*DOCUMENTS], **body}
        answer = await self.ask(name, TextOperation.RERANK, **given)
        found = {each["index"]: each["relevance_score"] for each in answer["results"]}
        return [found[index] for index in range(len(DOCUMENTS))]

    async def vectors(self, inputs: Any, **body: Any) -> list[list[float]]:
        answer = await self.ask("embed", TextOperation.EMBEDDINGS, input=inputs, **body)
        return [each["embedding"] for each in answer["data"]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(
    vllm_runtime: VllmRuntime, models: dict[str, ModelConfig]
) -> AsyncIterator[Served]:
    found = Served(vllm_runtime, models)
    yield found
    for each in found.loaded.values():
        await vllm_runtime.unload(each)


def classified(folder: str, *pair: Any) -> torch.Tensor:
    """The logits of transformers' own model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for texts in zip(*pair, strict=True):
        with torch.inference_mode():
            found.append(model(**tokenizer(*texts, return_tensors="pt")).logits[0])
    return torch.stack(found)


def judged(folder: str, instruction: str) -> list[float]:
    """Scores of Qwen3-Reranker, computed as on its page."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query"
        ' and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    found = []
    for document in DOCUMENTS:
        pair = f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {document}"
        parts = (prefix, pair, suffix)
        tokens = [t for part in parts for t in tokenizer.encode(part, add_special_tokens=False)]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, -1, [no, yes]]
        found.append(float(logits.softmax(-1)[1]))
    return found


@pytest.mark.parametrize("name", ["bert", "xlm"])
async def test_a_cross_encoder_scores_as_in_transformers(served: Served, name: str) -> None:
    logits = classified(served.models[name].source, [QUERY] * len(DOCUMENTS), DOCUMENTS)
    expected = logits.sigmoid().flatten().tolist()
    assert max(expected) - min(expected) > 1e-2
    assert await served.scores(name) == pytest.approx(expected, abs=1e-4)
    raw = await served.scores(name, use_activation=False)
    assert raw == pytest.approx(logits.flatten().tolist(), abs=1e-3)


@pytest.mark.parametrize("name", ["qwen3", "untied"])
async def test_qwen3_reranker_reads_its_own_prompt(served: Served, name: str) -> None:
    source = served.models[name].source
    usual = "Given a web search query, retrieve relevant passages that answer the query"
    expected = judged(source, usual)
    assert max(expected) - min(expected) > 1e-2
    assert await served.scores(name) == pytest.approx(expected, abs=1e-4)
    asked = "Find the weather\n"
    assert await served.scores(name, instruction=asked) == pytest.approx(
        judged(source, asked), abs=1e-4
    )


@pytest.mark.parametrize("name", ["bert", "qwen3", "untied"])
async def test_a_reranker_parks_and_wakes(
    served: Served, models: dict[str, ModelConfig], name: str
) -> None:
    runtime, before = served.runtime, await served.scores(name)
    with_copies = replace(runtime.context, host=HostMemory(2**28, pinned=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "context", with_copies)
        loaded = await runtime.load(models[name], pytest.fail)
        assert isinstance(loaded, VllmModel)
        estimated = runtime.estimate(models[name]).blocks
        blocks = {each.name: each for each in loaded.blocks()}
        assert blocks["weights"].parkable
        # An original has the output embedding until it is loaded.
        (expected,) = (each.nbytes for each in estimated if each.name == "weights")
        assert 0.6 * expected < blocks["weights"].nbytes <= 1.03 * expected
        await runtime.park(loaded, list(blocks))
        await runtime.wake(loaded, list(blocks))
        usual, served.loaded[name] = served.loaded[name], loaded
        try:
            after = await served.scores(name)
        finally:
            served.loaded[name] = usual
            await runtime.unload(loaded)
    assert after == pytest.approx(before, abs=1e-5)


async def test_results_are_sorted_and_cut(served: Served) -> None:
    documents = [*DOCUMENTS[:2], {"text": DOCUMENTS[2], "id": 7}, {"text": DOCUMENTS[3]}]
    answer = await served.ask(
        "bert", TextOperation.RERANK, query={"text": QUERY}, documents=documents, top_n=3
    )
    scores = [each["relevance_score"] for each in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3
    for each in answer["results"]:
        sent = documents[each["index"]]
        assert each["document"] == ({"text": sent} if isinstance(sent, str) else sent)
    assert answer["model"] == "bert"
    assert answer["usage"]["total_tokens"] == served.input_tokens > 0
    assert answer["meta"]["tokens"]["input_tokens"] == served.input_tokens
    bare = await served.ask(
        "bert",
        TextOperation.RERANK,
        query=QUERY,
        documents=documents,
        top_n=None,
        return_documents=False,
    )
    assert {*bare["results"][0]} == {"index", "relevance_score"}
    assert len(bare["results"]) == len(documents)


async def test_a_limit_of_tokens_cuts_each_document(served: Served) -> None:
    long = [*DOCUMENTS[:3], "The driver " + "asks " * 100]
    cut = await served.scores("bert", documents=long, max_tokens_per_doc=8)
    whole = await served.scores("bert", documents=long)
    assert cut[3] != pytest.approx(whole[3], abs=1e-4)
    assert cut[2] == pytest.approx(whole[2], abs=1e-5)
    assert await served.scores("bert", max_tokens_per_doc=4096) == pytest.approx(
        await served.scores("bert"), abs=1e-5
    )
    with pytest.raises(InvalidRequest, match="512") as caught:
        await served.scores("bert", documents=[*DOCUMENTS[:3], "word " * 2000])
    assert caught.value.param == "documents"
    for name in ("truncate", "truncation"):
        await served.scores("bert", documents=[*DOCUMENTS[:3], "word " * 2000], **{name: True})


async def test_scores_of_pairs(served: Served) -> None:
    expected = await served.scores("bert")
    for one, other in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items")):
        body = {one: QUERY, other: [*DOCUMENTS]}
        answer = await served.ask("bert", TextOperation.SCORE, **body)
        assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-5)
    texts = [QUERY, DOCUMENTS[0]]
    answer = await served.ask("bert", TextOperation.SCORE, text_1=texts, text_2=texts)
    assert len(answer["data"]) == 2


async def test_labels_and_categories(served: Served) -> None:
    logits = classified(served.models["classify"].source, DOCUMENTS)
    expected = logits.softmax(-1)
    found = await served.ask("classify", TextOperation.CLASSIFY, input=[*DOCUMENTS])
    for each, row in zip(found["data"], expected, strict=True):
        assert each["probs"] == pytest.approx(row.tolist(), abs=1e-4)
        assert each["label"] == [*CATEGORIES][int(row.argmax())]
    moderated = await served.ask("classify", TextOperation.MODERATION, input=[*DOCUMENTS])
    assert len(moderated["results"]) == len(DOCUMENTS)
    for each, row in zip(moderated["results"], expected.tolist(), strict=True):
        scores = dict(zip(CATEGORIES.values(), row, strict=True))
        for category, score in scores.items():
            if category is not None:
                assert each["category_scores"][category] == pytest.approx(score, abs=1e-4)
                assert each["categories"][category] == (score >= 0.3)
                assert each["category_applied_input_types"][category] == ["text"]
        assert each["flagged"] == any(each["categories"].values())
        assert not each["categories"]["self-harm/intent"]
        assert each["category_applied_input_types"]["self-harm/intent"] == []
    parts = [{"type": "text", "text": DOCUMENTS[0]}]
    one = await served.ask("classify", TextOperation.MODERATION, input=parts)
    (one,), first = one["results"], moderated["results"][0]
    assert one["category_scores"] == pytest.approx(first["category_scores"], abs=1e-5)


async def test_labels_that_do_not_exclude_each_other_have_a_sigmoid_each(served: Served) -> None:
    expected = classified(served.models["labels"].source, DOCUMENTS).sigmoid()
    found = await served.ask("labels", TextOperation.MODERATION, input=[*DOCUMENTS])
    for each, row in zip(found["results"], expected, strict=True):
        assert row.sum() > 1
        assert each["category_scores"]["hate"] == pytest.approx(float(row.max()), abs=1e-4)


async def test_a_reranker_of_a_language_model_keeps_no_output_embedding(
    models: dict[str, ModelConfig],
) -> None:
    checkpoint = Checkpoint(Path(models["untied"].source))
    whole = checkpoint.weight_bytes("float32", "generate")
    left = whole - checkpoint.weight_bytes("float32", "rerank")
    assert left == checkpoint.embedding_bytes("float32") > 0


async def test_labels_and_moderation_must_fit(
    vllm_runtime: VllmRuntime, models: dict[str, ModelConfig]
) -> None:
    def with_(name: str, **options: Any) -> ModelConfig:
        return models[name].model_copy(update={"options": {**OPTIONS, **options}})

    vllm_runtime.estimate(models["classify"])
    lacking = {name: each for name, each in CATEGORIES.items() if name != "hate"}
    with pytest.raises(LoadFailed, match="no category for 'hate'"):
        vllm_runtime.estimate(with_("classify", moderation={"categories": lacking}))
    beyond = {**CATEGORIES, "rude": "harassment"}
    with pytest.raises(LoadFailed, match="no label 'rude'"):
        vllm_runtime.estimate(with_("classify", moderation={"categories": beyond}))
    with pytest.raises(LoadFailed, match="a reranker has one label, this one has 5"):
        vllm_runtime.estimate(models["classify"].model_copy(update={"task": "rerank"}))
    request = TextRequest("classify", TextOperation.MODERATION, {"input": "x"}, "test")
    with pytest.raises(InvalidRequest, match="'moderation'"):
        vllm_runtime.prepare(with_("classify"), request)
    with pytest.raises(LoadFailed, match="vLLM cannot classify"):
        await vllm_runtime.load(
            models["embed"].model_copy(update={"task": "classify"}), pytest.fail
        )


async def test_prompts_stand_before_what_is_embedded(served: Served) -> None:
    """Those of the options go over those of the model's file."""
    plain = await served.vectors(["find: it", "text: it", "it"])
    for name, expected in (
        ("query", plain[0]),
        ("search_query", plain[0]),
        ("document", plain[1]),
        ("passage", plain[1]),
    ):
        assert await served.vectors(["it"], input_type=name) == [pytest.approx(expected)]
    assert await served.vectors("it", prompt_name="query") == [pytest.approx(plain[0])]
    for wrong in ({"prompt_name": "nope"}, {"input_type": 3}):
        (param,) = wrong
        with pytest.raises(InvalidRequest) as caught:
            await served.vectors("it", **wrong)
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="tokens"):
        await served.vectors([5, 6], input_type="query")


async def test_an_embedding_model_ranks_by_the_cosine(served: Served) -> None:
    (query,) = await served.vectors(QUERY, input_type="query")
    documents = await served.vectors([*DOCUMENTS], input_type="document")
    expected = [sum(a * b for a, b in zip(query, each, strict=True)) for each in documents]
    assert await served.scores("embed") == pytest.approx(expected, abs=1e-4)
    body = {"text_1": QUERY, "text_2": QUERY}
    (same,) = (await served.ask("embed", TextOperation.SCORE, **body))["data"]
    assert same["score"] == pytest.approx(1.0, abs=1e-4)


async def test_an_embedding_may_be_cut(served: Served) -> None:
    (whole,) = await served.vectors("it")
    (cut,) = await served.vectors("it", dimensions=16)
    length = sum(x * x for x in whole[:16]) ** 0.5
    assert cut == pytest.approx([x / length for x in whole[:16]], abs=1e-5)
    with pytest.raises(InvalidRequest) as caught:
        await served.vectors("it", dimensions=17)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("name", "fields", "param"),
    [
        ("bert", {"documents": []}, "documents"),
        ("bert", {"documents": "one"}, "documents"),
        ("bert", {"documents": None}, "documents"),
        ("bert", {"documents": ["a", {"image": "x"}]}, "documents[1]"),
        ("bert", {"query": None}, "query"),
        ("bert", {"query": ["a", "b"]}, "query"),
        ("bert", {"top_n": -1}, "top_n"),
        ("bert", {"top_n": True}, "top_n"),
        ("bert", {"return_documents": "yes"}, "return_documents"),
        ("bert", {"rank_fields": ["title"]}, "rank_fields"),
        ("bert", {"max_chunks_per_doc": 10}, "max_chunks_per_doc"),
        ("bert", {"truncate": "END"}, "truncate"),
        ("bert", {"instruction": "find"}, "instruction"),
        ("bert", {"top_k": 3}, "top_k"),
        ("qwen3", {"truncate": True}, "truncate"),
        ("qwen3", {"truncate_prompt_tokens": 100}, "truncate_prompt_tokens"),
        ("embed", {"instruction": "find"}, "instruction"),
        ("classify", {}, "model"),
    ],
)
async def test_what_a_rerank_cannot_be_is_named(
    vllm_runtime: VllmRuntime,
    models: dict[str, ModelConfig],
    name: str,
    fields: dict[str, Any],
    param: str,
) -> None:
    """Before anything is loaded."""
    body = {"query": QUERY, "documents": [*DOCUMENTS], **fields}
    with pytest.raises(InvalidRequest) as caught:
        vllm_runtime.prepare(models[name], TextRequest(name, TextOperation.RERANK, body, "test"))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:x"}}]}, "input[0].image_url"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
    ],
)
async def test_what_a_moderation_cannot_be_is_named(
    vllm_runtime: VllmRuntime, models: dict[str, ModelConfig], fields: dict[str, Any], param: str
) -> None:
    request = TextRequest("classify", TextOperation.MODERATION, fields, "test")
    with pytest.raises(InvalidRequest) as caught:
        vllm_runtime.prepare(models["classify"], request)
    assert caught.value.param == param
