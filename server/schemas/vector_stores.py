"""OpenAI's vector stores: requests and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from engine.errors import InvalidRequest
from server.schemas.fields import Body, as_list
from server.vector_stores.chunking import MAX_TOKENS, MIN_TOKENS, Chunking
from server.vector_stores.filters import Attributes, parse_filter
from server.vector_stores.records import (
    Attachment,
    AttachmentStatus,
    Counts,
    FileBatch,
    VectorStore,
)
from server.vector_stores.stores import Found, Search

MAX_QUERIES = 16
MAX_QUERY_CHARS = 32_000
MAX_PAIRS = 16
MAX_BATCH_FILES = 2000
MAX_STORE_FILES = 500

AttributeKey: TypeAlias = Annotated[str, Field(max_length=64)]
AttributeText: TypeAlias = Annotated[str, Field(max_length=512)]
AttributeValue: TypeAlias = bool | int | float | AttributeText
AttributesField: TypeAlias = Annotated[
    dict[AttributeKey, AttributeValue], Field(max_length=MAX_PAIRS)
]
Metadata: TypeAlias = Annotated[dict[AttributeKey, AttributeText], Field(max_length=MAX_PAIRS)]
FileId: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    """A part of a body."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExpiresAfter(_Part):
    """When an unused store expires."""

    anchor: Literal["last_active_at"]
    days: int = Field(ge=1, le=365)


class StaticChunking(_Part):
    """Passages of so many tokens."""

    max_chunk_size_tokens: int = Field(ge=MIN_TOKENS, le=MAX_TOKENS)
    chunk_overlap_tokens: int = Field(ge=0)

    @model_validator(mode="after")
    def _overlap_is_small(self) -> Self:
        if self.chunk_overlap_tokens * 2 > self.max_chunk_size_tokens:
            raise ValueError("chunk_overlap_tokens is at most half of max_chunk_size_tokens")
        return self


class ChunkingStrategy(_Part):
    """How files are cut into passages."""

    type: Literal["auto", "static"]
    static: StaticChunking | None = None

    @model_validator(mode="after")
    def _static_is_described(self) -> Self:
        if (self.static is None) != (self.type == "auto"):
            raise ValueError("'static' has the sizes, and is given with type static only")
        return self

    def chunking(self) -> Chunking | None:
        """None: automatic."""
        if self.static is None:
            return None
        return Chunking(self.static.max_chunk_size_tokens, self.static.chunk_overlap_tokens)


class RankingOptions(_Part):
    """How results are ordered."""

    ranker: Literal["none", "auto", "default-2024-11-15"] = "auto"
    score_threshold: float = Field(default=0.0, ge=0, le=1)


class VectorStoreBody(Body):
    """`POST /v1/vector_stores`."""

    name: str = Field(default="", max_length=256)
    description: str | None = Field(default=None, max_length=512)
    file_ids: list[FileId] = Field(default_factory=list, max_length=MAX_STORE_FILES)
    chunking_strategy: ChunkingStrategy | None = None
    expires_after: ExpiresAfter | None = None
    metadata: Metadata | None = None


class VectorStoreChangeBody(Body):
    """`POST /v1/vector_stores/{id}`."""

    name: str | None = Field(default=None, max_length=256)
    expires_after: ExpiresAfter | None = None
    """Null: the store does not expire any more."""
    metadata: Metadata | None = None


class VectorStoreListQuery(Body):
    """The query of `GET /v1/vector_stores`."""

    limit: int = Field(default=20, ge=1, le=100)
    after: str | None = None
    before: str | None = None
    order: Literal["asc", "desc"] = "desc"


class StoreFileListQuery(VectorStoreListQuery):
    """The query of the lists of files."""

    filter: Literal["in_progress", "completed", "failed", "cancelled"] | None = None


class StoreFileBody(Body):
    """`POST /v1/vector_stores/{id}/files`."""

    file_id: FileId
    attributes: AttributesField = Field(default_factory=dict)
    chunking_strategy: ChunkingStrategy | None = None


class _BatchFile(_Part):
    file_id: FileId
    attributes: AttributesField | None = None
    chunking_strategy: ChunkingStrategy | None = None


class FileBatchBody(Body):
    """`POST /v1/vector_stores/{id}/file_batches`."""

    file_ids: list[FileId] | None = Field(default=None, min_length=1, max_length=MAX_BATCH_FILES)
    files: list[_BatchFile] | None = Field(default=None, min_length=1, max_length=MAX_BATCH_FILES)
    """Files with attributes and a chunking strategy of their own."""
    attributes: AttributesField | None = None
    """Of all `file_ids`."""
    chunking_strategy: ChunkingStrategy | None = None

    def wanted(self) -> list[tuple[str, Chunking | None, Attributes]]:
        """The files, how each is cut, and its attributes.

        Raises:
            InvalidRequest: there are neither files nor ids, or both.

        """
        if (self.files is None) == (self.file_ids is None):
            raise InvalidRequest("Give either 'file_ids' or 'files'.", param="file_ids")
        if self.files is not None:
            if self.attributes is not None or self.chunking_strategy is not None:
                param = "attributes" if self.attributes is not None else "chunking_strategy"
                raise InvalidRequest(f"{param}: with 'files' each file has its own.", param=param)
            return [
                (each.file_id, _chunking(each.chunking_strategy), each.attributes or {})
                for each in self.files
            ]
        chunking = _chunking(self.chunking_strategy)
        return [(file, chunking, self.attributes or {}) for file in self.file_ids or ()]


