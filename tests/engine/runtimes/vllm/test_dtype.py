"""The dtype of a model whose options say `auto`."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.runtimes.vllm import dtype
from engine.runtimes.vllm.dtype import multiplies_bfloat16, run_dtype


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu avx2 fma", False),
        ("flags\t\t: fpu avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("model name\t: bf16", False),
    ],
)
def test_the_instructions_of_a_cpu(tmp_path: Path, line: str, found: bool) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{line}\n")
    assert multiplies_bfloat16(info) is found


def test_a_system_that_says_nothing_has_none(tmp_path: Path) -> None:
    assert not multiplies_bfloat16(tmp_path / "nothing")


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_auto(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    monkeypatch.setattr(dtype, "multiplies_bfloat16", lambda: has_bfloat16)

    def chosen(device: str, **more: object) -> str:
        return run_dtype(ModelConfig.model_validate({"id": "m", "source": "a/b", **more}), device)

    assert chosen("cpu") == ("bfloat16" if has_bfloat16 else "float32")
    assert chosen("cpu", task="embed") == "float32"
    assert chosen("cpu", task="embed", options={"dtype": "bfloat16"}) == "bfloat16"
    assert chosen("cuda") == "auto"
