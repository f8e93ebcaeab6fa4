"""Masked language models in vLLM: one set of weights that embeds texts and fills masks.

vLLM 0.32 drops the head of such a checkpoint, or embeds nothing with it, and has no CamemBERT.
Here the head stays. It is run for the masked tokens only, as a vocabulary of 25,000 would give
100 kB a token.

Importing this module imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from engine.runtimes.vllm.checkpoint import MASKS_AT_ONCE
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.tokwise.methods import AllPool
from vllm.model_executor.models.bert import BertEmbeddingModel
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.roberta import RobertaEmbeddingModel
from vllm.model_executor.models.utils import AutoWeightsLoader

FILL_TASK = "token_classify"
"""vLLM's name of a task that gives each token scores. A model of this module has no other use."""

MASKS, TOP_K, TARGETS = "masks", "top_k", "targets"
"""What a request says in vLLM's parameters of a pooling: positions, a number, and token ids."""


class MaskedHead(nn.Module):  # type: ignore[misc]
    """From the last hidden state of a token to its logits.

    The last matrix is the embedding of the tokens, unless the checkpoint has one of its own.
    """

    def __init__(self, config: Any, activation: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = nn.Linear(width, width)
        self.activation = ACT2FN[activation]
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        tied = getattr(config, "tie_word_embeddings", True)
        self.decoder = None if tied else nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The logits, as float32."""
        hidden = hidden.to(self.dense.weight.dtype)
        hidden = self.layer_norm(self.activation(self.dense(hidden)))
        matrix = embedding if self.decoder is None else self.decoder.weight
        # vLLM pads the vocabulary.
        logits = nn.functional.linear(hidden, matrix[: len(self.bias)], self.bias)
        return logits.float()


class MaskPooler(Pooler):  # type: ignore[misc]
    """The likeliest tokens for each mask of a request.

    An output has the shape (masks, 2, k): probabilities, and the ids of their tokens.
    """

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.pooling = AllPool()
        self._logits = logits

    def get_supported_tasks(self) -> Set[str]:
        """The one of vLLM's names."""
        return {FILL_TASK}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> Any:
        """One output for each request, None for one whose prompt is not whole yet."""
        pooled = self.pooling(hidden_states, pooling_metadata)
        return [
            None if states is None else self._filled(states, params.extra_kwargs or {})
            for states, params in zip(pooled, pooling_metadata.pooling_params, strict=True)
        ]

    def _filled(self, states: torch.Tensor, asked: dict[str, Any]) -> torch.Tensor:
        # vLLM's trial run at the load asks for nothing.
        masks, top_k, targets = asked.get(MASKS, [0]), asked.get(TOP_K, 1), asked.get(TARGETS)
        found = []
        for start in range(0, len(masks), MASKS_AT_ONCE):
            rows = states[masks[start : start + MASKS_AT_ONCE]]
            probabilities = self._logits(rows).softmax(dim=-1)
            ids = None
            if targets is not None:
                ids = torch.tensor(targets, device=rows.device)
                probabilities = probabilities[:, ids]
            values, places = probabilities.topk(min(top_k, probabilities.shape[-1]))
            tokens = places if ids is None else ids[places]
            # Float64 holds each id exactly.
            found.append(torch.stack((values.double(), tokens.double()), dim=1))
        return torch.cat(found)


class _Masked(BertEmbeddingModel):  # type: ignore[misc]
    """What both families share: the pooler, and how the weights are named."""

    encoder_prefix = ""
    """Of the encoder's weights in a checkpoint. Some have none."""
    head_prefix = ""
    """Of the head's."""
    head_names: Mapping[str, str] = {}
    """How names begin after that prefix, and what the head calls it."""
    pooler: Any

    def _build_pooler(self, pooler_config: Any) -> DispatchPooler:
        poolers = DispatchPooler.for_embedding(pooler_config).poolers_by_task
        self.head = MaskedHead(self.config, self._activation())
        return DispatchPooler({**poolers, FILL_TASK: MaskPooler(self._to_logits)})

    def _activation(self) -> str:
        return "gelu"

    def _to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(hidden, self.model.embeddings.word_embeddings.weight)
        return found

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load encoder and head. Without a head in the checkpoint the model only embeds."""
        listed = list(weights)
        if not any(name.startswith(self.head_prefix) for name, _ in listed):
            del self.head
            poolers = dict(self.pooler.poolers_by_task)
            del poolers[FILL_TASK]
            self.pooler = DispatchPooler(poolers)
        renamed = ((self._renamed(name), tensor) for name, tensor in listed)
        return AutoWeightsLoader(self).load_weights(
            [(name, tensor) for name, tensor in renamed if name is not None]
        )

    def _renamed(self, name: str) -> str | None:
        if name.startswith(self.head_prefix):
            own = self._renamed_in_head(name.removeprefix(self.head_prefix))
            return None if own is None else f"head.{own}"
        if name.startswith("cls."):
            return None  # BERT's other head, which tells whether two sentences follow each other
        return f"model.{name.removeprefix(self.encoder_prefix)}"

    def _renamed_in_head(self, name: str) -> str | None:
        if self.head.decoder is None and name.startswith("decoder."):
            return None  # copies of the embedding and of `bias`
        if self.head.decoder is not None and name in ("bias", "decoder.bias"):
            # Of two that are not tied, transformers adds the decoder's.
            return None if name == "bias" else name.removeprefix("decoder.")
        begin = next((each for each in self.head_names if name.startswith(each)), "")
        return self.head_names.get(begin, "") + name.removeprefix(begin)


# sentence-transformers takes the mean of a model that does not say.
@default_pooling_type(seq_pooling_type="MEAN", tok_pooling_type="ALL")
class MaskedRoberta(_Masked, RobertaEmbeddingModel):  # type: ignore[misc]
    """RoBERTa, XLM-RoBERTa and CamemBERT."""

    encoder_prefix, head_prefix = "roberta.", "lm_head."


@default_pooling_type(seq_pooling_type="MEAN", tok_pooling_type="ALL")
class MaskedBert(_Masked):
    """BERT, also with the oldest names of its weights."""

    encoder_prefix, head_prefix = "bert.", "cls.predictions."
    head_names = MappingProxyType(
        {
            "transform.dense.": "dense.",
            "transform.LayerNorm.gamma": "layer_norm.weight",
            "transform.LayerNorm.beta": "layer_norm.bias",
            "transform.LayerNorm.": "layer_norm.",
        }
    )

    def _activation(self) -> str:
        return str(self.config.hidden_act)


HERE, ROBERTA = "engine.runtimes.vllm.masked_models", "vllm.model_executor.models.roberta"
ARCHITECTURES = {
    "BertForMaskedLM": f"{HERE}:MaskedBert",
    "RobertaForMaskedLM": f"{HERE}:MaskedRoberta",
    "XLMRobertaForMaskedLM": f"{HERE}:MaskedRoberta",
    "CamembertForMaskedLM": f"{HERE}:MaskedRoberta",
    "CamembertModel": f"{HERE}:MaskedRoberta",
    "CamembertForSequenceClassification": f"{ROBERTA}:RobertaForSequenceClassification",
}
"""vLLM's name of each model, and the class. CamemBERT is a RoBERTa with another tokenizer."""


def register_masked_models() -> None:
    """Have vLLM take these classes. Call once, before the first engine."""
    for name, place in ARCHITECTURES.items():
        ModelRegistry.register_model(name, place)
