"""Traces for the simulator: when requests come, for which models, and how long each runs.

A trace file is JSON lines. The first line describes the machine and its models. Each other line
is one request::

    {"budget_bytes": "24GiB", "host_bytes": "64GiB", "models": {"chat": {"bytes": "8GiB",
     "load_s": 6, "wake_s": 0.7, "max_concurrency": 8}}}
    {"at_s": 0.5, "model": "chat", "run_s": 2.0, "priority": "interactive"}

`generate` makes the built-in traces; the same seed makes the same trace.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from engine.config import EngineConfig, ModelId
from engine.errors import ConfigError
from engine.requests import Priority
from engine.section import Section, parse_section
from engine.units import Duration, MemoryBudget, Size, format_size

GIB = 2**30
LOAD_START_S = 2.0
"""Seconds of a load that do not depend on the size: modules, a tokenizer, graphs."""
DISK_BYTES_PER_S = 1.5 * GIB
"""Rate of a load in the built-in traces: one NVMe disk, read and copied."""
HOST_BYTES_PER_S = 12.0 * GIB
"""Rate of a wake in the built-in traces: half of PCIe 4.0 x16 from pinned memory."""
SIZES_BYTES = tuple(gib * GIB for gib in (4, 8, 2, 16, 6, 12))
"""Sizes of the models in the built-in traces, in turn: 1 to 8 billion half-precision weights."""


class TracedModel(Section):
    """One model of a trace: `bytes` (one block), or `blocks` by name."""

    blocks: dict[str, Size] = Field(min_length=1)
    load_s: Duration
    """From disk to ready."""
    wake_s: Duration | None = None
    """From the host copy to ready, all blocks; some take their share. None: it never parks."""
    unload_s: Duration = 0.0
    park_s: Duration = 0.0
    max_concurrency: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_block(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "bytes" in raw and "blocks" not in raw:
            rest = {key: value for key, value in raw.items() if key != "bytes"}
            return {**rest, "blocks": {"weights": raw["bytes"]}}
        return raw

    @model_validator(mode="after")
    def _times_make_sense(self) -> Self:
        if self.wake_s is not None and self.wake_s > self.load_s:
            raise ValueError("wake_s is longer than load_s")
        if math.inf in (self.load_s, self.unload_s, self.park_s):
            raise ValueError("a load, unload or park must end")
        return self

    @property
    def nbytes(self) -> int:
        """Device bytes of all blocks."""
        return sum(self.blocks.values())


class TracedRequest(Section):
    """One request of a trace."""

    at_s: Duration
    model: ModelId
    run_s: Duration
    """Seconds on an otherwise idle device."""
    priority: Priority = Priority.NORMAL
    timeout_s: Duration = math.inf
    working_bytes: Size = 0

    @field_validator("priority", mode="before")
    @classmethod
    def _priority_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value.upper() not in Priority.__members__:
                raise ValueError("not one of " + ", ".join(each.name.lower() for each in Priority))
            return Priority[value.upper()]
        return value

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if math.inf in (self.at_s, self.run_s):
            raise ValueError("a request must come and end")
        return self


class _Header(Section):
    models: dict[ModelId, TracedModel] = Field(min_length=1)
    budget_bytes: Size = Field(gt=0)
    host_bytes: Size = 0
    measured_from_s: Duration = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """A machine, its models, and the requests in order of arrival.

    Every request fits an otherwise empty device, so every policy serves the same requests.
    """

    name: str
    models: Mapping[str, TracedModel]
    requests: tuple[TracedRequest, ...]
    budget_bytes: int
    host_bytes: int = 0
    """The budget of the host copies of all models; 0: no model is ever parked."""
    measured_from_s: float = 0.0
    """Requests before this time only prepare the machine; no figure counts them."""

    def __post_init__(self) -> None:
        if not self.measured:
            raise ConfigError(f"{self.name}: there is no request")
        for request in self.requests:
            model = self.models.get(request.model)
            if model is None:
                raise ConfigError(f"{self.name}: the model {request.model!r} is not described")
            wanted_bytes = model.nbytes + request.working_bytes
            if wanted_bytes > self.budget_bytes:
                raise ConfigError(
                    f"{self.name}: a request for {request.model!r} needs"
                    f" {format_size(wanted_bytes)} of {format_size(self.budget_bytes)}"
                )

    @property
    def measured(self) -> tuple[TracedRequest, ...]:
        """The requests that the figures count."""
        return tuple(each for each in self.requests if each.at_s >= self.measured_from_s)

    def warmed(self) -> Trace:
        """The same requests, after one request for each model, one after the other.

        So each model has a host copy, where there is room for all. A server is in that state most
        of the time.
        """
        at_s = 0.0
        first: list[TracedRequest] = []
        for name, model in self.models.items():
            first.append(TracedRequest(at_s=at_s, model=name, run_s=0.0))
            at_s += model.load_s + max(each.park_s + each.unload_s for each in self.models.values())
        later = [each.model_copy(update={"at_s": each.at_s + at_s}) for each in self.requests]
        return replace(self, requests=(*first, *later), measured_from_s=self.measured_from_s + at_s)

    def faster(self, speed: float) -> Trace:
        """The same requests at `speed` times the rate; the runs stay as long as they are.

        Raises:
            ConfigError: the speed is not positive.

        """
        if not 0 < speed < math.inf:
            raise ConfigError("a trace's speed is positive")
        requests = tuple(
            each.model_copy(update={"at_s": each.at_s / speed}) for each in self.requests
        )
        return replace(self, requests=requests, measured_from_s=self.measured_from_s / speed)

    def on_machine(self, budget_bytes: int | None = None, host_bytes: int | None = None) -> Trace:
        """The same requests on a machine with other memory; None leaves a size as it is.

        Raises:
            ConfigError: a request does not fit there.

        """
        return replace(
            self,
            budget_bytes=self.budget_bytes if budget_bytes is None else budget_bytes,
            host_bytes=self.host_bytes if host_bytes is None else host_bytes,
        )

    def within(self, config: EngineConfig) -> Trace:
        """The same requests within `memory` and `host_memory` of a configuration.

        A share counts of the size in the trace. Where the configuration sets no size, that of the
        trace holds.

        Raises:
            ConfigError: a request does not fit there.

        """

        def size(budget: MemoryBudget | None, traced_bytes: int) -> int:
            if budget is None:
                return traced_bytes
            return int(traced_bytes * budget.share) if budget.share else budget.nbytes or 0

        return self.on_machine(
            size(config.memory, self.budget_bytes), size(config.host_memory, self.host_bytes)
        )

    @property
    def parks(self) -> bool:
        """Whether any model can be parked."""
        return self.host_bytes > 0 and any(
            model.wake_s is not None and model.nbytes <= self.host_bytes
            for model in self.models.values()
        )


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        ConfigError: unreadable, or naming the line and key at fault.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; built in are {', '.join(BUILT_IN)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    header: _Header | None = None
    requests: list[TracedRequest] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from error
        try:
            if header is None:
                header = parse_section(_Header, raw, "trace")
            else:
                requests.append(parse_section(TracedRequest, raw, "request"))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}") from error
    if header is None:
        raise ConfigError(f"{path}: it is empty")
    requests.sort(key=lambda request: request.at_s)
    return Trace(
        path.name,
        header.models,
        tuple(requests),
        header.budget_bytes,
        header.host_bytes,
        header.measured_from_s,
    )


def generate(
    name: str, *, seed: int = 0, requests: int | None = None, models: int | None = None
) -> Trace:
    """Make the built-in trace of that name, with its default sizes where none are given.

    Raises:
        ConfigError: there is no trace of that name, or a size is not positive.

    """
    if name not in BUILT_IN:
        raise ConfigError(f"no trace {name!r}; there is a file, or {', '.join(BUILT_IN)}")
    make, usual_requests, usual_models = BUILT_IN[name]
    requests = usual_requests if requests is None else requests
    models = usual_models if models is None else models
    if requests < 1 or models < 1:
        raise ConfigError("a trace has at least one request and one model")
    return make(random.Random(seed), requests, models)


def _zipf(random_: random.Random, count: int, model_count: int) -> Trace:
    """Poisson arrivals, four a second; the k-th model gets 1/k of the requests of the first.

    That is twice what first in, first out can serve from host copies, and less than is possible.
    """
    models = _catalogue(model_count)
    weights = [1 / rank for rank in range(1, model_count + 1)]
    names = random_.choices(list(models), weights, k=count)
    at_s = 0.0
    requests = []
    for name in names:
        at_s += random_.expovariate(4.0)
        requests.append(TracedRequest(at_s=at_s, model=name, run_s=_run_s(random_, 2.0)))
    return _third("zipf", models, requests)


def _bursts(random_: random.Random, count: int, model_count: int) -> Trace:
    """Every 20 s fifteen requests for one model within a second; single requests between."""
    models = _catalogue(model_count)
    names = list(models)
    requests: list[TracedRequest] = []
    burst_at_s = 0.0
    while len(requests) < count:
        bursting = random_.choice(names)
        for _ in range(15):
            at_s = burst_at_s + random_.random()
            run_s = _run_s(random_, 2.0)
            requests.append(TracedRequest(at_s=at_s, model=bursting, run_s=run_s))
        for _ in range(5):
            at_s = burst_at_s + 20.0 * random_.random()
            run_s = _run_s(random_, 2.0)
            requests.append(TracedRequest(at_s=at_s, model=random_.choice(names), run_s=run_s))
        burst_at_s += 20.0
    return _third("bursts", models, sorted(requests[:count], key=lambda each: each.at_s))


def _abab(random_: random.Random, count: int, model_count: int) -> Trace:
    """One request a second, for each model in turn, where only one fits at a time."""
    budget_bytes = 24 * GIB
    model = _model(budget_bytes * 3 // 5)
    names = [chr(ord("a") + index % 26) + str(index // 26 or "") for index in range(model_count)]
    requests = [
        TracedRequest(
            at_s=float(number), model=names[number % model_count], run_s=_run_s(random_, 1.0)
        )
        for number in range(count)
    ]
    return Trace(
        "abab",
        dict.fromkeys(names, model),
        tuple(requests),
        budget_bytes,
        model.nbytes * model_count,
    )


def _day(random_: random.Random, count: int, model_count: int) -> Trace:
    """24 hours: interactive chat that peaks in the afternoon, some images, a batch each hour.

    Two thirds of the requests are chat with the first model. A sixth are single requests for the
    other models. The last sixth comes in batches, one at the start of each hour, for the other
    models in turn.
    """
    hour_s = 3600.0
    models = _catalogue(model_count)
    names = list(models)
    requests = []
    for _ in range(count * 2 // 3):
        # Rejection sampling: the density of the hour is 1 + cos, highest at 15:00.
        while True:
            hour = 24 * random_.random()
            if 2 * random_.random() <= 1 + math.cos((hour - 15) / 24 * math.tau):
                break
        requests.append(
            TracedRequest(
                at_s=hour * hour_s,
                model=names[0],
                run_s=_run_s(random_, 4.0),
                priority=Priority.INTERACTIVE,
            )
        )
    others = names[1:] or names
    behind = count - len(requests)
    for _ in range(behind // 2):
        requests.append(
            TracedRequest(
                at_s=24 * hour_s * random_.random(),
                model=random_.choice(others),
                run_s=_run_s(random_, 8.0),
            )
        )
    for number in range(behind - behind // 2):
        hour_number = number * 24 // (behind - behind // 2)
        requests.append(
            TracedRequest(
                at_s=hour_number * hour_s,
                model=others[hour_number % len(others)],
                run_s=_run_s(random_, 30.0),
                priority=Priority.BATCH,
            )
        )
    return _third("day", models, sorted(requests, key=lambda each: each.at_s))


def _clients(random_: random.Random, count: int, model_count: int) -> Trace:
    """Clients that each send one request within the same ten seconds, to a random model."""
    models = _catalogue(model_count)
    names = list(models)
    requests = [
        TracedRequest(
            at_s=10.0 * random_.random(),
            model=random_.choice(names),
            run_s=_run_s(random_, 2.0),
        )
        for _ in range(count)
    ]
    return _third("clients-1000", models, sorted(requests, key=lambda each: each.at_s))


BUILT_IN: Mapping[str, tuple[Callable[[random.Random, int, int], Trace], int, int]] = {
    "zipf": (_zipf, 600, 12),
    "bursts": (_bursts, 600, 8),
    "abab": (_abab, 200, 2),
    "day": (_day, 3000, 8),
    "clients-1000": (_clients, 1000, 10),
}
"""The built-in traces, each with its default numbers of requests and models."""


def _catalogue(count: int) -> dict[str, TracedModel]:
    sizes = [SIZES_BYTES[index % len(SIZES_BYTES)] for index in range(count)]
    return {f"model-{number:02}": _model(nbytes) for number, nbytes in enumerate(sizes)}


def _model(nbytes: int) -> TracedModel:
    return TracedModel(
        blocks={"weights": nbytes},
        load_s=LOAD_START_S + nbytes / DISK_BYTES_PER_S,
        wake_s=nbytes / HOST_BYTES_PER_S,
        max_concurrency=8,
    )


def _run_s(random_: random.Random, mean_s: float) -> float:
    # Answers differ in length, and few are long: log-normal, sigma 0.5, with this mean.
    return mean_s * random_.lognormvariate(-0.125, 0.5)


def _third(
    name: str, models: Mapping[str, TracedModel], requests: Sequence[TracedRequest]
) -> Trace:
    """On a device that holds a third of the models' bytes, with host memory for all of them."""
    total_bytes = sum(model.nbytes for model in models.values())
    largest_bytes = max(model.nbytes for model in models.values())
    return Trace(name, models, tuple(requests), max(total_bytes // 3, largest_bytes), total_bytes)
