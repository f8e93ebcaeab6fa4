"""The families of endpoints, by which a key may be limited, and which requests count."""

from __future__ import annotations

from collections.abc import Mapping

FAMILIES = (
    "chat",
    "embeddings",
    "images",
    "videos",
    "speech",
    "transcriptions",
    "files",
    "vector_stores",
    "engine",
)

_CHAT, _EMBEDDINGS, _IMAGES, _VIDEOS, _SPEECH, _TRANSCRIPTIONS, _FILES, _STORES, _ENGINE = (
    frozenset({family}) for family in FAMILIES
)
_TEXT = _CHAT | _EMBEDDINGS
"""Either is enough for a tokenizer."""

_RUNS: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _CHAT,
    "/v1/responses": _CHAT,
    "/v1/responses/input_tokens": _CHAT,
    "/v1/responses/compact": _CHAT,
    "/v1/messages": _CHAT,
    "/v1/messages/count_tokens": _CHAT,
    "/v1/embeddings": _EMBEDDINGS,
    "/v1/rerank": _EMBEDDINGS,
    "/v2/rerank": _EMBEDDINGS,
    "/rerank": _EMBEDDINGS,
    "/v1/score": _EMBEDDINGS,
    "/score": _EMBEDDINGS,
    "/v1/classify": _EMBEDDINGS,
    "/classify": _EMBEDDINGS,
    "/v1/moderations": _EMBEDDINGS,
    "/v1/fill-mask": _EMBEDDINGS,
    "/api/chat": _CHAT,
    "/api/generate": _CHAT,
    "/api/embed": _EMBEDDINGS,
    "/api/embeddings": _EMBEDDINGS,
    "/v1/tokenize": _TEXT,
    "/tokenize": _TEXT,
    "/v1/detokenize": _TEXT,
    "/detokenize": _TEXT,
    "/v1/images/generations": _IMAGES,
    "/v1/images/edits": _IMAGES,
    "/v1/images/variations": _IMAGES,
    "/v1/videos": _VIDEOS,
    "/v1/audio/speech": _SPEECH,
    "/v1/audio/transcriptions": _TRANSCRIPTIONS,
    "/v1/audio/translations": _TRANSCRIPTIONS,
}
"""A POST to one of these has a model run. Such requests count against the limits of a key."""

WEBSOCKET = "WEBSOCKET"
"""Stands for the method of a WebSocket, whose handshake is a GET."""

_SOCKETS: Mapping[str, frozenset[str]] = {
    "/v1/realtime": _CHAT,
}
"""A WebSocket to one of these counts as one request, for as long as it is open."""

_BESIDE = (
    ("/v1/responses/", _CHAT),
    ("/v1/realtime/", _CHAT),
    ("/v1/conversations", _CHAT),
    ("/v1/images/", _IMAGES),
    ("/v1/videos/", _VIDEOS),
    ("/v1/audio/", _SPEECH),  # voices, and the models that speak
    ("/v1/files", _FILES),
    ("/v1/uploads", _FILES),
    ("/v1/batches", _FILES),
    ("/v1/vector_stores", _STORES),
    ("/v1/engine", _ENGINE),
    ("/api/ps", _ENGINE),
    ("/api/pull", _ENGINE),
    ("/api/delete", _ENGINE),
    ("/api/copy", _ENGINE),
    ("/api/create", _ENGINE),
    ("/api/push", _ENGINE),
    ("/metrics", _ENGINE),
    ("/health/", _ENGINE),
)
"""How the other paths of a family begin."""


def families_of(path: str) -> frozenset[str] | None:
    """The families of a path, any of which will do. None: it is of no family, so open to any key.

    These are the lists of models and the description of the routes.
    """
    families = _RUNS.get(path) or _SOCKETS.get(path)
    if families is not None:
        return families
    return next((family for prefix, family in _BESIDE if path.startswith(prefix)), None)


def is_counted(method: str, path: str) -> bool:
    """Whether the request counts against the limits of its key."""
    if method == WEBSOCKET:
        return path in _SOCKETS
    return method == "POST" and (path in _RUNS or _is_search(path))


def _is_search(path: str) -> bool:
    """Whether it searches a vector store, for which a model runs."""
    return path.startswith("/v1/vector_stores/") and path.endswith("/search")
