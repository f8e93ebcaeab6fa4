"""The configuration of vector stores."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from engine.route_config import ModelId
from engine.section import Section
from engine.units import Size

SQLITE = "sqlite"
_SCHEMES = ("postgresql", "postgres")


def read_url(value: Any) -> str:
    """Where the vectors are: `sqlite`, or the URL of a PostgreSQL.

    Raises:
        ValueError: it is neither. The message has no part of the value, which may hold a password.

    """
    if value == SQLITE:
        return SQLITE
    try:
        fits = isinstance(value, str) and urlsplit(value.strip()).scheme in _SCHEMES
    except ValueError:  # its words have a part of the address
        fits = False
    if not fits:
        raise ValueError("it is sqlite, or postgresql://USER:PASSWORD@HOST:PORT/DB")
    return str(value).strip()


StoreUrl: TypeAlias = Annotated[str, BeforeValidator(read_url), Field(repr=False)]


class VectorStoreConfig(Section):
    """Which models vector stores use, where the vectors are, and the bounds."""

    embedding_model: ModelId | None = None
    """The model that embeds, by id or alias. None: the first one whose task is `embed`.

    A store keeps the model that it was made with.
    """
    rerank_model: ModelId | None = None
    """The model that ranks what a search has found. None: the order is that of the vectors."""
    url: StoreUrl = SQLITE
    """`sqlite` (a file in `engine.data_dir`), or a PostgreSQL with pgvector: `postgresql://…`."""
    memory: Size = Field(default=256 * 2**20, ge=0)
    """Bytes of vectors held in host memory. The database searches stores that do not fit."""
    max_stores: int = Field(default=1000, ge=1)
    """Vector stores of a key; beyond, 507."""
    max_files: int = Field(default=10_000, ge=1)
    """Files of a store; beyond, 507."""
    max_file_bytes: Size = Field(default=64 * 2**20, gt=0)
    """A larger file is not read: its status is failed."""
    max_bytes: Size = Field(default=10 * 2**30, gt=0)
    """Bytes of the texts and vectors of all stores; beyond, files fail."""
