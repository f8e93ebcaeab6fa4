"""The dtype that a model runs in, where its options say `auto`."""

from __future__ import annotations

import functools
from pathlib import Path

from engine.config import ModelConfig
from engine.runtimes.vllm.options import VllmOptions

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""x86's and, the last one, ARM's instructions that multiply in bfloat16."""


def run_dtype(model: ModelConfig, device: str) -> str:
    """`float32`, `bfloat16` or `float16`, or `auto` on a GPU: there vLLM chooses 16 bits.

    A CPU without instructions for bfloat16 converts every number. With AVX2 alone, float32
    generates 2.8 times as fast with eight streams, and embeds 6-9 times as fast. An encoder that
    embeds is small, so it runs in float32 on any CPU.
    """
    dtype: str = model.options_as(VllmOptions).dtype
    if dtype != "auto" or device != "cpu":
        return dtype
    return "bfloat16" if model.task == "generate" and multiplies_bfloat16() else "float32"


@functools.cache
def multiplies_bfloat16(cpu_info: Path = CPU_INFO) -> bool:
    """Whether this CPU has instructions for bfloat16. False where the system does not say."""
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not BFLOAT16_FLAGS.isdisjoint(flags.split())
    return False
