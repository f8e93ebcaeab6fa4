"""Fill-mask: the likeliest tokens in the place of each mask, as Hugging Face's pipeline has them.

Nothing here imports vLLM before there is a model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine.errors import InvalidRequest
from engine.words import echoed

MOST_FILLED = 10_000
"""Entries of an answer: masks of all inputs times `top_k`. Each has its text written anew."""

MOST_TARGETS = 1_000


class FillMaskBody(BaseModel):
    """The body of `POST /v1/fill-mask`, without the object `parameters` that it may have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    inputs: str | list[str]
    top_k: int = Field(default=5, ge=1, le=1_000)
    targets: str | list[str] | None = None


def flat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the fields of `parameters`, where Hugging Face's clients put them, beside.

    Raises:
        InvalidRequest: naming the field.

    """
    given = dict(body)
    parameters = given.pop("parameters", None)
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise InvalidRequest("parameters: it is an object.", param="parameters")
    for name, value in parameters.items():
        if name not in ("top_k", "targets"):
            param = f"parameters.{name}"
            raise InvalidRequest(f"Unknown parameter: {echoed(param)}.", param=param)
        if given.get(name) is not None:
            raise InvalidRequest(f"{name}: 'parameters' has it, too.", param=name)
        given[name] = value
    # Null means the default.
    return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A text in tokens."""

    tokens: list[int]
    masks: list[int]
    """Their places."""


class MaskFiller:
    """Fills masks by a loaded model."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()

    @property
    def mask(self) -> str:
        """The text that stands for a mask."""
        return str(self._tokenizer.mask_token)

    async def answer(self, body: FillMaskBody, request_id: str, lora: Any = None) -> bytes:
        """The document of the answer.

        Raises:
            InvalidRequest: naming the field.

        """
        prompts, targets = await asyncio.to_thread(self._read, body)
        runs = [
            asyncio.ensure_future(self._run(prompt, body, targets, f"{request_id}-{index}", lora))
            for index, prompt in enumerate(prompts)
        ]
        try:
            found = await asyncio.gather(*runs)
        except BaseException:
            for run in runs:
                run.cancel()
            await asyncio.wait(runs)
            raise
        return await asyncio.to_thread(self._document, body, prompts, found)

    def _read(self, body: FillMaskBody) -> tuple[list[_Prompt], list[int] | None]:
        if isinstance(body.inputs, str):
            prompts = [self._prompt(body.inputs, "inputs")]
        else:
            prompts = [
                self._prompt(text, f"inputs[{index}]") for index, text in enumerate(body.inputs)
            ]
        targets = None if body.targets is None else self._target_tokens(body.targets)
        each = body.top_k if targets is None else min(body.top_k, len(targets))
        filled = each * sum(len(prompt.masks) for prompt in prompts)
        if filled > MOST_FILLED:
            raise InvalidRequest(
                f"inputs: their masks times 'top_k' are {filled}, and at most {MOST_FILLED} are"
                " served.",
                param="inputs",
            )
        return prompts, targets

    def _prompt(self, text: str, param: str) -> _Prompt:
        tokens = self._tokenizer(text).input_ids
        longest = self._llm.model_config.max_model_len
        if len(tokens) > longest:
            raise InvalidRequest(
                f"{param}: it is {len(tokens)} tokens long, and the model takes {longest}.",
                param=param,
            )
        wanted = self._tokenizer.mask_token_id
        masks = [place for place, token in enumerate(tokens) if token == wanted]
        if not masks:
            raise InvalidRequest(
                f"{param}: it has no mask; the model's is {self.mask!r}.", param=param
            )
        return _Prompt(tokens, masks)

    def _target_tokens(self, targets: str | Sequence[str]) -> list[int]:
        """The token of each target.

        Hugging Face's pipeline takes the first token of a target that is several. Of a Thai word
        that is often the mark of a word's beginning, so here it is an error.
        """
        several = not isinstance(targets, str)
        listed = list(targets) if several else [targets]
        if not 1 <= len(listed) <= MOST_TARGETS:
            raise InvalidRequest(f"targets: it holds 1 to {MOST_TARGETS} texts.", param="targets")
        found = []
        for index, target in enumerate(listed):
            token = self._tokenizer.convert_tokens_to_ids(target)
            if token in (None, self._tokenizer.unk_token_id):
                tokens = self._tokenizer(target, add_special_tokens=False).input_ids
                if len(tokens) != 1:
                    param = f"targets[{index}]" if several else "targets"
                    raise InvalidRequest(
                        f"{param}: {echoed(target)} is {len(tokens)} tokens of the model, not one.",
                        param=param,
                    )
                (token,) = tokens
            found.append(int(token))
        return list(dict.fromkeys(found))

    async def _run(
        self,
        prompt: _Prompt,
        body: FillMaskBody,
        targets: list[int] | None,
        request_id: str,
        lora: Any,
    ) -> Any:
        from engine.runtimes.vllm.masked_models import FILL_TASK, MASKS, TARGETS, TOP_K
        from vllm import PoolingParams

        asked = {MASKS: prompt.masks, TOP_K: body.top_k, TARGETS: targets}
        params = PoolingParams(task=FILL_TASK, extra_kwargs=asked)
        params.verify(self._llm.model_config)
        found = None
        async for output in self._llm.encode(
            {"prompt_token_ids": prompt.tokens}, params, request_id, lora_request=lora
        ):
            found = output.outputs.data
        return found

    def _document(self, body: FillMaskBody, prompts: Sequence[_Prompt], found: Any) -> bytes:
        filled = [
            self._filled(prompt, each.tolist()) for prompt, each in zip(prompts, found, strict=True)
        ]
        answer = filled if isinstance(body.inputs, list) else filled[0]
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def _filled(self, prompt: _Prompt, found: Sequence[Sequence[Sequence[float]]]) -> list[Any]:
        """The entries of one mask, or a list of them for each of several."""
        single = len(prompt.masks) == 1
        rows = []
        for place, (scores, ids) in zip(prompt.masks, found, strict=True):
            row = []
            for score, token in zip(scores, map(int, ids), strict=True):
                tokens = list(prompt.tokens)
                tokens[place] = token
                tokens = [each for each in tokens if each != self._tokenizer.pad_token_id]
                row.append(
                    {
                        "score": score,
                        "token": token,
                        "token_str": self._tokenizer.decode([token]),
                        # Of several masks, the others would go with the special tokens.
                        "sequence": self._tokenizer.decode(tokens, skip_special_tokens=single),
                    }
                )
            rows.append(row)
        return rows[0] if single else rows
