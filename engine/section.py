"""A part of the configuration, and the errors that name its keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import ConfigError
from engine.rules import rule

_AT_THE_TOP = ("models", "routes", "budgets", "costs", "vector_stores")
"""Parts of the configuration of engine and server that stand at the top of the file."""


class Section(BaseModel):
    """Base of every part of the configuration: immutable, and an unknown key is an error."""

    # An error that is printed whole, as in a traceback, must not show a key that is in the input.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True
    )


SectionT = TypeVar("SectionT", bound=Section)


class RuntimeKind(Protocol):
    """What a runtime says of the models that it takes."""

    tasks: ClassVar[tuple[str, ...]]
    Options: ClassVar[type[Section]]

    @classmethod
    def check(cls, model: Any) -> None:
        """Raise `ValueError` with `key: reason` if the keys of a model do not fit."""


Runtimes = Mapping[str, type[RuntimeKind]]
"""The runtimes by name; a configuration is checked against them."""


def parse_section(
    kind: type[SectionT], raw: Any, prefix: str, runtimes: Runtimes | None = None
) -> SectionT:
    """Validate one section. An error names the full key.

    Models are checked against `runtimes`. Without them, nobody looks at runtime, task and options.

    Raises:
        ConfigError: naming every key at fault.

    """
    try:
        return kind.model_validate(raw, context=runtimes)
    except ValidationError as error:
        found = error.errors()
        # Pydantic counts the valid items only, so a list whose items are all wrong seems empty.
        lists = {item["loc"][:1] for item in found if len(item["loc"]) > 1}
        told = [each for each in found if each["type"] != "too_short" or each["loc"] not in lists]
        lines = [describe(kind, item, prefix) for item in told]
        raise ConfigError("; ".join(lines)) from error


def describe(kind: type[BaseModel], item: Any, prefix: str) -> str:
    """An error of Pydantic as a sentence that names the full key."""
    path = ""
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    path = path.removeprefix(".")
    at_the_top = path.startswith(_AT_THE_TOP)
    key = path if at_the_top else f"{prefix}.{path}" if path else prefix
    if item["type"] == "extra_forbidden":
        known: Sequence[str] = ()
        if len(item["loc"]) == 1:
            known = list(kind.model_fields)
        elif at_the_top:
            part = _part_of(kind, item["loc"])
            known = [] if part is None else list(part.model_fields)
        return unknown_key(key, known)
    if item["type"] == "options":
        return "; ".join(
            f"{key.removesuffix('.options')}.{line}" for line in item["msg"].split("; ")
        )
    message = rule(item)
    return f"{key}: {message}" if path or not message.startswith(_AT_THE_TOP) else message


def _part_of(kind: type[BaseModel], place: Sequence[Any]) -> type[BaseModel] | None:
    """The part of the configuration that holds the key at `place`; None: not a section."""
    field, *_ = place
    annotation = kind.model_fields[field].annotation
    parts = (annotation, *get_args(annotation))
    return next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The error for a key that nothing has, with the closest of those that are known."""
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(known), n=1)
    return f"{key}: unknown key" + (f" (did you mean {close[0]}?)" if close else "")
