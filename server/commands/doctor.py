"""`roundhouse doctor`: what keeps this machine from serving models, and what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.markup import escape

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory.device import host_memory_bytes
from engine.memory.nvidia_smi import Gpu, read_gpus, read_processes
from engine.units import format_size
from server.commands.default_config import configuration, hub_answers, torch_has_cuda
from server.commands.options import ConfigFile
from server.commands.terminal import new_table, out
from server.exit_codes import FAILED
from server.settings import ServerSettings, load_settings, read_engine_config

GIB = 2**30

SPEED_BYTES = 256 * 2**20
"""How much of a file is read to measure the disk: half a second of a slow SSD."""

SLOW_BYTES_PER_S = 200e6
"""Below this speed a model of 8 B parameters takes over a minute from disk."""

FREE_BYTES = 20 * GIB
"""Room for one model of 8 B parameters in 16 bits, and some."""

SHM_BYTES = 64 * 2**20
"""Docker's default. Nothing here shares memory between processes."""

MIN_DRIVER = 580
"""The oldest driver for CUDA 13, and torch 2.13 is built for that
(https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/)."""

TORCH_CHECK = """
import json, torch
free, total = torch.cuda.mem_get_info()
print(json.dumps([torch.__version__, torch.cuda.get_device_name(), free, total]))
"""
TORCH_TIMEOUT_S = 120


class State(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """It works, but worse than possible, or not for everything."""
    BAD = "bad"
    """The configured models cannot be served."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    state: State
    found: str
    advice: str = ""
    """What to do. Empty if all is well."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the checks examine: the environment, the GPUs, and the configuration if it is valid."""

    path: Path
    """The configuration file."""
    chosen: str
    """Why this file was chosen; empty if the user named it."""
    environ: Mapping[str, str]
    config: EngineConfig | None
    gpus: tuple[Gpu, ...]

    @property
    def wants_gpu(self) -> bool:
        """Whether the configuration says `cuda`."""
        return self.config is not None and self.config.device == "cuda"

    @property
    def uses_gpu(self) -> bool:
        """Whether models would be on a GPU."""
        device = self.config.device if self.config is not None else "auto"
        return device != "cpu" and bool(self.gpus)

    def has_runtime(self, name: str) -> bool:
        """Whether a configured model needs that runtime."""
        return self.config is not None and any(m.runtime == name for m in self.config.models)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)


def doctor(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document.")] = False,
) -> None:
    """Check what keeps this machine from serving the configured models, and say what to do.

    It looks at the configuration, the GPU and its driver, memory, disks, keys and the model hub.
    Without --config it checks the configuration that `serve` would take. It changes nothing. The
    exit status is 1 if a finding is bad.
    """
    findings = examine(config, os.environ)
    if as_json:
        sys.stdout.write(json.dumps([asdict(each) for each in findings], indent=1) + "\n")
    else:
        table = new_table("what", "state", "found", "what to do")
        for each in findings:
            state = each.state.value
            table.add_row(each.what, state, escape(each.found), escape(each.advice))
        out.print(table)
    if any(each.state is State.BAD for each in findings):
        raise typer.Exit(FAILED)


def examine(path: Path | None, environ: Mapping[str, str]) -> list[Finding]:
    """Run all checks. They take some seconds, and more with a GPU, as torch is tried too."""
    choice = configuration(path, environ)
    findings = [_configuration(choice.path, environ)]
    try:
        engine_config = read_engine_config(choice.path, environ)
    except ConfigError:
        engine_config = None
    gpus: tuple[Gpu, ...] = ()
    try:
        gpus = read_gpus()
    except OSError as error:
        findings.append(
            Finding(
                "GPU",
                State.BAD,
                f"the driver fails: {error}",
                "reboot, or install the driver again; in a container check the host's",
            )
        )
    subject = Subject(choice.path, choice.reason, environ, engine_config, gpus)
    checks: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
        _which_configuration,
        _keys,
        _gpu,
        _gpu_processes,
        _host_memory,
        _shared_memory,
        _disk,
        _packages,
        _hub,
    )
    for check in checks:
        findings += check(subject)
    return findings