class AttributesBody(Body):
    """`POST /v1/vector_stores/{id}/files/{file_id}`."""

    attributes: AttributesField


class SearchBody(Body):
    """`POST /v1/vector_stores/{id}/search`."""

    query: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)]],
        BeforeValidator(as_list),
        Field(min_length=1, max_length=MAX_QUERIES),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "maxItems": MAX_QUERIES},
                ]
            }
        ),
    ]
    filters: dict[str, Any] | None = None
    """Comparisons (`eq`, `ne`, `gt`, `gte`, `lt`, `lte`, `in`, `nin`), joined by `and` and `or`."""
    max_num_results: int = Field(default=10, ge=1, le=50)
    ranking_options: RankingOptions = RankingOptions()
    rewrite_query: bool = False
    """True is refused: queries are searched for as they are."""

    def search(self) -> Search:
        """What is searched for.

        Raises:
            InvalidRequest: naming the field at fault.

        """
        if self.rewrite_query:
            raise InvalidRequest(
                "rewrite_query: this server searches for the query as it is.", param="rewrite_query"
            )
        return Search(
            queries=self.query,
            most=self.max_num_results,
            filter=None if self.filters is None else parse_filter(self.filters),
            ranks=self.ranking_options.ranker != "none",
            least_score=self.ranking_options.score_threshold,
        )


def _chunking(strategy: ChunkingStrategy | None) -> Chunking | None:
    return None if strategy is None else strategy.chunking()


def store_document(store: VectorStore, counts: Counts, *, expired: bool) -> dict[str, Any]:
    """OpenAI's object of a store."""
    running = counts.of(AttachmentStatus.IN_PROGRESS)
    status = "expired" if expired else "in_progress" if running else "completed"
    document = {
        "id": store.id,
        "object": "vector_store",
        "created_at": store.created_at,
        "name": store.name,
        "description": store.description,
        "usage_bytes": counts.nbytes,
        "file_counts": _counts(counts),
        "status": status,
        "expires_at": store.expires_at,
        "last_active_at": store.last_active_at,
        "metadata": store.metadata,
    }
    if store.expires_days is not None:
        document["expires_after"] = {"anchor": "last_active_at", "days": store.expires_days}
    return document


def attachment_document(attachment: Attachment) -> dict[str, Any]:
    """OpenAI's object of a file of a store."""
    chunking = attachment.chunking
    error = attachment.error
    return {
        "id": attachment.file,
        "object": "vector_store.file",
        "created_at": attachment.created_at,
        "vector_store_id": attachment.store,
        "usage_bytes": attachment.nbytes,
        "status": attachment.status.value,
        "last_error": None if error is None else {"code": error[0], "message": error[1]},
        "chunking_strategy": {
            "type": "static",
            "static": {
                "max_chunk_size_tokens": chunking.max_tokens,
                "chunk_overlap_tokens": chunking.overlap,
            },
        },
        "attributes": dict(attachment.attributes),
    }


def batch_document(batch: FileBatch, counts: Counts) -> dict[str, Any]:
    """OpenAI's object of a batch of files."""
    if counts.of(AttachmentStatus.IN_PROGRESS):
        status = AttachmentStatus.IN_PROGRESS
    elif batch.cancelled:
        status = AttachmentStatus.CANCELLED
    elif counts.total and counts.of(AttachmentStatus.FAILED) == counts.total:
        status = AttachmentStatus.FAILED
    else:
        status = AttachmentStatus.COMPLETED
    return {
        "id": batch.id,
        "object": "vector_store.files_batch",
        "created_at": batch.created_at,
        "vector_store_id": batch.store,
        "status": status.value,
        "file_counts": _counts(counts),
    }


def search_document(queries: Sequence[str], results: Sequence[Found]) -> dict[str, Any]:
    """OpenAI's page of results."""
    return {
        "object": "vector_store.search_results.page",
        "search_query": list(queries),
        "data": [
            {
                "file_id": result.attachment.file,
                "filename": result.attachment.filename,
                "score": result.score,
                "attributes": dict(result.attachment.attributes),
                "content": [{"type": "text", "text": result.text}],
            }
            for result in results
        ],
        "has_more": False,
        "next_page": None,
    }


def content_document(texts: Sequence[str]) -> dict[str, Any]:
    """OpenAI's page of the content of a file."""
    return {
        "object": "vector_store.file_content.page",
        "data": [{"type": "text", "text": text} for text in texts],
        "has_more": False,
        "next_page": None,
    }


def page_document(documents: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """OpenAI's list. Its ids are texts, also where there is none."""
    return {
        "object": "list",
        "data": list(documents),
        "first_id": documents[0]["id"] if documents else "",
        "last_id": documents[-1]["id"] if documents else "",
        "has_more": more,
    }


def _counts(counts: Counts) -> dict[str, int]:
    return {
        **{status.value: counts.of(status) for status in AttachmentStatus},
        "total": counts.total,
    }
