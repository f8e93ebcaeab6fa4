"""The documentation names what there is, all of it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from engine.config import LISTS, EngineConfig, ModelConfig, engine_config, engine_fields
from engine.cost_config import BudgetConfig, CostConfig
from engine.costs.cost_metrics import CostMetrics
from engine.engine import Engine
from engine.errors import EngineError, NotLoaded, Overloaded
from engine.metrics import EngineMetrics
from engine.route_config import ComplexityConfig, ExamplesConfig, RouteConfig
from engine.runtimes.diffusers.options import IpAdapter, Profile
from engine.runtimes.registry import REGISTRY, RUNTIMES, runtime_class
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.status import BlockStatus, EngineStatus, Restarts
from engine.usage import Usage
from server.app import create_app
from server.batches.metrics import BatchCounts, BatchMetrics
from server.errors import Failure
from server.file_search.tool import FileSearchTool
from server.metrics import HttpMetrics, render
from server.response_cache.outcome import CacheMetrics
from server.response_cache.store import Kept
from server.router import ServedRoute, SocketRoute
from server.schemas.audio import (
    RecordingBody,
    SpeechBody,
    TranscriptionBody,
    TranslationBody,
    VoiceBody,
    VoicesQuery,
)
from server.schemas.batches import BatchBody, BatchListQuery
from server.schemas.client_secrets import ClientSecretBody
from server.schemas.engine import EventsQuery, PlanBody, RouteBody
from server.schemas.fields import Body
from server.schemas.images import EditBody, GenerationBody, ImageBody, VariationBody
from server.schemas.ollama import (
    AnswerBody,
    OllamaBody,
    OllamaChatBody,
    OllamaDeleteBody,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaGenerateBody,
    OllamaOptions,
    OllamaPullBody,
    OllamaShowBody,
)
from server.schemas.responses import (
    CompactBody,
    ConversationBody,
    IncludeQuery,
    ItemsBody,
    ItemsQuery,
    MetadataBody,
    ResponseQuery,
)
from server.schemas.scheduling_options import SchedulingBody, SchedulingHeaders
from server.schemas.speech_stream import InputText, SpeechConfig
from server.schemas.stored_files import (
    CompleteBody,
    FileBody,
    FileListQuery,
    PartBody,
    UploadBody,
)
from server.schemas.usage import UsageQuery
from server.schemas.vector_stores import (
    AttributesBody,
    FileBatchBody,
    SearchBody,
    StoreFileBody,
    StoreFileListQuery,
    VectorStoreBody,
    VectorStoreChangeBody,
    VectorStoreListQuery,
)
from server.schemas.videos import VideoBody, VideoContentQuery, VideoListQuery
from server.settings import VECTOR_STORES, VECTOR_STORES_URL, ServerSettings
from server.vector_store_config import VectorStoreConfig

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *DOCS]

MODEL = {"id": "any", "source": "any"}
NOTHING: dict[str, Any] = {}
NEEDED = {"remote": {"model": "any"}}
"""What a model of a runtime cannot do without."""

CONFIGURATION: list[tuple[str, str, type[BaseModel], dict[str, Any]]] = [
    ("`engine`", "key", EngineConfig, {"models": [MODEL]}),
    ("`server`", "key", ServerSettings, NOTHING),
    ("`models`", "key", ModelConfig, MODEL),
    ("`routes`", "key", RouteConfig, {"id": "auto", "choose": ["any"]}),
    ("`routes`", "key of `complexity`", ComplexityConfig, NOTHING),
    (
        "`routes`",
        "key of `examples`",
        ExamplesConfig,
        {"model": "any", "simple": ["a"], "hard": ["b"]},
    ),
    ("`costs`", "key", CostConfig, NOTHING),
    ("`vector_stores`", "key", VectorStoreConfig, NOTHING),
    ("`budgets`", "key", BudgetConfig, NOTHING),
    *(
        (f"Options of `{name}`", "key", runtime_class(name).Options, NEEDED.get(name, NOTHING))
        for name in REGISTRY
    ),
    ("Options of `diffusers`", "key of a profile", Profile, {"steps": 1, "guidance": 0}),
    ("Options of `diffusers`", "key of `ip_adapter`", IpAdapter, {"source": "any"}),
]

BODIES: dict[str, list[type[BaseModel]]] = {
    "Every request": [SchedulingBody],
    "Responses and conversations": [
        CompactBody,
        ConversationBody,
        ItemsBody,
        MetadataBody,
        ResponseQuery,
        ItemsQuery,
        IncludeQuery,
    ],
    "Images": [GenerationBody, EditBody, VariationBody],
    "Videos": [VideoBody, VideoListQuery, VideoContentQuery],
    "Files and uploads": [FileBody, FileListQuery, UploadBody, PartBody, CompleteBody],
    "Batches": [BatchBody, BatchListQuery],
    "Vector stores": [
        VectorStoreBody,
        VectorStoreChangeBody,
        VectorStoreListQuery,
        StoreFileListQuery,
        StoreFileBody,
        FileBatchBody,
        AttributesBody,
        SearchBody,
    ],
    "Speech": [SpeechBody],
    "Fields of its messages": [SpeechConfig, InputText],
    "Client secrets": [ClientSecretBody],
    "Transcriptions and translations": [TranscriptionBody, TranslationBody],
    "Voices": [VoiceBody, VoicesQuery],
    "The engine": [PlanBody, RouteBody, EventsQuery, UsageQuery],
    "Ollama": [
        OllamaChatBody,
        OllamaGenerateBody,
        OllamaEmbedBody,
        OllamaEmbeddingsBody,
        OllamaShowBody,
        OllamaPullBody,
        OllamaDeleteBody,
    ],
    "Options in Ollama's requests": [OllamaOptions],
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: the heading above it, the table's first column, and its cells."""

    section: str
    column: str
    cells: tuple[str, ...]