def _configuration(path: Path, environ: Mapping[str, str]) -> Finding:
    try:
        config, _ = load_settings(path, environ)
    except ConfigError as error:
        return Finding(
            "configuration", State.BAD, error.message, "correct it: docs/configuration.md"
        )
    return Finding("configuration", State.OK, f"{path}: {len(config.models)} models")


def _which_configuration(subject: Subject) -> Iterator[Finding]:
    if subject.chosen:
        found = f"no file was named: {subject.path.name}, {subject.chosen}"
        yield Finding("choice", State.OK, found)


def _keys(subject: Subject) -> Iterator[Finding]:
    try:
        _, settings = load_settings(subject.path, subject.environ)
    except ConfigError:
        return  # reported already
    file = settings.api_keys_file
    if file is not None and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Finding("key file", State.WARN, f"{file} can be read by others", f"chmod 600 {file}")
    try:
        yield _key_finding(settings)
    except ConfigError as error:
        yield Finding("API keys", State.BAD, error.message, "put a backup in its place")


def _key_finding(settings: ServerSettings) -> Finding:
    if not settings.has_keys:
        if settings.insecure:
            return Finding(
                "API keys",
                State.WARN,
                f"none, and {settings.host} is served to everybody who reaches it",
                "make keys with roundhouse keys add, and leave out --insecure",
            )
        return Finding("API keys", State.OK, "none: only this machine is served")
    if not settings.has_admin_keys:
        return Finding(
            "API keys",
            State.WARN,
            "no admin key: nobody can load, unload or pull models over HTTP",
            "roundhouse keys add NAME --admin, if somebody should",
        )
    return Finding("API keys", State.OK, "set")


def _gpu(subject: Subject) -> Iterator[Finding]:
    if not subject.gpus:
        if subject.wants_gpu:
            yield Finding(
                "GPU",
                State.BAD,
                "the configuration says cuda, and nvidia-smi lists no GPU",
                "install NVIDIA's driver; start a container with --gpus all; or set"
                " engine.device: cpu",
            )
        else:
            yield Finding("GPU", State.OK, "none: models run on the CPU")
        return
    gpu = subject.gpus[0]
    yield Finding(
        "GPU",
        State.OK,
        f"{gpu.name}, {format_size(gpu.free_bytes)} of {format_size(gpu.total_bytes)} free"
        + (f"; {len(subject.gpus) - 1} more, unused" if len(subject.gpus) > 1 else ""),
    )
    major = gpu.driver.partition(".")[0]
    old = major.isdecimal() and int(major) < MIN_DRIVER
    yield Finding(
        "driver",
        State.WARN if old else State.OK,
        gpu.driver,
        f"install {MIN_DRIVER} or later, which CUDA 13 needs" if old else "",
    )
    if not subject.uses_gpu:
        return
    if not torch_has_cuda():
        yield Finding(
            "torch",
            State.BAD,
            "built for the CPU, or not installed",
            "remove .venv and run scripts/setup --cuda, or set engine.device: cpu",
        )
        return
    yield _check_torch()


