"""The base of all wire models, and the fields that several of them share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, from_json

from engine.errors import InvalidRequest
from engine.requests import LoraChoice
from engine.rules import rule
from server.forms import Fields

MAX_PROMPT_CHARS = 32_000
"""OpenAI's limit for its newest models."""

MAX_SIDE = 16_383
"""Pixels: the limit of WebP, and more than any model can do."""

FILE_MARK = "x-file"
"""Marks the schema of a field that is a file in a form."""

MODEL_MISSING = "You must name a model, as a string."

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class Body(BaseModel):
    """The parameters of one request. An unknown one is an error; null means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def of(cls, fields: Fields) -> Self:
        """Check the fields.

        Raises:
            InvalidRequest: naming the first wrong field.

        """
        values = {name: value for name, value in fields.values.items() if value is not None}
        try:
            return cls.model_validate(values, strict=fields.typed)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            param = _path(_sent(first["loc"], values))
            raise InvalidRequest(_describe(first, param), param=param) from error


def _sent(location: Sequence[int | str], values: Any) -> list[int | str]:
    """The parts of a path that are the client's, without branches of unions as pydantic names."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        if isinstance(values, Mapping):
            if part not in values and index < len(location) - 1:
                continue
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(part)
    return path


def _path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _describe(error: ErrorDetails, param: str) -> str:
    if error["type"] == "extra_forbidden":
        return f"Unknown parameter: '{param}'."
    if param == "model":
        return MODEL_MISSING
    if error["type"] == "missing":
        return f"Missing required parameter: '{param}'."
    return f"Invalid value for '{param}': {rule(error)}."


def model_name(value: Any) -> str:
    """The value of a field `model` that no schema checks.

    Raises:
        InvalidRequest: it is not a name.

    """
    if not isinstance(value, str) or not value:
        raise InvalidRequest(MODEL_MISSING, param="model")
    return value


def as_list(value: Any) -> Any:
    """A list for a field that also takes one item without a list."""
    return [value] if isinstance(value, bytes | str) else value


def single(value: Any) -> Any:
    """The item of a list of one: a file of a form arrives as such a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _read_size(value: Any) -> tuple[int, int] | None:
    if value == "auto":
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a size is written WIDTHxHEIGHT, in pixels, or auto")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"a side has {MAX_SIDE} pixels at most")
    return width, height


def _read_picture(value: Any) -> bytes | str:
    value = single(value)
    if isinstance(value, dict):
        if "file_id" in value:
            raise ValueError(
                "pictures are not read from stored files; send a data: URL as image_url"
            )
        value = value.get("image_url") if value.keys() == {"image_url"} else value
    if not isinstance(value, bytes | str):
        raise ValueError("a picture is one uploaded file, a data: URL or base64")
    return value


def _read_json(value: Any) -> Any:
    # A form writes a list of objects as JSON text.
    if not isinstance(value, str):
        return value
    try:
        return from_json(value)
    except ValueError as error:
        raise ValueError("in a form it is a list, written as JSON") from error


class Lora(BaseModel):
    """One adapter and its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=256)
    weight: float = Field(default=1.0, ge=-10, le=10)

    def choice(self) -> LoraChoice:
        """The engine's form of it."""
        return LoraChoice(self.name, self.weight)


ModelName: TypeAlias = Annotated[str, Field(min_length=1)]
"""An id or an alias of `/v1/models`."""

_SIZE_SCHEMA = {
    "type": "string",
    "pattern": rf"^(auto|{_SIZE.pattern})$",
    "description": "WIDTHxHEIGHT in pixels, or auto.",
    "examples": ["1024x1024"],
}

_PICTURE_SCHEMA = {
    "anyOf": [
        {"type": "string", "description": "A `data:` URL or base64."},
        {
            "type": "object",
            "properties": {"image_url": {"type": "string"}},
            "required": ["image_url"],
            "additionalProperties": False,
        },
    ],
    FILE_MARK: True,
}

Size: TypeAlias = Annotated[
    tuple[int, int] | None, PlainValidator(_read_size), WithJsonSchema(_SIZE_SCHEMA)
]
"""Width and height in pixels; None for "auto"."""

PictureField: TypeAlias = Annotated[
    bytes | str, PlainValidator(_read_picture), WithJsonSchema(_PICTURE_SCHEMA)
]
"""The bytes of a file, or text: a `data:` URL or base64. OpenAI's reference objects work too."""

Loras: TypeAlias = Annotated[list[Lora], BeforeValidator(_read_json), Field(max_length=16)]

Prompt: TypeAlias = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
RequiredPrompt: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
"""The range of a torch generator, with room for the seeds of more images."""
Steps: TypeAlias = Annotated[int, Field(ge=1, le=1000)]
"""Diffusion models are trained with at most 1000 time steps."""
Guidance: TypeAlias = Annotated[float, Field(ge=0, le=100)]
