"""GGUF files that are not converted: each is refused by name, before anything is written."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.conversion.header import read_header
from engine.conversion.refusals import ARCHITECTURES, check
from engine.conversion.tokenizer import check_tokenizer
from engine.errors import LoadFailed
from tests.engine.conversion.gguf_files import SHAPE, write_gguf

TOKENIZER = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": ["a", "b", "ab"],
    "token_type": [1, 1, 1],
    "merges": ["a b"],
}
WEIGHTS = {"token_embd.weight": np.zeros((3, 64), np.float32)}


def written(
    folder: Path,
    name: str = "model.gguf",
    architecture: str = "llama",
    tokenizer: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    shape: dict[str, Any] | None = None,
    **others: Any,
) -> Path:
    return write_gguf(
        folder / name,
        architecture,
        WEIGHTS if weights is None else weights,
        SHAPE | (shape or {}),
        TOKENIZER | (tokenizer or {}),
        **others,
    )


def refusal(file: Path) -> str:
    with pytest.raises(LoadFailed) as caught:
        header = read_header(file)
        check(header)
        check_tokenizer(header)
    assert file.name in caught.value.message
    return caught.value.message


def test_a_good_file_is_not_refused(tmp_path: Path) -> None:
    header = read_header(written(tmp_path))
    check(header)
    check_tokenizer(header)
    assert header.of_model("rope.freq_base") == 10_000.0
    assert header.of_tokenizer("tokens") == ["a", "b", "ab"]
    assert header.tensors[0].shape == (3, 64)


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\3\4" * 20])
def test_what_is_no_gguf_file(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    assert "is no GGUF file" in refusal(file)


def test_no_file(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.gguf")


@pytest.mark.parametrize("kept", [6, 20, 100, 500])
def test_a_file_that_ends_in_its_header(tmp_path: Path, kept: int) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    assert "ends within its header" in refusal(file)


def test_a_file_that_ends_in_its_weights(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut off" in refusal(file)


@pytest.mark.parametrize(("version", "told"), [(1, "version 1;"), (3 << 24, "big-endian")])
def test_other_versions(tmp_path: Path, version: int, told: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    assert told in refusal(file)


def test_an_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, architecture="bert"))
    assert "'bert'" in told
    assert ", ".join(ARCHITECTURES) in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "clip"}, "mmproj"),
        ({"general.type": "mmproj"}, "mmproj"),
        ({"general.type": "adapter"}, "LoRA"),
        ({"adapter.type": "lora"}, "LoRA"),
        ({"general.type": "imatrix"}, "importance matrix"),
        ({"weights": {}}, "vocabulary only"),
        ({"name": "model-00002-of-00003.gguf"}, "one of 3 parts"),
        ({"split.count": 3}, "--merge"),
        ({"shape": {"expert_count": 8}}, "mixture of experts"),
        ({"shape": {"pooling_type": 3}}, "embedding model"),
        ({"shape": {"vision.block_count": 27}}, "a vision model"),
        ({"shape": {"something_new": 0.5}}, "llama.something_new = 0.5"),
        ({"shape": {"attention.head_count_kv": [1, 2]}}, "for each layer"),
        ({"shape": {"context_length": 0}}, "no llama.context_length"),
        ({"tokenizer": {"model": "bert"}}, "'bert'"),
        ({"tokenizer": {"pre": "default"}}, "tokenizer.ggml.pre"),
        ({"tokenizer": {"pre": "kimi-k2"}}, "'kimi-k2'"),
        ({"tokenizer": {"tokens": ["a", "a", "b"]}}, "a token twice"),
        ({"tokenizer": {"token_type": [1]}}, "3 tokens of 1 types"),
        ({"tokenizer": {"eos_token_id": 3}}, "eos token is not in the vocabulary"),
    ],
)
def test_by_what_the_header_says(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    assert told in refusal(written(tmp_path, **changes))


def test_a_key_that_says_nothing_is_not_refused(tmp_path: Path) -> None:
    check(read_header(written(tmp_path, shape={"expert_count": 0})))


@pytest.mark.parametrize(("type_id", "told"), [(15, "Q8_K"), (99, "number 99")])
def test_a_number_format_that_is_not_read(tmp_path: Path, type_id: int, told: str) -> None:
    file = written(tmp_path)
    data = bytearray(file.read_bytes())
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", type_id)
    file.write_bytes(data)
    assert told in refusal(file)