def _check_torch() -> Finding:
    """Try torch in another process: its import takes seconds, and a broken driver may hang it."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", TORCH_CHECK],
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_S,
            check=False,
        )
        version, name, free_bytes, total_bytes = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        found = f"does not reach the GPU in {TORCH_TIMEOUT_S} s"
    except ValueError:
        said = answer.stderr.strip().splitlines()
        found = said[-1] if said else f"ended with status {answer.returncode}"
    else:
        found = f"{version} sees {name}, {format_size(free_bytes)} of {format_size(total_bytes)}"
        return Finding("torch", State.OK, f"{found} free")
    return Finding("torch", State.BAD, found, "the driver must fit the CUDA of torch: update it")


def _gpu_processes(subject: Subject) -> Iterator[Finding]:
    if not subject.gpus:
        return
    try:
        processes = read_processes()
    except OSError:
        return  # reported already
    others = [each for each in processes if each.pid != os.getpid()]
    if not others:
        yield Finding("other programs", State.OK, "none on the GPU")
        return
    named = ", ".join(
        f"{each.name} ({each.pid}"
        + (f", {format_size(each.used_bytes)})" if each.used_bytes is not None else ")")
        for each in others
    )
    yield Finding(
        "other programs",
        State.WARN,
        f"on the GPU: {named}",
        "stop them if models do not fit; what they hold is measured and left to them",
    )


def _host_memory(subject: Subject) -> Iterator[Finding]:
    total_bytes = host_memory_bytes()
    machine_bytes = psutil.virtual_memory().total
    found = format_size(total_bytes)
    if total_bytes < machine_bytes:
        found += f" (the container's limit; the machine has {format_size(machine_bytes)})"
    if subject.config is None:
        yield Finding("host memory", State.OK, found)
        return
    kind = "cuda" if subject.uses_gpu else "cpu"
    copies_bytes = subject.config.host_memory_budget(kind).budget_bytes(total_bytes)
    available_bytes = min(psutil.virtual_memory().available, total_bytes)
    short = copies_bytes > available_bytes
    yield Finding(
        "host memory",
        State.WARN if short else State.OK,
        f"{found}, {format_size(available_bytes)} available; host copies may take"
        f" {format_size(copies_bytes)}",
        "lower engine.host_memory, or stop other programs" if short else "",
    )
    if not subject.uses_gpu:
        return
    locked_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = locked_bytes != resource.RLIM_INFINITY and locked_bytes < copies_bytes
    # The driver pins memory for the program and usually ignores the limit, but not on all systems.
    yield Finding(
        "pinned memory",
        State.WARN if limited else State.OK,
        f"limit {format_size(locked_bytes)}" if limited else "not limited",
        "if host copies cannot be pinned: ulimit -l unlimited, or --ulimit memlock=-1"
        if limited
        else "",
    )


def _shared_memory(_: Subject) -> Iterator[Finding]:
    try:
        total_bytes = shutil.disk_usage("/dev/shm").total
    except OSError:
        yield Finding(
            "shared memory", State.WARN, "there is no /dev/shm", "mount a tmpfs there (64 MiB)"
        )
        return
    small = total_bytes < SHM_BYTES * 0.99
    yield Finding(
        "shared memory",
        State.WARN if small else State.OK,
        f"{format_size(total_bytes)} in /dev/shm",
        "give the container --shm-size 64m" if small else "",
    )


def _disk(subject: Subject) -> Iterator[Finding]:
    from engine.files.hub.cache import cache_dir, free_disk_bytes

    folder = cache_dir()
    places = {"model cache": folder}
    if subject.config is not None:
        places["data"] = subject.config.data_dir
    for what, path in places.items():
        free_bytes = free_disk_bytes(path)
        little = free_bytes < (FREE_BYTES if path is folder else GIB)
        yield Finding(
            f"disk of the {what}",
            State.WARN if little else State.OK,
            f"{format_size(free_bytes)} free at {path}",
            "make room (roundhouse prune), or let HF_HOME and XDG_DATA_HOME name a larger disk"
            if little
            else "",
        )
    largest = _largest_file(folder, subject.config)
    if largest is None or largest.stat().st_size < SPEED_BYTES // 16:
        yield Finding("disk speed", State.OK, "not measured: no large file of a model is here yet")
        return
    try:
        speed = read_speed(largest)
    except OSError as error:
        yield Finding(
            "disk speed", State.BAD, f"{largest}: {error}", "the disk may fail: see dmesg"
        )
        return
    slow = speed < SLOW_BYTES_PER_S
    yield Finding(
        "disk speed",
        State.WARN if slow else State.OK,
        f"{speed / 1e6:.0f} MB/s",
        "put the model cache (HF_HOME) on an SSD of this machine; loads wait for it"
        if slow
        else "",
    )


def _largest_file(hub_cache: Path, config: EngineConfig | None) -> Path | None:
    """The largest file of the hub's cache and of the configured models that are on this disk."""
    from engine.model_folder import present_folder

    files = list(hub_cache.glob("models--*/blobs/*"))
    if config is not None:
        found = (present_folder(model.source, config.cache_dir) for model in config.models)
        files += [path for folder in found if folder for path in folder.rglob("*")]
    sized = {path: path.stat().st_size for path in files if path.is_file()}
    return max(sized, key=sized.__getitem__, default=None)


