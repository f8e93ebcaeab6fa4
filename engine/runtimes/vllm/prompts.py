"""The texts that a model wants before what it embeds.

Many models embed questions and passages apart, as in "query: " and "passage: ". A checkpoint of
sentence-transformers names these texts in a file, and the configuration may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest, LoadFailed
from engine.runtimes.vllm.options import VllmOptions
from engine.words import echoed

FILE = "config_sentence_transformers.json"
FIELDS = ("input_type", "prompt_name")
"""Fields of a request that choose a prompt. The first one is Cohere's and NVIDIA's, with more names
for the same; the other is sentence-transformers' own."""

QUERY, DOCUMENT = "query", "document"
SAME = {
    QUERY: (QUERY, "search_query"),
    DOCUMENT: (DOCUMENT, "passage", "search_document", "corpus"),
}
"""The names under which a checkpoint, or an `input_type`, has the two usual prompts."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a model, by name."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str = ""
    """Before inputs of requests that name none."""

    def of(self, role: str) -> str:
        """The prompt of queries or documents; empty if there is none."""
        return next((self.texts[name] for name in SAME[role] if name in self.texts), "")

    def chosen(self, body: Mapping[str, Any]) -> str:
        """The prompt that a request names.

        Raises:
            InvalidRequest: the model has none of that name.

        """
        for param in FIELDS:
            name = body.get(param)
            if name is not None:
                return self._named(name, param)
        return self.default

    def _named(self, name: str, param: str) -> str:
        if name in self.texts:
            return self.texts[name]
        if self.texts:
            for role, names in SAME.items():
                if name in names:
                    # Where a model has prompts, but none of this role, that text stands alone.
                    return self.of(role)
            known = ", ".join(sorted(map(repr, self.texts)))
            said = f"the model has no prompt {echoed(name)}; it has {known}"
        else:
            said = "the model has no prompts"
        raise InvalidRequest(f"{param}: {said}.", param=param)


def read_prompts(folder: Path, options: VllmOptions) -> Prompts:
    """The prompts of a model's folder, and over them those of its options.

    Raises:
        LoadFailed: the folder's file cannot be read.

    """
    given = dict(options.prompts or {})
    path = folder / FILE
    if not path.exists():
        return Prompts(given)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        texts = {str(name): str(text) for name, text in (document.get("prompts") or {}).items()}
        default = document.get("default_prompt_name")
    except (OSError, ValueError, AttributeError) as error:
        raise LoadFailed(f"{folder.name}: cannot read {FILE}: {error}") from error
    texts |= given
    return Prompts(texts, texts.get(str(default), ""))


def check_choice(body: Mapping[str, Any]) -> None:
    """Refuse a choice of a prompt that no model could follow.

    Raises:
        InvalidRequest: naming the field.

    """
    named = [param for param in FIELDS if body.get(param) is not None]
    for param in named:
        if not isinstance(body[param], str):
            raise InvalidRequest(f"{param}: it is the name of a prompt.", param=param)
    if len(named) > 1:
        raise InvalidRequest(f"{named[1]}: it and '{named[0]}' say the same.", param=named[1])


def prefixed(inputs: Any, prompt: str, body: Mapping[str, Any]) -> Any:
    """The inputs of an embedding, each with the prompt before it.

    Raises:
        InvalidRequest: the request names a prompt for tokens, which can have none.

    """
    if isinstance(inputs, str):
        return prompt + inputs
    if isinstance(inputs, list) and all(isinstance(each, str) for each in inputs):
        return [prompt + each for each in inputs]
    param = next((each for each in FIELDS if body.get(each) is not None), None)
    if param is not None:
        raise InvalidRequest(f"{param}: it is for texts, not for tokens or messages.", param=param)
    return inputs