@cache
def rows(page: str) -> tuple[Row, ...]:
    """Every row of every table of a page."""

    def read() -> Iterator[Row]:
        section = column = ""
        for line in (ROOT / "docs" / page).read_text().splitlines():
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            if line.startswith("#"):
                section = line.lstrip("# ")
            elif not line.startswith("|"):
                column = ""
            elif not column:
                column = cells[0]
            elif not cells[0].startswith("---"):
                yield Row(section, column, cells)

    return tuple(read())


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def named(page: str, section: str) -> list[str]:
    """What the first columns of a section's tables name."""
    return [name for row in rows(page) if row.section == section for name in code(row.cells[0])]


@pytest.mark.parametrize(("section", "column", "kind", "needed"), CONFIGURATION)
def test_every_key_is_described_with_its_default(
    section: str,
    column: str,
    kind: type[BaseModel],
    needed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    table = [r for r in rows("configuration.md") if (r.section, r.column) == (section, column)]
    described = {code(row.cells[0])[0]: "".join(code(row.cells[1])) for row in table}
    parts: dict[type[BaseModel], tuple[str, ...]] = {
        EngineConfig: (*LISTS, "costs"),
        ServerSettings: (VECTOR_STORES,),
    }
    sections = parts.get(kind, ())
    assert [*described] == [name for name in kind.model_fields if name not in sections]
    by_itself = kind.model_validate(needed)
    for name, text in described.items():
        assert bool(text) is not kind.model_fields[name].is_required(), name
        if text:
            value, default = yaml.safe_load(text), getattr(by_itself, name)
            value = Path(value).expanduser() if isinstance(default, Path) else value
            given = needed | {name: value} if value is not None else needed
            assert getattr(kind.model_validate(given), name) == default, name


def test_the_schema_is_told_of() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert "`roundhouse schema`" in text and "`configs/schema.json`" in text


def test_every_runtime_has_its_options_described() -> None:
    sections = {row.section for row in rows("configuration.md")}
    described = {
        match[1] for match in map(re.compile(r"Options of `(\w+)`").match, sections) if match
    }
    assert described == REGISTRY.keys()


def test_every_variable_that_is_named_is_one() -> None:
    keys = {*engine_fields(), *ServerSettings.model_fields, *CostConfig.model_fields, "config"}
    keys.add(VECTOR_STORES_URL)
    texts = "".join(page.read_text() for page in PAGES)
    variables = set(re.findall(r"\bROUNDHOUSE_([A-Z_]+)\b", texts))
    assert "API_KEYS" in variables
    assert {name.lower() for name in variables} <= keys


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EngineConfig.model_validate({"models": [MODEL]}))


