"""The configuration that a command reads: the named one, or a shipped one by what the machine has.

Every command reads the same. So `pull --all` fetches what `serve` would serve.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import ENV_CONFIG
from engine.memory.device import host_memory_bytes
from engine.memory.nvidia_smi import read_gpus
from engine.samples.registry import can_build_all
from engine.units import format_size
from server.packages import installed_version
from server.settings import STARTER_CONFIG, read_engine_config

GIB = 2**30

HUB_TIMEOUT_S = 2.0
"""How long the hub may take to answer. A start must not wait for a missing network."""

DEFAULT_HUB = "https://huggingface.co"

FOR_GPU = ((70 * GIB, "gpu-80gb"), (20 * GIB, "gpu-24gb"), (7 * GIB, "gpu-8gb"))
"""The least GPU memory for each: somewhat less than the name says, as GPUs have."""

FOR_CPU = (15 * GIB, "cpu")
"""The same of host memory. The head of the file asks for 16 GiB."""

STARTER = "starter"
SAMPLES = "samples"


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts that the choice depends on."""

    gpu_bytes: int | None = None
    """Memory of the first GPU; None: there is none, or its driver fails."""
    host_bytes: int = 0
    torch_has_cuda: bool = True
    """Whether the installed torch was built for a GPU."""
    hub_answers: bool = False
    samples_installed: bool = False
    """Whether all sample models can be built."""
    present: Mapping[str, int] = field(default_factory=dict)
    """By configuration: how many of its models have their files here."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration and the reason for it."""

    path: Path
    reason: str
    """Empty if the user named the file."""


def configuration(path: Path | None, environ: Mapping[str, str]) -> Choice:
    """The file of `--config`, otherwise of `ROUNDHOUSE_CONFIG`, otherwise the machine's choice."""
    named = path or environ.get(ENV_CONFIG)
    return Choice(Path(named), "") if named else choose(detect(environ))


def choose(facts: Facts) -> Choice:
    """Pick a shipped configuration. Pure."""
    name, reason = _by_hardware(facts)
    present = facts.present.get(name or "", 0)
    if name is not None and not facts.hub_answers and present:
        reason += f"; the model hub does not answer: only what is here can be served ({present})"
    elif name is not None and not facts.hub_answers:
        reason += f", but the model hub does not answer and none of the models of {name} is here"
        name = None
    if name is None and facts.samples_installed:
        name = SAMPLES
        reason += ": serving small sample models; those for images and video mean nothing"
    elif name is None:
        name = STARTER
        reason += ": serving starter models, whose answers mean nothing"
    return Choice(STARTER_CONFIG.with_name(f"{name}.yaml"), reason)


def detect(environ: Mapping[str, str]) -> Facts:
    """The facts of this machine. Takes as long as the slowest: `nvidia-smi`, or the hub's 2 s."""
    answer = _Probe(environ)
    try:
        gpus = read_gpus()
    except OSError:
        gpus = ()
    return Facts(
        gpu_bytes=gpus[0].total_bytes if gpus else None,
        host_bytes=host_memory_bytes(),
        torch_has_cuda=torch_has_cuda(),
        samples_installed=can_build_all(),
        present=_present_models(),
        hub_answers=answer.wait(),
    )


def torch_has_cuda() -> bool:
    """Whether torch was built for a GPU, by its version and without importing it."""
    version = installed_version("torch")
    return version is not None and "+cpu" not in version


def hub_answers(environ: Mapping[str, str]) -> bool:
    """Whether the hub may be asked, and answers within two seconds."""
    return _Probe(environ).wait()


def _by_hardware(facts: Facts) -> tuple[str | None, str]:
    """The configuration of real models for this machine, and why; None if none fits."""
    host = f"{format_size(facts.host_bytes)} of host memory"
    if facts.gpu_bytes is not None and facts.torch_has_cuda:
        gpu = f"a GPU of {format_size(facts.gpu_bytes)}"
        for least_bytes, name in FOR_GPU:
            if facts.gpu_bytes >= least_bytes:
                return name, gpu
        why = f"{gpu} is too small for the models of gpu-8gb"
    elif facts.gpu_bytes is not None:
        why = "there is a GPU, but the installed torch is built for the CPU"
    else:
        why = "no GPU"
    least_bytes, name = FOR_CPU
    if facts.host_bytes >= least_bytes:
        return name, f"{why}, {host}"
    return None, f"{why}, and {host} is too little for the models of {name}"


def _present_models() -> dict[str, int]:
    from engine.catalog.downloads import sources_of
    from engine.files.hub.cache import present

    found = {}
    for name in (*(name for _, name in FOR_GPU), FOR_CPU[1]):
        config = read_engine_config(STARTER_CONFIG.with_name(f"{name}.yaml"), {})
        found[name] = sum(
            all(present(source) for source in sources_of(model)) for model in config.models
        )
    return found


class _Probe:
    """A request to the hub on a thread, as the lookup of a name takes no timeout."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._answered = False
        self._url = environ.get("HF_ENDPOINT") or DEFAULT_HUB
        self._thread: threading.Thread | None = None
        if environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
            self._thread = threading.Thread(target=self._ask, daemon=True, name="hub-probe")
            self._thread.start()

    def wait(self) -> bool:
        if self._thread is not None:
            self._thread.join(HUB_TIMEOUT_S)
        return self._answered

    def _ask(self) -> None:
        import httpx  # here, as it would take a fifth of the time until `serve` listens

        try:
            answer = httpx.head(self._url, timeout=HUB_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL):
            return
        self._answered = answer.status_code < 500
