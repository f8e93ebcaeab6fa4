"""Masked language models: embeddings and filled masks are those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CamembertConfig,
    CamembertForSequenceClassification,
    Pipeline,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    pipeline,
)

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.events import Document
from engine.memory.host_memory import HostMemory
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from engine.runtimes.vllm.wangchanberta import as_trained
from engine.starters.registry import ensure_starter

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

THAI = (
    "วันนี้อากาศดีมาก ท้องฟ้าแจ่มใส",
    "รถไฟออกจากสถานีหัวลำโพงตอนเช้า และถึงเชียงใหม่ตอนเย็น",
    "ขอบคุณมากกกกกครับ (ยินดี)\nThe Train WAITS",
    "เด็กนักเรียนอ่านหนังสือในห้องสมุดของโรงเรียนทุกวัน " * 5,
)
MASKED = (
    "วันนี้<mask>ดีมาก ท้องฟ้าแจ่มใส",
    "ผมชอบกิน<mask>กับไข่ดาว แต่น้องสาวชอบ<mask>",
)
PLAIN = ("The weather is [MASK] today.", "A [MASK] stands on the [MASK].")
OPTIONS = {"dtype": "float32", "max_num_seqs": 16}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def bert(folder: Path, starter: Path, *, tied: bool) -> None:
    """A BERT with the words' own output matrix or none."""
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(starter)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        hidden_act="gelu_new",
        tie_word_embeddings=tied,
    )
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias, std=0.3)
    model.save_pretrained(folder)


def xlm_roberta(folder: Path, starter: Path) -> None:
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(starter)
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(
        **SHAPE, vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1
    )
    XLMRobertaForMaskedLM(config).save_pretrained(folder)


def camembert_classifier(folder: Path, starter: Path) -> None:
    torch.manual_seed(4)
    tokenizer = AutoTokenizer.from_pretrained(starter)
    tokenizer.save_pretrained(folder)
    config = CamembertConfig(
        **SHAPE, vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, num_labels=3
    )
    CamembertForSequenceClassification(config).save_pretrained(folder)