def test_every_route_is_described(engine: Engine) -> None:
    app = create_app(engine, ServerSettings())
    served = {
        f"{method} {route.path.replace(':path}', '}')}"
        for route in app.routes
        if isinstance(route, ServedRoute)
        for method in route.methods
    }
    served |= {f"WS {route.path}" for route in app.routes if isinstance(route, SocketRoute)}
    assert sorted(named("api.md", "Routes")) == sorted(served)


@pytest.mark.parametrize("section", BODIES)
def test_every_field_of_a_request_is_described(section: str) -> None:
    fields = {name for body in BODIES[section] for name in body.model_fields}
    assert sorted(named("api.md", section)) == sorted(fields)


def kinds(base: type[Any]) -> Iterator[type[Any]]:
    """The subclasses that the program has; tests may have some too."""
    for kind in base.__subclasses__():
        if kind.__module__.partition(".")[0] in ("engine", "server"):
            yield kind
            yield from kinds(kind)


def test_no_request_is_left_out() -> None:
    described = {body for bodies in BODIES.values() for body in bodies}
    bases = {AnswerBody, ImageBody, OllamaBody, RecordingBody}
    # The tool is described in vector-stores.md, what a socket takes in realtime.md.
    bodies = {body for body in kinds(Body) if body.__module__ != "server.schemas.realtime"}
    assert bodies - described == {*bases, SchedulingHeaders, FileSearchTool}


def test_every_error_is_described_with_its_status() -> None:
    described = {
        (int(row.cells[0]), name)
        for row in rows("api.md")
        if row.section == "Errors"
        for name in code(row.cells[1])
    }
    error: EngineError
    every: tuple[type[EngineError], ...] = (EngineError, *kinds(EngineError))
    for kind in every:
        if issubclass(kind, Overloaded):
            error = kind("", retry_after_s=1)
        elif issubclass(kind, NotLoaded):
            error = kind("", tier="disk", load_s=None)
        else:
            error = kind("")
        assert (Failure.of(error).status, error.code) in described


def test_every_event_is_described() -> None:
    assert sorted(named("operations.md", "Events")) == sorted([*EventKind, "lost"])


@pytest.fixture(scope="module")
def series(engine: Engine) -> dict[str, dict[str, set[str]]]:
    """The labels of every sample, by the series' name and the sample's; all were counted once."""

    def status() -> EngineStatus:
        now = engine.status()
        blocks = (BlockStatus("weights", 1, "device"),)
        models = tuple(replace(each, blocks=blocks) for each in now.models)
        host = replace(now.host, prefix_bytes={"any": 1})
        restarts = Restarts(1, "it was killed", 0.0)
        return replace(now, models=models, host=host, restarts=restarts)

    metrics, http = EngineMetrics(status), HttpMetrics()
    for kind in sorted(EventKind, key=lambda kind: kind.endswith(("ed", "en"))):
        metrics.count(SchedulerEvent(kind, "any", "", 0, 0), now=0.0)
    metrics.residual("any", 0)
    usage = Usage(input_tokens=1)
    CostMetrics(metrics.registry).count("any", "", usage, device_s=0.0, cost=0.0, saved=0.0)
    metrics.request_seconds.labels("any", "run").observe(0)
    http.observe("/", "GET", 200, 0.0)
    cache = CacheMetrics(lambda: Kept(0, 0))
    batches = BatchMetrics(BatchCounts)
    registries = (metrics.registry, http.registry, cache.registry, batches.registry)
    text, _ = render(registries, "text/plain")
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text.decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = {each.name: {*each.labels} for each in family.samples}
    return {
        name: {each: labels for each, labels in samples.items() if not each.endswith("_created")}
        for name, samples in found.items()
        if not name.endswith("_created")
    }


