"""The configurations that are shipped: each is read, and its memory plan adds up."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.config import EngineConfig, ModelConfig, engine_config, engine_fields, read_sections
from engine.files.lora_folder import lora_files
from engine.files.safetensors_header import DTYPE_BYTES, tensor_sizes
from engine.files.source import STARTER, Source, starter_source
from engine.memory.device import CpuDevice
from engine.requests import ImageOperation, ImageRequest, Quality, SpeechRequest, VideoRequest
from engine.runtimes.base import RuntimeContext
from engine.runtimes.diffusers.families import check_size, family_of
from engine.runtimes.diffusers.options import DiffusersOptions
from engine.runtimes.diffusers.runtime import DiffusersRuntime
from engine.runtimes.kokoro.voices import OPENAI_VOICES
from engine.runtimes.registry import RUNTIMES, options_of, runtime_class
from engine.runtimes.vllm.checkpoint import position_count
from engine.runtimes.vllm.options import VllmOptions
from engine.starters.registry import DIFFUSION_STARTERS, LANGUAGE_STARTERS, SPEECH_STARTERS
from engine.units import parse_size
from tests.conftest import StarterDir

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
STARTER_CONFIG = next(path for path in CONFIGS if path.stem == "starter")

PLAN_LINE = re.compile(
    r"^# +(?P<id>[\w.-]+) +(?P<billions>[\d.]+) B = +(?P<weights>[\d.]+) GiB +"
    r"(?:none|(?P<token_kib>\d+) KiB, (?P<cache>[\d.]+ \wiB) = (?P<tokens>[\d,]+)) +"
    r"(?P<total>[\d.]+) GiB$",
    re.MULTILINE,
)
DIFFUSION_PLAN_LINE = re.compile(
    r"^# +(?P<id>[\w.-]+) +(?P<encoders>[\d.]+) (?P<unit>[BM]) +(?P<denoiser>[\d.]+) (?P=unit) +"
    r"(?P<vae>[\d.]+) (?P=unit) +(?P<parameters>[\d.]+) (?P=unit) = +"
    r"(?P<weights>[\d.]+) (?P<size>[MG]iB)(?P<host> in host memory)?$",
    re.MULTILINE,
)
UNITS = {"B": (1e9, "GiB", 2**30), "M": (1e6, "MiB", 2**20)}
"""Parameters of each unit of a plan, and the unit of bytes that stands beside it."""


def read(path: Path) -> EngineConfig:
    fields = {"engine": engine_fields(), "server": []}
    return engine_config(read_sections(path, {}, fields), RUNTIMES)


def models_of(path: Path, runtime: str) -> list[ModelConfig]:
    return [model for model in read(path).models if model.runtime == runtime]


DIFFUSION_MODELS = [
    pytest.param(
        model,
        id=f"{path.stem}-{model.id}",
        # Its folder is built, which imports torch and diffusers.
        marks=[pytest.mark.slow] if Source(model.source).scheme == STARTER else [],
    )
    for path in CONFIGS
    for model in models_of(path, "diffusers")
]


def registered(module: str, table: str) -> set[str]:
    """The names in a table of vLLM's, read from its source: importing vLLM takes ten seconds."""
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    source = (Path(vllm.origin).parent / module / "__init__.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == table:
            return set(ast.literal_eval(statement.value))
    raise LookupError(f"vllm.{module} has no {table}")


def diffusers_folder() -> Path:
    found = find_spec("diffusers")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def exported(kind: str) -> set[str]:
    """The names of diffusers' `pipelines` or `schedulers`, read from its source: no torch."""
    source = (diffusers_folder() / "__init__.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    extend = f"_import_structure['{kind}'].extend"
    found = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == extend]
    return {name for names in found for name in names}


@cache
def parameters(class_name: str, method: str) -> set[str]:
    """The names of a method's parameters in the one file of diffusers that has the class."""
    for path in sorted(diffusers_folder().rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if f"\nclass {class_name}(" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for each in node.body:
                    if isinstance(each, ast.FunctionDef) and each.name == method:
                        return {argument.arg for argument in each.args.args}
    raise LookupError(f"diffusers has no {class_name}.{method}")


def pipeline_class(model: ModelConfig, starter_dir: StarterDir) -> str:
    """Named in the options; that of a starter model by its own folder."""
    pipeline = model.options_as(DiffusersOptions).pipeline
    if pipeline is not None:
        return pipeline
    assert Source(model.source).scheme == STARTER, "its sizes cannot be checked before it is here"
    folder = starter_dir(Source(model.source).name)
    return str(json.loads((folder / "model_index.json").read_text())["_class_name"])


def side_sources(options: DiffusersOptions) -> list[str]:
    """Where all comes from that is not in the pipeline's own folder."""
    sources = [*options.components.values(), *options.lora_sources.values()]
    if options.controlnet is not None:
        sources.append(options.controlnet)
    if options.ip_adapter is not None:
        sources.append(options.ip_adapter.source)
    return sources


def test_the_configurations_are_found() -> None:
    assert [path.stem for path in CONFIGS] == [
        "cpu",
        "gpu-24gb",
        "gpu-80gb",
        "gpu-8gb",
        "samples",
        "starter",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_offers_every_task(path: Path) -> None:
    runtimes = {
        "generate": {"vllm"},
        "embed": {"vllm"},
        "image": {"diffusers"},
        "video": {"diffusers"},
        "transcribe": {"whisper"},
        "speech": {"kokoro", "coqui", "bark"},
    }
    if path.stem == "cpu":
        del runtimes["video"]
    if path.stem == "starter":
        runtimes |= {"rerank": {"vllm"}, "classify": {"vllm"}}
    assert {model.task for model in read(path).models} == runtimes.keys()
    for model in read(path).models:
        assert model.runtime in runtimes[model.task], model.id


@pytest.mark.slow
def test_the_starter_configuration_speaks_with_every_voice(starter_dir: StarterDir) -> None:
    """The names of OpenAI's voices lead to voices that the models have."""
    models = [model for model in read(STARTER_CONFIG).models if model.task == "speech"]
    listening = [model for model in read(STARTER_CONFIG).models if model.task == "transcribe"]
    served = {Source(model.source).name for model in [*models, *listening]}
    # The libraries of these are extras.
    extras = {
        name for name, each in SPEECH_STARTERS.items() if each.library in ("onnx", "pocket-tts")
    }
    assert served == SPEECH_STARTERS.keys() - extras
    for model in models:
        folder = starter_dir(Source(model.source).name)
        runtime = runtime_class(model.runtime)(RuntimeContext(CpuDevice(), folder.parents[2]))
        voices = {voice.id for voice in runtime.voices(model)}
        assert set(options_of(model).model_dump()["voices"].values()) <= voices, model.id
        for name in OPENAI_VOICES:
            request = SpeechRequest(model=model.id, text="hello", voice=name, request_id="test")
            runtime.prepare(model, request)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_named_parsers_exist_in_vllm(path: Path) -> None:
    tool_parsers = registered("tool_parsers", "_TOOL_PARSERS_TO_REGISTER")
    reasoning_parsers = registered("reasoning", "_REASONING_PARSERS_TO_REGISTER")
    options = [
        model.options_as(VllmOptions)
        for model in read(path).models
        if model.task == "generate" and "idefics3" not in model.id  # its template has no tools
    ]
    for each in options:
        assert each.tool_call_parser or each.reasoning_parser
        assert each.tool_call_parser in {None, *tool_parsers}
        assert each.reasoning_parser in {None, *reasoning_parsers}


def test_the_starter_configuration_serves_every_language_model(starter_dir: StarterDir) -> None:
    models = models_of(STARTER_CONFIG, "vllm")
    assert {model.source for model in models} == {
        starter_source(name) for name in LANGUAGE_STARTERS
    }
    for model in models:
        folder = starter_dir(Source(model.source).name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        options = model.options_as(VllmOptions)
        text = config.get("text_config", config)
        assert options.max_model_len == position_count(text)
        assert options.dtype == config["dtype"]


WELL_KNOWN = {
    "generate": ["gpt-4o", "gpt-4o-mini", "gpt-4.1-mini", "gpt-5", "gpt-5-mini", "gpt-3.5-turbo"],
    "embed": ["text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"],
    "rerank": ["rerank-v3.5"],
    "classify": ["omni-moderation-latest"],
    "image": ["dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini"],
    "speech": ["tts-1", "tts-1-hd", "gpt-4o-mini-tts"],
    "transcribe": ["whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe"],
    "video": ["sora-2"],
}
"""The names that programs ask for which were written for OpenAI."""

LARGEST = {"dall-e-2": 1024 * 1024, "dall-e-3": 1024 * 1792, "gpt-image-1": 1024 * 1536}
"""Pixels of the largest size that OpenAI documents for an image model."""

GATED = re.compile(
    r"(meta-llama/|google/gemma|black-forest-labs/FLUX(?!\.2-klein-4B$)|"
    r"stabilityai/stable-(diffusion-3|video-diffusion)|mistralai/)"
)
"""Repositories that the hub gives only to those who accepted a licence (read in November 2026)."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_answers_to_well_known_names(path: Path) -> None:
    config = read(path)
    tasks = {model.task for model in config.models}
    assert tasks >= WELL_KNOWN.keys() - {"video", "rerank", "classify"}
    for task in tasks:
        for name in WELL_KNOWN[task]:
            model = config.find(name)
            assert model.task == task, name
            assert not GATED.match(model.source), name
            if task == "image":
                assert model.options_as(DiffusersOptions).max_pixels >= LARGEST.get(name, 0), name
        # The first of a task is what the playground offers.
        first = next(model for model in config.models if model.task == task)
        assert not GATED.match(first.source), first.id


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_gated_model_is_told_as_one(path: Path) -> None:
    gated = [model for model in read(path).models if GATED.match(model.source)]
    head = path.read_text().partition("\nmodels:")[0]
    assert bool(gated) is ("gated" in head)


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path != STARTER_CONFIG], ids=lambda path: path.stem
)
def test_the_memory_plan_is_that_of_the_options(path: Path) -> None:
    plan = {line["id"]: line for line in PLAN_LINE.finditer(path.read_text(encoding="utf-8"))}
    models = {model.id: model.options_as(VllmOptions) for model in models_of(path, "vllm")}
    assert plan.keys() == models.keys()
    for model_id, options in models.items():
        line = plan[model_id]
        weight_bytes = float(line["billions"]) * 1e9 * (4 if options.dtype == "float32" else 2)
        cache_bytes = 0
        if line["cache"]:
            cache_bytes = parse_size(line["cache"])
            tokens = cache_bytes // (int(line["token_kib"]) * 1024)
            assert options.kv_cache == cache_bytes, model_id
            assert line["tokens"] == f"{tokens:,}", model_id
            # Not equal: vLLM keeps one block of the cache for itself.
            assert options.max_model_len is not None
            assert tokens > options.max_model_len, model_id
        else:
            assert options.kv_cache is None, model_id
        assert float(line["weights"]) == pytest.approx(weight_bytes / 2**30, abs=0.006), model_id
        total_gib = (weight_bytes + cache_bytes) / 2**30
        assert float(line["total"]) == pytest.approx(total_gib, abs=0.006), model_id


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_memory_plan_has_the_parts_of_every_pipeline(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    plan = {line["id"]: line for line in DIFFUSION_PLAN_LINE.finditer(text)}
    models = {
        model.id: model.options_as(DiffusersOptions) for model in models_of(path, "diffusers")
    }
    assert plan.keys() == models.keys()
    for model_id, options in models.items():
        line = plan[model_id]
        scale, size, size_bytes = UNITS[line["unit"]]
        assert line["size"] == size, model_id
        parts = sum(float(line[part]) for part in ("encoders", "denoiser", "vae"))
        # Each is rounded to a thousandth.
        assert float(line["parameters"]) == pytest.approx(parts, abs=0.0015), model_id
        item_bytes = DTYPE_BYTES[options.dtype]
        weights = float(line["parameters"]) * item_bytes
        if options.vae_dtype is not None:
            weights += float(line["vae"]) * (DTYPE_BYTES[options.vae_dtype] - item_bytes)
        weights *= scale / size_bytes
        assert float(line["weights"]) == pytest.approx(weights, abs=0.006), model_id
        assert bool(line["host"]) == (options.offload == "group"), model_id


@pytest.mark.slow
def test_the_starter_plan_is_that_of_the_files(starter_dir: StarterDir) -> None:
    text = STARTER_CONFIG.read_text(encoding="utf-8")
    plan = {line["id"]: line for line in DIFFUSION_PLAN_LINE.finditer(text)}
    for model in models_of(STARTER_CONFIG, "diffusers"):
        millions = {"encoders": 0.0, "denoiser": 0.0, "vae": 0.0}
        options = model.options_as(DiffusersOptions)
        adapters = set(options.lora_sources.values())  # loaded when a request names them
        for source in {model.source, *side_sources(options)} - adapters:
            folder = starter_dir(Source(source).name)
            for path in sorted(folder.rglob("*.safetensors")):
                part = path.parent.name
                column = "encoders" if "_encoder" in part else part
                count = sum(count for _, count in tensor_sizes([path]).values())
                millions[column if column in millions else "denoiser"] += count / 1e6
        for column, value in millions.items():
            planned = float(plan[model.id][column])
            assert planned == pytest.approx(value, abs=0.0006), (model.id, column)


@pytest.mark.slow
def test_the_starter_configuration_serves_every_pipeline(starter_dir: StarterDir) -> None:
    models = models_of(STARTER_CONFIG, "diffusers")
    served = {Source(model.source).name for model in models}
    beside = {
        Source(source).name
        for model in models
        for source in side_sources(model.options_as(DiffusersOptions))
    }
    pipelines = {
        name for name in DIFFUSION_STARTERS if (starter_dir(name) / "model_index.json").is_file()
    }
    assert served == pipelines
    assert beside == DIFFUSION_STARTERS.keys() - pipelines
    for model in models:
        options = model.options_as(DiffusersOptions)
        assert options.dtype == "float32"
        for name, source in options.lora_sources.items():
            assert source == starter_source(name)
            assert lora_files(starter_dir(name).parent)[name].is_file()


@pytest.mark.slow
@pytest.mark.parametrize("model", DIFFUSION_MODELS)
def test_what_a_pipeline_is_given_exists_in_diffusers(
    model: ModelConfig, starter_dir: StarterDir
) -> None:
    options = model.options_as(DiffusersOptions)
    pipeline = pipeline_class(model, starter_dir)
    assert pipeline in exported("pipelines")
    assert options.components.keys() <= parameters(pipeline, "__init__")
    # What a pipeline does not take is left out of the call in silence.
    assert options.call.keys() <= parameters(pipeline, "__call__")
    if options.scheduler:
        settings = dict(options.scheduler)
        kind = settings.pop("class")
        assert kind in exported("schedulers")
        assert settings.keys() <= parameters(kind, "__init__")


@pytest.mark.parametrize("model", DIFFUSION_MODELS)
def test_the_defaults_are_what_the_model_can_do(
    model: ModelConfig, starter_dir: StarterDir, tmp_path: Path
) -> None:
    options = model.options_as(DiffusersOptions)
    family = family_of(pipeline_class(model, starter_dir))
    check_size((options.width, options.height), family)
    assert (options.num_frames - 1) % family.frame_step == 0, "frames are made to be cut off"
    runtime = DiffusersRuntime(RuntimeContext(CpuDevice(), tmp_path))
    steps = {}
    for quality in Quality:
        prepared = runtime.prepare(model, default_request(model, quality)).request
        assert isinstance(prepared, ImageRequest | VideoRequest)
        assert (prepared.width, prepared.height) == (options.width, options.height)
        steps[quality] = prepared.steps or 0
    assert steps[Quality.LOW] < steps[Quality.AUTO] <= steps[Quality.HIGH]
    assert steps[Quality.LOW] <= steps[Quality.MEDIUM] <= steps[Quality.HIGH]


def default_request(model: ModelConfig, quality: Quality) -> ImageRequest | VideoRequest:
    if model.task == "video":
        return VideoRequest(
            model=model.id, request_id="test", prompt="a red train", quality=quality
        )
    return ImageRequest(
        model=model.id,
        operation=ImageOperation.GENERATION,
        request_id="test",
        prompt="a red train",
        quality=quality,
    )


@pytest.mark.slow
def test_a_first_frame_can_have_the_size_of_its_video(starter_dir: StarterDir) -> None:
    chained = set()
    for path in CONFIGS:
        config = read(path)
        for model in models_of(path, "diffusers"):
            options = model.options_as(DiffusersOptions)
            if options.first_frame_model is None:
                continue
            chained.add(path.stem)
            image_model = config.find(options.first_frame_model)
            assert image_model.task == "image"
            size = (options.width, options.height)
            check_size(size, family_of(pipeline_class(image_model, starter_dir)))
            assert size[0] * size[1] <= image_model.options_as(DiffusersOptions).max_pixels
    assert chained == {"gpu-24gb", "gpu-80gb", "samples", "starter"}


CARD_GIB = {"cpu": 16, "gpu-8gb": 8, "gpu-24gb": 24, "gpu-80gb": 80}


@pytest.mark.parametrize("name", CARD_GIB)
def test_every_image_and_video_model_fits_with_its_default_request(
    name: str, tmp_path: Path
) -> None:
    """By the estimates before the first measurement: one too high refuses every request."""
    path = next(path for path in CONFIGS if path.stem == name)
    config = read(path)
    budget = config.memory_budget("cpu" if name == "cpu" else "cuda")
    # A card has some 1% less than its name says.
    budget_gib = budget.budget_bytes(int(CARD_GIB[name] * 0.99 * 2**30)) / 2**30
    plan = {
        line["id"]: line for line in DIFFUSION_PLAN_LINE.finditer(path.read_text(encoding="utf-8"))
    }
    runtime = DiffusersRuntime(RuntimeContext(CpuDevice(), tmp_path))
    for model in models_of(path, "diffusers"):
        prepared = runtime.prepare(model, default_request(model, Quality.AUTO))
        resident_gib = (
            1.0
            if model.options_as(DiffusersOptions).offload == "group"
            else float(plan[model.id]["weights"])
        )
        assert resident_gib + prepared.working_bytes / 2**30 <= budget_gib, model.id