def without_head(folder: Path, starter: Path) -> None:
    shutil.copytree(starter, folder)
    path = folder / "model.safetensors"
    kept = {name: each for name, each in load_file(path).items() if name.startswith("roberta.")}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def models(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("masked")
    thai, english = (ensure_starter(name, cache_dir) for name in ("tiny-camembert", "tiny-embed"))
    bert(folder / "bert", english, tied=True)
    bert(folder / "untied", english, tied=False)
    xlm_roberta(folder / "xlm", thai)
    camembert_classifier(folder / "labels", thai)
    without_head(folder / "headless", thai)
    entries: dict[str, tuple[str, Path, Mapping[str, Any]]] = {
        "thai": ("embed", thai, {}),
        "cls": ("embed", thai, {"pooling": "cls", "normalize": False, "preprocessing": "none"}),
        "bert": ("embed", folder / "bert", {}),
        "untied": ("embed", folder / "untied", {}),
        "xlm": ("embed", folder / "xlm", {}),
        "headless": ("embed", folder / "headless", {}),
        "labels": ("classify", folder / "labels", {}),
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

    async def ask(self, name: str, operation: TextOperation, /, **body: Any) -> Any:
        prepared = self.runtime.prepare(
            self.models[name], TextRequest(name, operation, body, "test")
        )
        (event,) = [each async for each in (await self.load(name)).run(prepared)]
        assert isinstance(event, Document)
        self.input_tokens = prepared.usage.input_tokens
        return json.loads(event.body)

    async def fill(self, name: str, inputs: Any, **body: Any) -> Any:
        return await self.ask(name, TextOperation.FILL_MASK, inputs=inputs, **body)

    async def vectors(self, name: str, inputs: Any) -> torch.Tensor:
        answer = await self.ask(name, TextOperation.EMBEDDINGS, input=inputs)
        return torch.tensor([each["embedding"] for each in answer["data"]])

    def pipeline(self, name: str) -> Pipeline:
        folder = self.models[name].source
        model = AutoModelForMaskedLM.from_pretrained(folder).eval()
        return pipeline("fill-mask", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def served(
    vllm_runtime: VllmRuntime, models: dict[str, ModelConfig]
) -> AsyncIterator[Served]:
    found = Served(vllm_runtime, models)
    yield found
    for each in found.loaded.values():
        await vllm_runtime.unload(each)


def states(folder: str, text: str) -> torch.Tensor:
    """The last hidden states of transformers' own model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return found


def check_filled(found: Any, expected: Any) -> None:
    """Entries or lists of them, which are the same but for rounding."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
        for name in ("token", "token_str", "sequence"):
            assert found[name] == expected[name]
        return
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        check_filled(one, other)


async def test_an_embedding_is_the_mean_of_what_was_read(served: Served) -> None:
    source = served.models["thai"].source
    found = await served.vectors("thai", [*THAI])
    for vector, text in zip(found, THAI, strict=True):
        mean = states(source, as_trained(text)).mean(dim=0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-2


async def test_pooling_length_and_preprocessing_may_be_chosen(served: Served) -> None:
    found = await served.vectors("cls", [*THAI])
    for vector, text in zip(found, THAI, strict=True):
        first = states(served.models["cls"].source, text)[0]
        torch.testing.assert_close(vector, first, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bert", "untied", "xlm", "headless"])
async def test_the_other_masked_models_embed_by_the_mean(served: Served, name: str) -> None:
    texts = THAI[:2] if name in ("xlm", "headless") else ("hello", "A locomotive waits.")
    found = await served.vectors(name, [*texts])
    for vector, text in zip(found, texts, strict=True):
        text = as_trained(text) if name == "headless" else text
        mean = states(served.models[name].source, text).mean(dim=0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["thai", "bert", "untied", "xlm"])
async def test_masks_are_filled_as_in_transformers(served: Served, name: str) -> None:
    texts = PLAIN if "[MASK]" in served.pipeline(name).tokenizer.mask_token else MASKED
    pipe = served.pipeline(name)
    rewritten: Callable[[str], str] = str
    if name == "thai":

        def rewritten(text: str) -> str:
            return as_trained(text, "<mask>")

    for text in texts:
        check_filled(await served.fill(name, text), pipe(rewritten(text)))
        check_filled(
            await served.fill(name, text, parameters={"top_k": 40}),
            pipe(rewritten(text), top_k=40),
        )
    several = await served.fill(name, [*texts], top_k=2)
    check_filled(several, pipe([*map(rewritten, texts)], top_k=2))
    tokens = pipe.tokenizer(rewritten(texts[0])).input_ids
    await served.fill(name, texts[0])
    assert served.input_tokens == len(tokens)


async def test_targets_are_all_that_is_looked_at(served: Served) -> None:
    pipe, text = served.pipeline("thai"), as_trained(MASKED[0], "<mask>")
    for targets in (["มาก", "▁", "มาก"], "มาก"):
        found = await served.fill("thai", MASKED[0], targets=targets)
        check_filled(found, pipe(text, targets=targets))
    with pytest.raises(InvalidRequest, match=r"targets\[1\]: 'มากมาก' is \d tokens"):
        await served.fill("thai", MASKED[0], targets=["มาก", "มากมาก"])


async def test_what_cannot_be_filled_is_refused_by_its_field(served: Served) -> None:
    await served.load("thai")
    for body, param in (
        ({"inputs": "ไม่มี"}, "inputs"),
        ({"inputs": [MASKED[0], "ไม่มี"]}, "inputs[1]"),
        ({"inputs": "<mask>" + "มา" * 600}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": [3]}, "inputs[0]"),
        ({}, "inputs"),
        ({"inputs": MASKED[0], "top_k": 0}, "top_k"),
        ({"inputs": MASKED[0], "top_k": True}, "top_k"),
        ({"inputs": MASKED[0], "targets": []}, "targets"),
        ({"inputs": MASKED[0], "targets": [""]}, "targets[0]"),
        ({"inputs": MASKED[0], "nope": 1}, "nope"),
        ({"inputs": MASKED[0], "parameters": 1}, "parameters"),
        ({"inputs": MASKED[0], "parameters": {"k": 1}}, "parameters.k"),
        ({"inputs": MASKED[0], "top_k": 1, "parameters": {"top_k": 1}}, "top_k"),
        ({"inputs": ["<mask>" * 100] * 101, "top_k": 1}, "inputs"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await served.ask("thai", TextOperation.FILL_MASK, **body)
        assert caught.value.param == param, body
    for name in ("headless", "labels"):
        with pytest.raises(InvalidRequest) as caught:
            await served.fill(name, MASKED[0])
        assert caught.value.param == "model"


async def test_a_batch_of_both_kinds_is_answered(served: Served) -> None:
    """Requests of both tasks meet in one step."""
    import asyncio

    usual = await served.vectors("thai", [*THAI]), await served.fill("thai", [*MASKED])
    asked = [
        each
        for _ in range(4)
        for each in (served.vectors("thai", [*THAI]), served.fill("thai", [*MASKED]))
    ]
    for index, found in enumerate(await asyncio.gather(*asked)):
        if index % 2:
            check_filled(found, usual[1])
        else:
            torch.testing.assert_close(found, usual[0], atol=1e-5, rtol=0)


async def test_every_position_can_be_read_and_none_beyond(served: Served) -> None:
    """64 of the 66 rows are for tokens."""
    model = await served.load("xlm")
    assert model.llm.model_config.max_model_len == 64
    assert torch.isfinite(await served.vectors("xlm", [10] * 64)).all()
    with pytest.raises(InvalidRequest, match="64"):
        await served.vectors("xlm", [10] * 65)
    wrong = served.models["xlm"].model_copy(update={"options": {**OPTIONS, "max_model_len": 66}})
    with pytest.raises(LoadFailed, match="64 positions"):
        await served.runtime.load(wrong, pytest.fail)


async def test_labels_of_a_camembert(served: Served) -> None:
    folder = served.models["labels"].source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = CamembertForSequenceClassification.from_pretrained(folder).eval()
    texts = [THAI[0], "ขอบคุณ"]
    answer = await served.ask("labels", TextOperation.CLASSIFY, input=texts)
    for each, text in zip(answer["data"], texts, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(as_trained(text), return_tensors="pt")).logits[0]
        assert each["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["thai", "untied"])
async def test_it_parks_and_wakes(
    served: Served, models: dict[str, ModelConfig], name: str
) -> None:
    text = MASKED[1] if name == "thai" else PLAIN[1]
    runtime = served.runtime
    before = await served.fill(name, text), await served.vectors(name, text)
    with_copies = replace(runtime.context, host=HostMemory(2**28, pinned=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "context", with_copies)
        loaded = await runtime.load(models[name], pytest.fail)
        assert isinstance(loaded, VllmModel)
        blocks = {each.name: each for each in loaded.blocks()}
        estimated = {each.name: each for each in runtime.estimate(models[name]).blocks}
        expected = estimated["weights"].nbytes
        # vLLM pads the rows of three embeddings to a multiple of 64.
        padding = 3 * 64 * loaded.llm.model_config.hf_config.hidden_size * 4
        assert 0 <= blocks["weights"].nbytes - expected < padding
        await runtime.park(loaded, list(blocks))
        await runtime.wake(loaded, list(blocks))
        usual, served.loaded[name] = served.loaded[name], loaded
        try:
            after = await served.fill(name, text), await served.vectors(name, text)
        finally:
            served.loaded[name] = usual
            await runtime.unload(loaded)
    check_filled(after[0], before[0])
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=0)