def test_every_metric_is_described_with_its_labels(series: dict[str, dict[str, set[str]]]) -> None:
    described = {
        code(row.cells[0])[0]: {*code(row.cells[1])}
        for row in rows("operations.md")
        if row.section == "Metrics"
    }
    labels = {name: set.union(*samples.values()) - {"le"} for name, samples in series.items()}
    assert described == labels


def vllm_series() -> set[str]:
    """vLLM's names, read from its source: importing it takes ten seconds."""
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py"
    return set(re.findall(r'name="(vllm:\w+)"', source.read_text()))


def test_the_metrics_of_vllm_that_are_named_are_its() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    names = {name.removesuffix("_total") for name in re.findall(r"`(vllm:\w+)`", text)}
    assert names
    assert names <= vllm_series()


def test_the_dashboard_asks_for_what_there_is(series: dict[str, dict[str, set[str]]]) -> None:
    dashboard = json.loads((ROOT / "configs" / "grafana.json").read_text())
    own = {name: labels for samples in series.values() for name, labels in samples.items()}
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            grouped = ",".join(re.findall(r"by \(([^)]*)\)", expression)).split(",")
            labels = {name.strip() for name in grouped if name}
            labels |= set(re.findall(r"(\w+)=~?\"", expression))
            labels |= set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for name in re.findall(r"roundhouse_\w+|vllm:\w+", expression):
                asked.add(name)
                if name in own:
                    assert labels <= own[name] | {"instance"}, expression
                else:
                    assert re.sub(r"_(total|bucket)$", "", name) in vllm_series(), expression
                    assert labels <= {"instance", "model_name", "le"}, expression
    assert all(asked & samples.keys() for samples in series.values())
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    near = [link for link in links if "://" not in link]
    assert [link for link in near if not (page.parent / link).exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in readme] == []


def test_the_examples_of_providers_are_configurations() -> None:
    text = (ROOT / "docs" / "providers.md").read_text()
    blocks = re.findall(r"```yaml\n(models:.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        engine_config(yaml.safe_load(block), RUNTIMES)
    for source in re.findall(r"`(https?://[^`]+)` \|", text):
        model = {**MODEL, "runtime": "remote", "source": source, "options": NEEDED["remote"]}
        engine_config({"models": [model]}, RUNTIMES)


def test_the_examples_of_proxies_fit_the_server() -> None:
    """Port and size are the defaults; Traefik's file says what it means."""
    text = (ROOT / "docs" / "proxies.md").read_text()
    settings = ServerSettings()
    assert set(re.findall(r"127\.0\.0\.1:(\d+)", text)) == {str(settings.port)}
    sizes = re.findall(r"client_max_body_size (\d+)m;", text)
    assert [int(size) * 2**20 for size in sizes] == [settings.max_body_bytes]
    (traefik,) = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(http:.*?)```", text, re.S)
    )
    router = traefik["http"]["routers"]["roundhouse"]
    assert {*router["middlewares"]} == traefik["http"]["middlewares"].keys()
    assert router["service"] in traefik["http"]["services"]
    (prefix,) = traefik["http"]["middlewares"]["without-prefix"]["stripPrefix"]["prefixes"]
    assert f"PathPrefix(`{prefix}`)" in router["rule"]
    assert {prefix} == {*re.findall(r"X-Forwarded-Prefix (/\w+)", text)}
