"""What the models of each task can be asked for."""

from __future__ import annotations

from collections.abc import Mapping

from engine.requests import TextOperation

TOKENIZER_OPERATIONS = frozenset({TextOperation.TOKENIZE, TextOperation.DETOKENIZE})
SCORE_OPERATIONS = frozenset({TextOperation.RERANK, TextOperation.SCORE})
CLASSIFY_OPERATIONS = frozenset({TextOperation.CLASSIFY, TextOperation.MODERATION})
ANTHROPIC_OPERATIONS = frozenset({TextOperation.MESSAGES, TextOperation.COUNT_TOKENS})
OPERATIONS: Mapping[str, frozenset[TextOperation]] = {
    "generate": frozenset(TextOperation)
    - {
        TextOperation.EMBEDDINGS,
        TextOperation.FILL_MASK,
        *SCORE_OPERATIONS,
        *CLASSIFY_OPERATIONS,
    },
    # Two embeddings have a cosine, so such a model ranks, too. A masked one fills masks.
    "embed": TOKENIZER_OPERATIONS
    | SCORE_OPERATIONS
    | {TextOperation.EMBEDDINGS, TextOperation.FILL_MASK},
    "rerank": TOKENIZER_OPERATIONS | SCORE_OPERATIONS,
    "classify": TOKENIZER_OPERATIONS | CLASSIFY_OPERATIONS,
}
"""What the models of each task can do."""
