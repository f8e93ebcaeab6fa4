"""A hub on loopback with one small repository, and the cache of a client of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.files.hub import fetch as hub_fetch
from engine.files.hub.cache import PARTIAL
from tests.hub import Hub, etag, point_client_at, serving

REPO = "me/tiny"
WEIGHTS = random.Random(1).randbytes(3_000_000)
SMALL = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": b"{}"}
FILES = {**SMALL, "model.safetensors": WEIGHTS, "README.md": b"hello"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        hub.repos[REPO] = dict(FILES)
        yield hub


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub_fetch, "RETRY_S", 0.01)
    return point_client_at(hub, tmp_path, monkeypatch)


def partial(cache: Path) -> Path:
    name = etag("model.safetensors", WEIGHTS)
    return cache / "models--me--tiny" / "blobs" / (name + PARTIAL)


def nothing_is_registered(cache: Path) -> bool:
    repo = cache / "models--me--tiny"
    return not (repo / "snapshots").exists() and not (repo / "refs").exists()
