"""The yardstick: plain `vllm.LLM` in a process of its own, one model after the other.

Prints the greedy texts of each folder as JSON. Importing vLLM is what takes long, so one process
answers for all.

Usage: python -m tests.engine.runtimes.vllm.bare_vllm MAX_TOKENS FOLDER,FOLDER,... PROMPT...
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    max_tokens, folders, *prompts = sys.argv[1:]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM, SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=int(max_tokens), ignore_eos=True)
    texts = []
    for folder in folders.split(","):
        llm = LLM(
            folder,
            dtype="float32",
            max_model_len=512,
            enforce_eager=True,
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=64 << 20,
            disable_log_stats=True,
        )
        texts.append([llm.generate(each, parameters)[0].outputs[0].text for each in prompts])
        del llm
    sys.stdout.write("\n" + json.dumps(texts) + "\n")


if __name__ == "__main__":
    main()
