"""Fill-mask without a model: what is asked of one, and what its answer becomes."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.runtimes.vllm import fill_mask
from engine.runtimes.vllm.fill_mask import FillMaskBody, MaskFiller, flat_body

WORDS = ["<pad>", "<mask>", "<unk>", "<s>", "a", "b", "c", "d"]
SPECIAL = range(4)


class Words:
    """A tokenizer of single letters, with a sign at the beginning."""

    pad_token_id, mask_token_id, unk_token_id, mask_token = 0, 1, 2, "<mask>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        words = [word if word in WORDS else [*word] for word in text.split()]
        flat = [each for word in words for each in (word if isinstance(word, list) else [word])]
        ids = [self.convert_tokens_to_ids(each) for each in flat]
        return SimpleNamespace(input_ids=[3, *ids] if add_special_tokens else ids)

    def convert_tokens_to_ids(self, token: str) -> int:
        return WORDS.index(token) if token in WORDS else self.unk_token_id

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(WORDS[i] for i in ids if not (skip_special_tokens and i in SPECIAL))


@pytest.fixture
def filler() -> MaskFiller:
    config = SimpleNamespace(max_model_len=6)
    return MaskFiller(SimpleNamespace(get_tokenizer=Words, model_config=config))


def body(inputs: Any, **more: Any) -> FillMaskBody:
    return FillMaskBody(model="m", inputs=inputs, **more)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"parameters": 1}, "parameters"),
        ({"parameters": {"top_p": 1}}, "parameters.top_p"),
        ({"parameters": {"top_k": 1}, "top_k": 1}, "top_k"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        flat_body({"model": "m", **given})
    assert raised.value.param == param


def test_parameters_stand_beside() -> None:
    given = {"model": "m", "top_k": None, "parameters": {"top_k": 3, "targets": None}}
    assert flat_body(given) == {"model": "m", "top_k": 3}
    assert flat_body({"model": "m", "parameters": None}) == {"model": "m"}


@pytest.mark.parametrize(
    ("wrong", "param", "reason"),
    [
        (body("a b"), "inputs", "no mask; the model's is '<mask>'"),
        (body(["<mask>", "a"]), "inputs[1]", "no mask"),
        (body("a a a a a <mask>"), "inputs", "7 tokens long, and the model takes 6"),
        (body("<mask>", targets=[]), "targets", "1 to"),
        (body("<mask>", targets=["a"] * 5), "targets", "1 to 4"),
        (body("<mask>", targets="ab"), "targets", "'ab' is 2 tokens"),
        (body("<mask>", targets=["a", "ab"]), "targets[1]", "'ab' is 2 tokens"),
        (body("<mask>", top_k=11), "inputs", "are 11, and at most 10"),
        (body(["<mask> <mask>", "<mask>"], top_k=4), "inputs", "are 12, and at most 10"),
    ],
)
async def test_wrong_requests_are_named(
    filler: MaskFiller,
    wrong: FillMaskBody,
    param: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fill_mask, "MOST_FILLED", 10)
    monkeypatch.setattr(fill_mask, "MOST_TARGETS", 4)
    with pytest.raises(InvalidRequest, match=reason) as raised:
        await filler.answer(wrong, "id")
    assert raised.value.param == param


async def test_answers_have_the_form_of_the_question(
    filler: MaskFiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], Any, str]] = []

    async def run(prompt: Any, _body: Any, targets: Any, request_id: str, _lora: Any) -> Any:
        asked.append((prompt.masks, targets, request_id))
        return np.array([[[0.5, 0.25], [5, 6]]] * len(prompt.masks))

    monkeypatch.setattr(filler, "_run", run)

    async def answer(inputs: Any, **more: Any) -> Any:
        return json.loads(await filler.answer(body(inputs, **more), "id"))

    one = [
        {"score": 0.5, "token": 5, "token_str": "b", "sequence": "a b"},
        {"score": 0.25, "token": 6, "token_str": "c", "sequence": "a c"},
    ]
    assert await answer("a <mask> <pad>") == one
    assert await answer(["a <mask>"]) == [one]
    first, second = await answer("<mask> <mask> <pad>", top_k=900, targets=["b", "c", "b"])
    assert [each["sequence"] for each in first] == ["<s> b <mask>", "<s> c <mask>"]
    assert [each["sequence"] for each in second] == ["<s> <mask> b", "<s> <mask> c"]
    assert asked[-1] == ([1, 2], [5, 6], "id-0"), "each target once, and no more than those"


async def test_one_that_fails_ends_the_others(
    filler: MaskFiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    async def run(_prompt: Any, _body: Any, _targets: Any, request_id: str, _lora: Any) -> Any:
        if request_id == "id-1":
            raise RuntimeError("it broke")
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(request_id)

    monkeypatch.setattr(filler, "_run", run)
    with pytest.raises(RuntimeError, match="it broke"):
        await filler.answer(body(["<mask>"] * 3), "id")
    assert sorted(ended) == ["id-0", "id-2"]
