"""The commands that start our server and its peers with the same model and settings."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from engine.config import ModelConfig
from engine.runtimes.vllm.dtype import run_dtype
from engine.runtimes.vllm.options import VllmOptions
from server.bench.errors import BadSetUp
from server.bench.set_up import ROOT, SetUp
from server.bench.targets import Command
from server.bench.work import Work
from server.packages import installed_version

BARE_SCRIPT = ROOT / "scripts" / "bench" / "bare"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
CPU_MEMORY_SHARE = "0.3"
"""Only a check at the start if the KV cache has a size of its own. vLLM's 0.92 may not be free."""


def ours(set_up: SetUp) -> Command:
    """`roundhouse serve`."""
    serve = ("serve", "--config", str(set_up.config_path), "--port", "{port}")
    return Command(
        "roundhouse",
        (sys.executable, "-m", "server.commands.cli", *serve, "--log-level", "warning"),
        {**OFFLINE, **set_up.environment, "PYTHONPATH": import_path(ROOT)},
        ready_path="/ready",
    )


def import_path(first: Path) -> str:
    """`PYTHONPATH` of a target: this folder before those that this process was given."""
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH"))))


def vllm_serve(set_up: SetUp) -> Command:
    """`vllm serve` with the flags that our runtime gives vLLM.

    Raises:
        BadSetUp: the model is not a language model, or the command is not installed.

    """
    model = _only(set_up, "vllm")
    options = model.options_as(VllmOptions)
    line = [
        _command("vllm"), "serve", str(set_up.model_folders[0]),
        "--host", "127.0.0.1",
        "--port", "{port}",
        "--served-model-name", model.id,
        "--dtype", _dtype(set_up, model),
        "--seed", str(options.seed),
        "--max-num-seqs", str(options.max_num_seqs),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if not set_up.on_gpu:
        line += ["--gpu-memory-utilization", CPU_MEMORY_SHARE]
    if options.enforce_eager or (options.enforce_eager is None and not set_up.on_gpu):
        line.append("--enforce-eager")
    for flag, value in (
        ("--kv-cache-memory-bytes", options.kv_cache),
        ("--max-model-len", options.max_model_len),
        ("--max-num-batched-tokens", options.max_num_batched_tokens),
        ("--quantization", options.quantization),
    ):
        if value is not None:
            line += [flag, str(value)]
    environment = {**OFFLINE, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {**vllm_metadata(set_up.folder), **set_up.environment}
    if "OMP_NUM_THREADS" in set_up.environment:
        # Otherwise it takes one thread per core, less one that it leaves to its other processes.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return Command("vllm-serve", tuple(line), environment)


def vllm_metadata(folder: Path) -> dict[str, str]:
    """Variables that let the command `vllm` start if its CPU build has another name.

    The command looks up a distribution called `vllm`. It takes AVX-512 code if that version does
    not end in `+cpu`.
    """
    if installed_version("vllm") is not None:
        return {}
    version = metadata.version("vllm-cpu")
    named = folder / "vllm-metadata" / f"vllm-{version}.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (named / "METADATA").write_text(text, encoding="utf-8")
    return {"PYTHONPATH": import_path(named.parent)}


def transformers_serve(set_up: SetUp) -> Command:
    """`transformers serve` with continuous batching.

    Raises:
        BadSetUp: the model is not a language model, or the command is not installed.

    """
    model = _only(set_up, "vllm")
    folder = str(set_up.model_folders[0])
    line = (
        _command("transformers"), "serve", folder,
        "--host", "127.0.0.1",
        "--port", "{port}",
        "--device", "cuda" if set_up.on_gpu else "cpu",
        "--dtype", _dtype(set_up, model),
        "--continuous-batching",
        "--log-level", "error",
    )  # fmt: skip

    def adapt(work: Work) -> Work:
        # The server refuses unknown fields, and takes the generation options as a document of
        # their own. No vocabulary has the end token -1, so it never comes.
        generation = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        kept = ("prompt", "max_tokens", "stream")
        body = {name: work.body[name] for name in kept} | {
            "model": folder,
            "generation_config": json.dumps(generation),
        }
        return replace(work, body=body)

    return Command("transformers-serve", line, {**OFFLINE, **set_up.environment}, adapt=adapt)


def bare(set_up: SetUp) -> Command:
    """A direct call of the library.

    Raises:
        BadSetUp: this is not a checkout, and the script is not installed with the package.

    """
    if not BARE_SCRIPT.is_file():
        raise BadSetUp(f"--against bare needs a checkout: there is no {BARE_SCRIPT}")
    command = (sys.executable, str(BARE_SCRIPT), str(set_up.config_path))
    return Command("bare", command, {**OFFLINE, **set_up.environment})


def _only(set_up: SetUp, runtime: str) -> ModelConfig:
    (model,) = set_up.models
    if model.runtime != runtime:
        raise BadSetUp(f"the model {model.id!r} is not a language model")
    return model


def _dtype(set_up: SetUp, model: ModelConfig) -> str:
    return run_dtype(model, "cuda" if set_up.on_gpu else "cpu")


def _command(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise BadSetUp(f"the command {name} is not installed")
    return found
