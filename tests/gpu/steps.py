"""The steps of `scripts/check-gpu`, the most valuable first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One part of the checks, in processes of its own."""

    name: str
    shows: str
    command: tuple[str, ...]
    """Arguments of Python. `{config}`, `{device}`, `{size}`, `{rounds}` and `{requests}` are filled
    in."""
    limit_s: float
    """After this it is stopped; what it has found by then is kept."""
    models: tuple[str, ...] = ()
    """Of `tests.gpu.models`; they are built before, within the limit."""
    memory: str | None = None
    """The budget of the models; None takes the default."""
    small_memory: str | None = None
    alone: bool = False
    """Whether it measures times or the memory of the whole device."""


def _tests(*names: str) -> tuple[str, ...]:
    files = (f"tests/gpu/test_{name}.py" for name in names)
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *files)


STEPS = (
    Step(
        "device",
        "capacity, other programs' memory, the ledger against nvidia-smi, parked weights",
        _tests("device", "weights"),
        60,
        alone=True,
    ),
    Step(
        "language-parking",
        "two vLLM engines parked in turn, eager and with captured graphs; capture beside a stream",
        _tests("vllm_park"),
        150,
    ),
    Step(
        "swap",
        "swaps of real models against copies and reads of the same bytes, and a stream's gaps",
        ("-m", "tests.gpu.measure_swap", "{config}", "{size}"),
        240,
        ("llama-8b", "qwen-7b", "sdxl-turbo"),
        alone=True,
    ),
    Step(
        "streams",
        "tokens/s, TTFT and ITL of the server against vLLM's engine alone",
        ("-m", "tests.gpu.measure_streams", "{config}", "{size}"),
        240,
        ("llama-8b",),
        alone=True,
    ),
    Step(
        "families",
        "every image and video family equal to the library alone; parts, dtypes, offloading",
        _tests("families"),
        150,
    ),
    Step(
        "speech",
        "speech equal to the library alone, before and after a park",
        _tests("speech"),
        60,
    ),
    Step(
        "faults",
        "out of memory for real in a load, a run and a wake; a lost context is replaced",
        _tests("out_of_memory", "lost_context"),
        150,
    ),
    Step(
        "images",
        "images against the pipeline alone",
        ("-m", "tests.gpu.measure_media", "{config}", "{size}"),
        120,
        ("sdxl-turbo", "sdxl", "sd15"),
        alone=True,
    ),
    Step(
        "sound",
        "speech against the libraries alone",
        ("-m", "tests.gpu.measure_media", "{config}", "{size}"),
        60,
        ("kokoro", "xtts"),
        alone=True,
    ),
    Step(
        "rounds",
        "30 rounds of load, use and unload: neither memory nor answers drift",
        ("scripts/bench/rounds", "--rounds", "{rounds}", "--device", "{device}"),
        150,
    ),
    Step(
        "turntable",
        "a burst of requests for more models than fit: our plan against FIFO and LRU",
        (
            *("scripts/bench/turntable", "--config", "{config}"),
            *("--requests", "{requests}", "--rounds", "1"),
        ),
        120,
        ("llama-8b", "sdxl-turbo", "kokoro", "qwen-7b", "sd15", "xtts"),
        memory="40GiB",
        small_memory="252MiB",
        alone=True,
    ),
    Step(
        "video",
        "clips against the pipeline alone",
        ("-m", "tests.gpu.measure_media", "{config}", "{size}"),
        150,
        ("svd-xt", "animatediff", "wan-1.3b"),
        alone=True,
    ),
    Step(
        "flux",
        "FLUX.1 schnell, of 34 GB, against the pipeline alone",
        ("-m", "tests.gpu.measure_media", "{config}", "{size}"),
        150,
        ("flux-schnell",),
        alone=True,
    ),
)
"""All of them. Their order is that of worth: where time ends, the last are left out."""
