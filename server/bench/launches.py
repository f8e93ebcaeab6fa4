"""How our server and its peers are started with the same model and the same settings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from engine.config import EngineConfig, ModelConfig
from engine.errors import ModelNotFound
from engine.runtimes.registry import runtime_class
from engine.runtimes.vllm.options import VllmOptions
from server.bench.errors import BadSetUp, NotStarted
from server.bench.sides import Launch
from server.bench.work import Work

ROOT = Path(__file__).resolve().parents[2]
BARE_SCRIPT = ROOT / "scripts" / "bench" / "bare"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
CPU_MEMORY_SHARE = "0.3"
"""Only a start-up check where the KV cache has its own size; vLLM's 0.92 may not be free."""

_FETCH = """
import sys
from pathlib import Path
from engine.model_folder import local_folder
for source in sys.argv[2:]:
    print(local_folder(source, Path(sys.argv[1])))
"""


@dataclass(frozen=True, slots=True)
class SetUp:
    """What all sides of a measurement share, in files of a folder of its own."""

    folder: Path
    models: tuple[ModelConfig, ...]
    model_folders: tuple[Path, ...]
    """Where the files of each model are."""
    environment: Mapping[str, str]
    """Set for every side, on top of this process's."""
    on_gpu: bool
    memory: str | None = None
    """What our server may use of the device; None: what it takes by itself."""

    @property
    def config_path(self) -> Path:
        """The configuration of our server and of the bare library."""
        return self.folder / "roundhouse.yaml"

    def write(self) -> None:
        """Write the configuration."""
        engine: dict[str, Any] = {
            "device": "cuda" if self.on_gpu else "cpu",
            "cache_dir": str(self.folder / "cache"),
            "state_dir": str(self.folder / "state"),
            "data_dir": str(self.folder / "data"),
        }
        if self.memory is not None:
            engine["memory"] = self.memory
        models = [
            model.model_dump(mode="json", exclude_unset=True, exclude={"aliases"})
            for model in self.models
        ]
        document = {"engine": engine, "models": models}
        self.config_path.write_text(yaml.safe_dump(document), encoding="utf-8")


def choose_models(
    config: EngineConfig, names: Sequence[str], overrides: Mapping[str, Any]
) -> tuple[ModelConfig, ...]:
    """The named models, `overrides` laid over the options of each.

    Raises:
        BadSetUp: there is no such model, or it has no such option.

    """
    chosen = []
    for name in names:
        try:
            model = config.find(name)
        except ModelNotFound as error:
            raise BadSetUp(error.message) from error
        options = {**model.options, **overrides}
        try:
            runtime_class(model.runtime).Options.model_validate(options)
        except ValueError as error:
            raise BadSetUp(f"--set: {error}") from error
        chosen.append(model.model_copy(update={"options": options}))
    return tuple(chosen)


def fetch(models: Sequence[ModelConfig], cache_dir: Path) -> tuple[Path, ...]:
    """The folders of the models' files, in a process of its own: building some imports torch.

    Raises:
        NotStarted: a model is not to be had.

    """
    done = subprocess.run(
        [sys.executable, "-c", _FETCH, str(cache_dir), *(model.source for model in models)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotStarted(f"cannot fetch the models: {done.stderr.strip().splitlines()[-1]}")
    return tuple(map(Path, done.stdout.splitlines()[-len(models) :]))


def ours(set_up: SetUp) -> Launch:
    """`roundhouse serve`."""
    serve = ("serve", "--config", str(set_up.config_path), "--port", "{port}")
    return Launch(
        "roundhouse",
        (sys.executable, "-m", "server.commands.cli", *serve, "--log-level", "warning"),
        {**OFFLINE, **set_up.environment, "PYTHONPATH": str(ROOT)},
        ready_path="/ready",
    )


def vllm_serve(set_up: SetUp) -> Launch:
    """`vllm serve` with the flags that our runtime gives the same library.

    Raises:
        BadSetUp: the model is not of that library, or the command is not installed.

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
        # Else it takes a thread a core, less one that it leaves to its other processes.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return Launch("vllm-serve", tuple(line), environment)


def vllm_metadata(folder: Path) -> dict[str, str]:
    """What lets the command `vllm` start where its CPU build is installed under another name.

    It looks a distribution called `vllm` up, and takes AVX-512 code if that one's version does
    not end in `+cpu`.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu")
        named = folder / "vllm-metadata" / f"vllm-{version}.dist-info"
        named.mkdir(parents=True, exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (named / "METADATA").write_text(text, encoding="utf-8")
        return {"PYTHONPATH": str(named.parent)}
    return {}


def transformers_serve(set_up: SetUp) -> Launch:
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
        # It refuses fields that it does not know; how to generate is a document of its own, and
        # an end token that no vocabulary has is never met.
        generation = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        kept = ("prompt", "max_tokens", "stream")
        body = {name: work.body[name] for name in kept} | {
            "model": folder,
            "generation_config": json.dumps(generation),
        }
        return replace(work, body=body)

    return Launch("transformers-serve", line, {**OFFLINE, **set_up.environment}, adapt=adapt)


def bare(set_up: SetUp) -> Launch:
    """The library's own call.

    Raises:
        BadSetUp: this is no checkout: the script is not installed with the package.

    """
    if not BARE_SCRIPT.is_file():
        raise BadSetUp(f"--against bare needs a checkout: there is no {BARE_SCRIPT}")
    command = (sys.executable, str(BARE_SCRIPT), str(set_up.config_path))
    return Launch("bare", command, {**OFFLINE, **set_up.environment})


def _only(set_up: SetUp, runtime: str) -> ModelConfig:
    (model,) = set_up.models
    if model.runtime != runtime:
        raise BadSetUp(f"the model {model.id!r} is not a language model")
    return model


def _dtype(set_up: SetUp, model: ModelConfig) -> str:
    dtype: str = model.options_as(VllmOptions).dtype
    return "bfloat16" if dtype == "auto" and not set_up.on_gpu else dtype


def _command(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise BadSetUp(f"the command {name} is not installed")
    return found


def read_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of a model from `KEY=VALUE`, the values as in YAML.

    Raises:
        BadSetUp: it is not of that form.

    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise BadSetUp(f"--set {pair}: write KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options
