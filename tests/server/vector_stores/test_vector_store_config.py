"""The section `vector_stores` of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from server.settings import load_settings

CONFIG = """
vector_stores: {embedding_model: words, memory: 1MiB, max_files: 3}
models: [{id: small, aliases: [words], runtime: fake, source: none}]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_the_file_and_the_variable_of_the_url(config: Path) -> None:
    _, settings = load_settings(config, {})
    stores = settings.vector_stores
    assert (stores.embedding_model, stores.memory, stores.max_files) == ("words", 2**20, 3)
    assert stores.url == "sqlite"
    url = "postgresql://me:hush@db/x"
    _, settings = load_settings(config, {"ROUNDHOUSE_VECTOR_STORES_URL": url})
    assert settings.vector_stores.url == url
    assert "hush" not in repr(settings)


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ("embedding_model: other", r"^vector_stores\.embedding_model: .*'other' does not exist"),
        ("rerank_model: other", r"^vector_stores\.rerank_model: .*'other' does not exist"),
        ("url: mysql://me:hush@db/x", r"^vector_stores\.url: it is sqlite, or postgresql://"),
        ("colour: red", r"^vector_stores\.colour: unknown key"),
        ("max_files: 0", r"^vector_stores\.max_files: "),
    ],
)
def test_an_error_names_the_key(config: Path, written: str, error: str) -> None:
    config.write_text(
        CONFIG.replace("max_files: 3", written).replace("embedding_model: words,", "")
    )
    with pytest.raises(ConfigError, match=error) as refused:
        load_settings(config, {})
    assert "hush" not in str(refused.value)
