"""What the configuration says of a remote model."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, SecretStr

from engine.section import Section
from engine.units import Duration, Size

Api: TypeAlias = Literal[
    "chat", "completions", "responses", "embeddings", "messages", "tokenize", "detokenize"
]
"""Endpoints for text, by the last part of their path."""


class Price(Section):
    """What a provider takes, in dollars."""

    input: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A million input tokens."""
    output: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A million output tokens."""
    cached_input: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """A million input tokens that the provider had in its cache; None: as any other."""
    image: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """An image."""
    second: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A second of audio that was heard, or of video that was made."""
    character: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A million characters that were spoken."""
    request: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """A request, whatever it is."""


class RemoteOptions(Section):
    """Options of a remote model."""

    model: str = Field(min_length=1)
    """The provider's own name of the model."""
    api_key: SecretStr | None = None
    """`env:NAME`, `file:PATH`, or the key itself. None: the provider wants none."""
    key_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]+$")
    """The header of the bare key. None: `x-api-key` for messages, otherwise a bearer token."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Further headers. Their values may be `env:NAME` and `file:PATH` as well."""
    provider: str | None = Field(default=None, min_length=1, max_length=256)
    """Models of one provider share connections, breaker and budgets. By default the id."""
    private: bool = False
    """Whether the host name in `source` may lead to a private address."""
    apis: tuple[Api, ...] = ("chat", "completions", "responses", "embeddings")
    """The endpoints for text that the provider has."""
    extra_fields: tuple[str, ...] = ()
    """Fields beyond OpenAI's that the provider takes, such as `seed`. Others are refused."""
    context: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer, for routes."""
    tools: bool | None = None
    """Whether the model calls tools. False refuses them; None passes them on."""
    vision: bool | None = None
    """Whether the model sees images. False refuses them; None passes them on."""
    price: Price | None = None
    """None takes the price of the tables."""
    concurrency: int = Field(default=64, ge=1)
    """Requests that run at once."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    connect_timeout_s: Duration = Field(default=10.0, gt=0)
    """Seconds for a connection."""
    timeout_s: Duration = Field(default=600.0, gt=0)
    """The most seconds to the first byte of a stream, and to the end of a whole answer."""
    least_timeout_s: Duration = Field(default=20.0, gt=0)
    """The least seconds to the first byte of a stream; five times that for a whole answer."""
    idle_timeout_s: Duration = Field(default=120.0, gt=0)
    """Seconds that a stream may pause."""
    retries: int = Field(default=2, ge=0, le=10)
    """Further attempts after a failure that may pass."""
    max_wait_s: Duration = Field(default=10.0, ge=0)
    """The most seconds that a request waits for the provider's limits and before retries."""
    max_answer: Size = Field(default=128 * 2**20, gt=0)
    """A longer answer, or event of a stream, is refused."""
    media_hosts: tuple[str, ...] = ()
    """Hosts besides the provider's own from which images of an answer are fetched."""
    stream_usage: bool = True
    """Ask for the token counts of streamed chats and completions."""
    voice: str | None = None
    """The voice of speech whose request names none."""
    voices: dict[str, str] = Field(default_factory=dict)
    """Further names for the provider's voices."""
    audio_format: Literal["wav", "pcm"] = "wav"
    """The form in which speech is asked for. `pcm` has 16 bits and `sample_rate`."""
    sample_rate: int = Field(default=24_000, ge=8000, le=192_000)
    """Hertz of `pcm`."""
    transcript: Literal["verbose_json", "json"] = "verbose_json"
    """The form in which transcripts are asked for. `json` has no times."""


def provider_of(model_id: str, options: RemoteOptions) -> str:
    """The name of the provider of a model."""
    return options.provider or model_id
