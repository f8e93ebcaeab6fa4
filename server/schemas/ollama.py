"""The bodies of Ollama's API (`/api/…`). An unknown field is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from engine.errors import InvalidRequest
from server.forms import Fields
from server.schemas.fields import Body, ModelName

NAME = "name"
"""The former name of the field `model`."""


def _read_whole(value: Any) -> Any:
    # Go's JSON has one kind of number, so clients send 8192.0 as well.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_format(value: dict[str, Any] | str) -> dict[str, Any] | str:
    if isinstance(value, str) and value not in ("", "json"):
        raise ValueError("it must be 'json' or a JSON schema")
    return value


Whole: TypeAlias = Annotated[int, BeforeValidator(_read_whole), WithJsonSchema({"type": "integer"})]
Texts: TypeAlias = Annotated[
    list[str],
    BeforeValidator(_read_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Format: TypeAlias = Annotated[dict[str, Any] | str, AfterValidator(_check_format)]
"""`json`, or a JSON schema."""
Think: TypeAlias = bool | Literal["low", "medium", "high", "max"]
Logprobs: TypeAlias = Annotated[Whole, Field(ge=0, le=20)]


class Part(BaseModel):
    """A part of a body. An unknown field is an error; null means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OllamaOptions(Part):
    """How to sample, and how to run the model. What only says how to run it has no effect."""

    num_predict: Whole | None = Field(default=None, ge=-2)
    """The most tokens of the answer; below 0 the context is the limit."""
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Whole | None = None
    stop: Texts | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_last_n: Whole | None = None
    """The window of `repeat_penalty`. Here it is the whole text (-1); 0 is no penalty."""
    num_ctx: Whole | None = None
    """No effect: the context has the length that the model was configured with."""
    num_keep: Whole | None = None
    """No effect: no context is cut."""
    num_batch: Whole | None = None
    num_gpu: Whole | None = None
    main_gpu: Whole | None = None
    num_thread: Whole | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    typical_p: float | None = None
    """Refused, unless it is 1, which is off."""
    tfs_z: float | None = None
    """Refused, unless it is 1, which is off."""
    mirostat: Whole | None = None
    """Refused, unless it is 0, which is off."""
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None
    """Refused, if it is false."""
    logits_all: bool | None = None
    """Refused, if it is true."""
    vocab_only: bool | None = None
    """Refused, if it is true."""
    embedding_only: bool | None = None
    """Refused, if it is true."""


class OllamaBody(Body):
    """The fields that bodies about a model share."""

    model: ModelName


class AnswerBody(OllamaBody):
    """The fields that a chat and a completion share."""

    stream: bool = True
    """Answer with one JSON object a line, as it comes."""
    options: OllamaOptions = OllamaOptions()
    format: Format = ""
    """`json`, or a JSON schema that the answer has."""
    think: Think | None = None
    """Whether the model thinks first, or how much. Its thoughts are in `thinking`."""
    logprobs: bool = False
    top_logprobs: Logprobs = 0
    truncate: bool = False
    """Only false: no conversation is cut."""
    shift: bool = False
    """Only false: no conversation is cut."""


class OllamaFunctionCall(Part):
    """The function of a call, and its arguments."""

    name: str = Field(min_length=1)
    arguments: dict[str, Any] | None = None
    index: Whole | None = None


class OllamaToolCall(Part):
    """A call that the model made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: OllamaFunctionCall


class OllamaMessage(Part):
    """A message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    """Base64."""
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    """Of a tool's message: the function that was called."""
    name: str | None = None
    """The same."""
    tool_call_id: str | None = None


class OllamaChatBody(AnswerBody):
    """`POST /api/chat`."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    """None: the model is loaded, or with `keep_alive: 0` unloaded."""
    tools: list[dict[str, Any]] = Field(default_factory=list)


class OllamaGenerateBody(AnswerBody):
    """`POST /api/generate`."""

    prompt: str = ""
    """Empty: the model is loaded, or with `keep_alive: 0` unloaded."""
    system: str = ""
    images: list[str] = Field(default_factory=list)
    """Base64."""
    raw: bool = False
    """The prompt goes to the model as it is."""
    suffix: str = ""
    """Refused: no model fills in between."""
    template: str = ""
    """Refused: the template is the model's own."""
    context: list[Whole] = Field(default_factory=list)
    """Refused: send the conversation to `/api/chat`."""


class OllamaEmbedBody(OllamaBody):
    """`POST /api/embed`."""

    input: Texts
    truncate: bool = True
    """Cut a text that is too long for the model. Otherwise it is an error."""
    dimensions: Annotated[Whole, Field(ge=1)] | None = None
    options: OllamaOptions = OllamaOptions()
    """No effect on embeddings."""


class OllamaEmbeddingsBody(OllamaBody):
    """`POST /api/embeddings`, the former `/api/embed`."""

    prompt: str = ""
    options: OllamaOptions = OllamaOptions()
    """No effect on embeddings."""


class OllamaShowBody(OllamaBody):
    """`POST /api/show`."""

    verbose: bool = False
    """No effect: the answer never has the vocabulary."""
    options: OllamaOptions = OllamaOptions()
    """No effect."""
    system: str = ""
    template: str = ""


class OllamaPullBody(OllamaBody):
    """`POST /api/pull`: a configured model."""

    stream: bool = True
    """Answer with the progress, one JSON object a line."""
    insecure: bool = False
    """Only false."""


class OllamaDeleteBody(OllamaBody):
    """`DELETE /api/delete`."""


def take_model(fields: Fields) -> None:
    """Have the model under `model`, where an older client sends it as `name`.

    Raises:
        InvalidRequest: it sends both, and they differ.

    """
    values = fields.values
    former = values.pop(NAME, None)
    if former in (None, ""):
        return
    if values.get("model") in (None, ""):
        values["model"] = former
    elif values["model"] != former:
        raise InvalidRequest("It is the former name of 'model', which is given too.", param=NAME)