def read_speed(path: Path, clock: Callable[[], float] = time.perf_counter) -> float:
    """The speed of reading the beginning of a file from its disk, in bytes a second.

    The system's cache of the file is dropped first. Memory file systems cannot drop it.

    Raises:
        OSError: it cannot be read.

    """
    buffer = bytearray(8 * 2**20)
    nbytes = 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, SPEED_BYTES, os.POSIX_FADV_DONTNEED)
        began_s = clock()
        while nbytes < SPEED_BYTES and (read := file.readinto(buffer)):
            nbytes += read
        return nbytes / max(clock() - began_s, 1e-9)


def _packages(subject: Subject) -> Iterator[Finding]:
    if subject.has_runtime("coqui"):
        there = shutil.which("espeak-ng") or shutil.which("espeak")
        yield Finding(
            "espeak-ng",
            State.OK if there else State.WARN,
            there or "not on PATH: Coqui models whose text is spoken by phonemes cannot be loaded",
            "" if there else "apt-get install espeak-ng",
        )
    if not subject.uses_gpu:
        return
    if subject.has_runtime("vllm"):
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        yield Finding(
            "C compiler",
            State.OK if compiler else State.BAD,
            compiler or "none: Triton, which vLLM's kernels are built with, cannot work",
            "" if compiler else "apt-get install gcc libc6-dev",
        )
    if subject.has_runtime("whisper"):
        library = _cublas_12()
        yield Finding(
            "cuBLAS 12",
            State.OK if library else State.BAD,
            library or "not found: CTranslate2, which runs Whisper, needs libcublas.so.12",
            ""
            if library
            else "pip install nvidia-cublas-cu12 and add its lib folder to LD_LIBRARY_PATH",
        )


def _cublas_12() -> str | None:
    """The path of the library that CTranslate2 opens. torch 2.13 only brings that of CUDA 13."""
    name = "libcublas.so.12"
    folders = [Path(each) for each in os.environ.get("LD_LIBRARY_PATH", "").split(":") if each]
    folders += [Path("/usr/local/cuda/lib64"), Path("/usr/local/cuda-12/lib64")]
    folders += [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64")]
    return next((str(each / name) for each in folders if (each / name).exists()), None)


def _hub(subject: Subject) -> Iterator[Finding]:
    from engine.catalog.downloads import sources_of
    from engine.files.hub.cache import present
    from engine.files.hub.client import endpoint

    config = subject.config
    sources = [] if config is None else [each for m in config.models for each in sources_of(m)]
    if not sources:
        return
    missing = sorted({each.repo for each in sources if present(each) is None})
    if not missing:
        yield Finding("models", State.OK, "the files of every configured model are here")
        return
    found = f"{len(missing)} repositories are still to be fetched ({', '.join(missing[:3])}"
    found += ", …)" if len(missing) > 3 else ")"
    if hub_answers(subject.environ):
        yield Finding("models", State.OK, found, "roundhouse pull --all fetches them ahead")
        yield _token()
    else:
        yield Finding(
            "models",
            State.WARN,
            f"{found}, and {endpoint()} is not asked or does not answer",
            "check the network or HF_ENDPOINT, or copy the hub's cache here (HF_HOME)",
        )


def _token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", State.OK, "there")
    return Finding(
        "hub token",
        State.WARN,
        "none: gated repositories, such as Llama and FLUX, cannot be fetched",
        "accept their conditions on the hub, then set HF_TOKEN",
    )
