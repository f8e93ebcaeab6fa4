"""What a model can do beyond text, as far as that is known before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from engine.errors import InvalidRequest
from engine.runtimes.registry import options_of
from server.ollama.folder_facts import FactsReader, FolderFacts

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.engine import Engine

GENERATE = "generate"
EMBED = "embed"
TEXT_TASKS = (GENERATE, EMBED)
"""Tasks of the models that Ollama's routes run."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """Each is None where nobody knows, so that the model itself is asked."""

    tools: bool | None = None
    thinking: bool | None = None
    vision: bool | None = None
    template: bool | None = None
    """Whether it takes conversations."""
    continues: bool = False
    """Whether it can go on with its own last message."""
    context: int | None = None
    """Tokens of prompt and answer."""

    @classmethod
    def of(cls, model: ModelConfig, facts: FolderFacts | None) -> Self:
        """What the options and the files of a model say."""
        options = options_of(model)
        if not hasattr(options, "tool_call_parser"):  # others may say so, as remote models do
            return cls(
                tools=getattr(options, "tools", None), vision=getattr(options, "vision", None)
            )
        template = getattr(options, "chat_template", None) is not None
        return cls(
            tools=options.tool_call_parser is not None,
            thinking=getattr(options, "reasoning_parser", None) is not None,
            vision=None if facts is None else facts.sees and _may_see(options),
            template=template or (None if facts is None else bool(facts.template)),
            continues=True,
            context=getattr(options, "max_model_len", None) or (facts.context if facts else None),
        )


def _may_see(options: Any) -> bool:
    """Whether the options allow images."""
    most = getattr(options, "limit_mm_per_prompt", None)
    return most is None or bool(most.get("image"))


class AbilityReader:
    """Knows the abilities of models by name. Of a route nothing is known."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._facts = FactsReader(engine.config.cache_dir)

    def facts(self, model: ModelConfig) -> FolderFacts | None:
        """What the files of a model say; None if they are not here."""
        return self._facts.facts(model)

    def abilities(self, name: str) -> Abilities:
        """Those of a model."""
        if name in self._engine.router:
            return Abilities()
        model = self._engine.config.find(name)
        return Abilities.of(model, self.facts(model))


def refuse(name: str, what: str, param: str) -> InvalidRequest:
    """The refusal of what a model cannot do, in the words that Ollama's clients look for."""
    return InvalidRequest(f'"{name}" does not support {what}', param=param)
