"""The configuration: a YAML file, overridden by `ROUNDHOUSE_*` variables.

An unknown key or an impossible value is an error that names the key. What a runtime allows is
known above this module: whoever reads a configuration passes the runtimes to check it against.
The file has these sections::

    engine:            # EngineConfig without the sections below
      memory: 80%
    server: {}         # read by server/settings.py
    models:
      - id: qwen
        source: Qwen/Qwen3-4B-Instruct-2507
    routes: []         # RouteConfig
    budgets: []        # BudgetConfig
    costs: {}          # CostConfig

`ROUNDHOUSE_MEMORY=20GiB` overrides `engine.memory`, and so on for every
scalar key of `engine` and `server`. What Kubernetes sets for a Service of our name is ignored.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Field,
    PrivateAttr,
    SkipValidation,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from engine.cost_config import BudgetConfig, CostConfig
from engine.errors import ConfigError, ModelNotFound
from engine.route_config import ModelId, RouteConfig
from engine.section import Runtimes, Section, SectionT, describe, parse_section, unknown_key
from engine.units import Budget, Duration, MemoryBudget, Size
from engine.words import MOST_ECHOED, echoed

ENV_PREFIX = "ROUNDHOUSE_"
ENV_CONFIG = "ROUNDHOUSE_CONFIG"
"""The configuration file to read. It is not a key of a section."""

LISTS = ("models", "routes", "budgets")
"""The sections that are lists."""

_LINK = re.compile(
    r"""(?:_[A-Z0-9]+)*?(?:
        _SERVICE_HOST=[0-9a-fA-F.:]+
      | _SERVICE_PORT(?:_[A-Z0-9_]+)?=\d+
      | _PORT(?:_\d+_(?:TCP|UDP|SCTP))?=(?:tcp|udp|sctp)://\S+
      | _PORT_\d+_(?:TCP|UDP|SCTP)_(?:PROTO=(?:tcp|udp|sctp)|PORT=\d+|ADDR=[0-9a-fA-F.:]+)
    )
    | _NAME=/\S*/\S*
    | _ENV_\w+=.*""",
    re.VERBOSE | re.DOTALL,
)
"""A variable of Kubernetes or of a Docker link and its value, behind the name of the service."""


def is_service_link(name: str, variable: str, text: str) -> bool:
    """Whether Kubernetes or a Docker link put this variable there for a service called `name`.

    A longer name that begins so counts too: the Service `roundhouse-api` gives
    `ROUNDHOUSE_API_PORT=tcp://10.0.0.1:80`.
    """
    line, prefix = f"{variable}={text}", name.upper()
    return line.startswith(prefix) and _LINK.fullmatch(line, len(prefix)) is not None


def user_dir(variable: str, default: str) -> Path:
    """`$variable/roundhouse`, or `~/default/roundhouse` (XDG base directories)."""
    return Path(os.environ.get(variable) or Path.home() / default) / "roundhouse"


class _Loader(yaml.SafeLoader):
    """YAML whose mappings hold each key once. PyYAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            # A merge (`<<`) may be overridden: it is laid under the keys below.
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the library refuses it
            if key in lines:
                raise ConfigError(
                    f"line {line}: {key} is written twice, first in line {lines[key]}"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


class _Parsed:
    """The last parsed form of a model's options, with what it was parsed from.

    Equal to every other: models are compared by their fields.
    """

    __slots__ = ("last",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.last: tuple[Any, Section] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Parsed)


class ModelConfig(Section):
    """One model that can be asked for."""

    id: ModelId
    aliases: tuple[ModelId, ...] = ()
    runtime: str = "vllm"
    task: str = "generate"
    """What the model is for; one of its runtime's `tasks`."""
    source: Annotated[str, StringConstraints(min_length=1)]
    """A local folder, `samples:NAME`, `starter:NAME`, or a hub repository `owner/name`.

    Of a remote model the provider's base URL.
    """
    keep_alive: Duration | None = None
    """Seconds an idle model stays; None takes `engine.keep_alive`."""
    pin: bool = False
    """Load at start and never evict."""
    fallbacks: tuple[ModelId, ...] = ()
    """Models that answer, in this order, when this one cannot."""
    max_wait: Duration | None = Field(default=None, gt=0)
    """Seconds a request waits for this model before its fallbacks are tried."""
    quality: float = Field(default=0.5, ge=0, le=1)
    """How good its answers are, 0 to 1, for routes that ask for a least quality."""
    options: Annotated[Mapping[str, Any], SkipValidation] = Field(default_factory=dict, repr=False)
    """The runtime's own options as they were written; `options_as` gives their parsed form."""
    _parsed: _Parsed = PrivateAttr(default_factory=_Parsed)

    @field_validator("runtime")
    @classmethod
    def _runtime_exists(cls, value: str, info: ValidationInfo) -> str:
        runtimes: Runtimes | None = info.context
        if runtimes is not None and value not in runtimes:
            raise ValueError(f"no runtime {value!r}; there is {', '.join(sorted(runtimes))}")
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _some_runtime_has_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        runtimes: Runtimes | None = info.context
        if runtimes is None:
            return value
        own = info.data.get("runtime")
        if own is None or value not in runtimes[own].tasks:
            every = list(dict.fromkeys(task for each in runtimes.values() for task in each.tasks))
            if value not in every:
                expected = f"{', '.join(map(repr, every[:-1]))} or {every[-1]!r}"
                raise PydanticKnownError("literal_error", {"expected": expected})
            if own is not None:
                known = ", ".join(map(repr, runtimes[own].tasks))
                raise ValueError(f"the runtime {own!r} has no task {value!r}; there is {known}")
        return value

    @field_validator("options")
    @classmethod
    def _options_fit_runtime(cls, value: Any, info: ValidationInfo) -> Any:
        runtimes: Runtimes | None = info.context
        runtime = info.data.get("runtime")
        # A runtime that is wrong itself is reported already.
        if runtimes is not None and runtime is not None:
            kind = runtimes[runtime].Options
            try:
                kind.model_validate(value)
            except ValidationError as error:
                lines = "; ".join(describe(kind, item, "options") for item in error.errors())
                raise PydanticCustomError("options", "{lines}", {"lines": lines}) from error
        return value

    @model_validator(mode="after")
    def _fits_runtime(self, info: ValidationInfo) -> Self:
        runtimes: Runtimes | None = info.context
        if runtimes is not None:
            try:
                runtimes[self.runtime].check(self)
            except ValueError as error:
                raise PydanticCustomError("options", "{lines}", {"lines": str(error)}) from None
        return self

    def options_as(self, kind: type[SectionT]) -> SectionT:
        """The options in the form that their runtime declares; parsed once.

        Raises:
            ConfigError: naming every option at fault.

        """
        last = self._parsed.last
        if last is not None and last[0] is self.options and type(last[1]) is kind:
            return last[1]
        parsed = parse_section(kind, self.options, f"models[{self.id}].options")
        self._parsed.last = (self.options, parsed)
        return parsed

    @property
    def names(self) -> tuple[str, ...]:
        """The id and all aliases."""
        return (self.id, *self.aliases)


class EngineConfig(Section):
    """How the engine shares the device among the models."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    memory: Budget | None = None
    """Device memory for the models: a size, or a share of the device.

    None takes 90% of a GPU, or 50% of host memory.
    """
    host_memory: Budget | None = None
    """Host memory for host copies of weights: a size, or a share.

    Models with a host copy are parked and woken instead of unloaded and loaded. None takes 50%
    with a GPU. On a CPU they are a second copy in the same memory, and None takes 20%.
    """
    cache_dir: Path = Field(default_factory=lambda: user_dir("XDG_CACHE_HOME", ".cache"))
    state_dir: Path = Field(default_factory=lambda: user_dir("XDG_STATE_HOME", ".local/state"))
    """Measurements that outlive a restart."""
    data_dir: Path = Field(default_factory=lambda: user_dir("XDG_DATA_HOME", ".local/share"))
    """Jobs, and the outputs of jobs and of image requests."""
    max_data: Size = Field(default=10 * 2**30, gt=0)
    """Bytes of finished outputs to keep in `data_dir`; beyond, the oldest go."""
    max_data_age: Duration = Field(default=7 * 86_400.0)
    """Seconds to keep a finished output."""
    keep_alive: Duration = Field(default=300.0)
    """Seconds an idle model stays resident when nothing else needs its room."""
    max_queue: int = Field(default=4096, ge=1)
    """Requests that may wait or run in the whole engine; beyond, 503."""
    max_queue_per_model: int = Field(default=1024, ge=1)
    """Requests that may wait for one model; beyond, 429."""
    queue_timeout_s: Duration = Field(default=300.0)
    max_overtake_s: Duration = Field(default=10.0)
    """Seconds for which later requests may overtake a request."""
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    routes: tuple[RouteConfig, ...] = ()
    """Names that stand for the cheapest model that can do a request."""
    budgets: tuple[BudgetConfig, ...] = ()
    """What may be spent in a day or a month."""
    costs: CostConfig = CostConfig()
    """What this machine costs, and what its answers are compared with."""
    _adapters: Callable[[ModelConfig], Collection[str]] | None = PrivateAttr(None)
    # Models, and each of them by all its names.
    _found: tuple[tuple[ModelConfig, ...], Mapping[str, ModelConfig]] = PrivateAttr(((), {}))

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        owner: dict[str, str] = {}
        for model in self.models:
            for name in model.names:
                if name in owner:
                    raise ValueError(
                        f"models: the name {name!r} of {model.id!r} is taken by {owner[name]!r}"
                    )
                owner[name] = model.id
        for route in self.routes:
            for name in route.names:
                if name in owner:
                    raise ValueError(f"routes: the name {name!r} is taken by {owner[name]!r}")
                owner[name] = route.id
        models = {name for model in self.models for name in model.names}
        for model in self.models:
            _check_known(f"models: fallbacks of {model.id!r}", model.fallbacks, models)
        for route in self.routes:
            _check_known(f"routes: choose of {route.id!r}", route.choose, models)
            if (examples := route.complexity.examples) is not None:
                _check_known(f"routes: examples of {route.id!r}", (examples.model,), models)
            _check_known(f"routes: profiles of {route.id!r}", route.profiles.values(), models)
        return self

    @model_validator(mode="after")
    def _budgets_have_limits(self) -> Self:
        for index, budget in enumerate(self.budgets):
            if budget.day is None and budget.month is None:
                raise ValueError(f"budgets[{index}]: it needs day or month")
        return self

    def _by_name(self) -> Mapping[str, ModelConfig]:
        # Each request asks, and there may be hundreds. A copy with other models has this one's.
        models, found = self._found
        if models is not self.models:
            found = {name: model for model in self.models for name in model.names}
            self._found = (self.models, found)
        return found

    def find(self, name: str) -> ModelConfig:
        """The model with this id or alias.

        Raises:
            ModelNotFound: there is none.

        """
        return self.find_adapter(name)[0]

    def find_adapter(self, name: str) -> tuple[ModelConfig, str | None]:
        """The model with this id or alias, and its adapter if the name is `MODEL:ADAPTER`.

        Raises:
            ModelNotFound: there is none.

        """
        known = self._by_name()
        model = known.get(name)
        if model is not None:
            return model, None
        close: list[str] = []
        base, _, adapter = name.rpartition(":")
        model = known.get(base)
        if model is not None and self._adapters is not None:
            own = self._adapters(model)
            if adapter in own:
                return model, adapter
            found = difflib.get_close_matches(adapter[:MOST_ECHOED], own, n=3)
            close = [f"{base}:{each}" for each in found]
        close = close or difflib.get_close_matches(name[:MOST_ECHOED], known, n=1)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ModelNotFound(f"The model {echoed(name)} does not exist.{hint}", param="model")

    def know_adapters(self, of: Callable[[ModelConfig], Collection[str]]) -> None:
        """Have names be found that end with an adapter. `of` gives those of a model, at any time.

        Adapters are files, which come and go; a runtime knows its own.
        """
        self._adapters = of

    def memory_budget(self, device: str) -> MemoryBudget:
        """`memory`, or the default of that kind of device."""
        return self.memory or MemoryBudget(share=0.9 if device == "cuda" else 0.5)

    def host_memory_budget(self, device: str) -> MemoryBudget:
        """`host_memory`, or the default beside that kind of device."""
        return self.host_memory or MemoryBudget(share=0.5 if device == "cuda" else 0.2)


def _check_known(where: str, named: Iterable[str], models: Collection[str]) -> None:
    for name in named:
        if name not in models:
            raise ValueError(f"{where}: no model has the name {name!r}")


def read_sections(
    path: Path, environ: Mapping[str, str], fields: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """Read the file and lay the environment over it.

    `fields` maps each section to the scalar keys that a variable may set.
    Returns one raw mapping per section, plus the lists.

    Raises:
        ConfigError: unreadable, not a mapping, an unknown section or variable.

    """
    try:
        # YAML finds the encoding itself: editors of Windows write UTF-16.
        document = yaml.load(path.read_bytes(), _Loader) or {}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping at the top")
    for key in document:
        if key not in (*fields, *LISTS):
            raise ConfigError(unknown_key(str(key), (*fields, *LISTS)))
    sections: dict[str, Any] = {name: document.get(name) or [] for name in LISTS}
    for section in fields:
        value = document.get(section) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{section}: expected a mapping")
        sections[section] = dict(value)
    variables = {
        f"{ENV_PREFIX}{key.upper()}": (section, key)
        for section, keys in fields.items()
        for key in keys
    }
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == ENV_CONFIG:
            continue
        if is_service_link("roundhouse", variable, text):
            continue
        if variable not in variables:
            raise ConfigError(unknown_key(variable, variables))
        section, key = variables[variable]
        sections[section][key] = text
    return sections


def engine_config(sections: Mapping[str, Any], runtimes: Runtimes) -> EngineConfig:
    """Build the engine's configuration from `read_sections`, its models checked against `runtimes`.

    Raises:
        ConfigError: naming every key at fault.

    """
    raw = dict(sections.get("engine", {}))
    for name in (*LISTS, "costs"):
        if name in sections:
            raw[name] = sections[name]
    return parse_section(EngineConfig, raw, "engine", runtimes)


def engine_fields() -> list[str]:
    """The keys of `engine` that an environment variable may set."""
    return [name for name in EngineConfig.model_fields if name not in (*LISTS, "costs")]
