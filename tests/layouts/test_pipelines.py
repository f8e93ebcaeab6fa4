"""What the published image and video repositories hold against what the engine makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.catalog.downloads import sources_of
from engine.catalog.recognition import recognise
from engine.config import ModelConfig
from engine.files.hub.listing import list_folder
from engine.memory.device import CpuDevice
from engine.runtimes.base import RuntimeContext
from engine.runtimes.diffusers.options import DiffusersOptions
from engine.runtimes.diffusers.runtime import DiffusersRuntime
from tests.conftest import StarterDir
from tests.layouts.configured import MACHINES, configured, repositories
from tests.layouts.pipelines import PipelineLayout, pipeline_layouts
from tests.test_configs import CONFIGS, DIFFUSION_PLAN_LINE, models_of

EVERY = [pytest.param(each, id=name) for name, each in pipeline_layouts().items()]
WHOLE = [pytest.param(each, id=name) for name, each in pipeline_layouts().items() if each.entry]
MODELS = list(configured("diffusers"))
TOLERANCE = 0.02
SHOWN = 0.006
"""How far a size may be from the true one: the hub shows three digits, and cuts."""


def named(model: ModelConfig) -> str:
    options = model.options_as(DiffusersOptions)
    return "-".join((model.id, options.dtype, *([options.offload] if options.offload else [])))


def layout_of(model: ModelConfig) -> PipelineLayout:
    return pipeline_layouts()[model.source]


def test_every_repository_of_a_configuration_is_described() -> None:
    assert repositories("diffusers").keys() == pipeline_layouts().keys()


@pytest.mark.parametrize("layout", EVERY)
def test_each_file_has_the_published_size(layout: PipelineLayout) -> None:
    for part in layout.parts:
        for given in part.files:
            nbytes = sum(layout.sizes[path] for path in part.weights(given).parts)
            assert nbytes / 1e9 == pytest.approx(given["gb"], rel=SHOWN), given["file"]


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_all_that_a_model_reads_is_fetched_and_nothing_else(model: ModelConfig) -> None:
    for source in sources_of(model):
        layout = pipeline_layouts()[source.repo]
        assert layout.fetched(source) == layout.wanted(model)


@pytest.mark.parametrize("layout", WHOLE)
def test_the_entry_that_is_added(layout: PipelineLayout, tmp_path: Path) -> None:
    documents = [path for path in layout.sizes if path.endswith(".json")]
    entry = recognise(layout.listing(layout.build(tmp_path, only=documents))).entry(
        "new", layout.repository
    )
    assert entry == {"id": "new", "source": layout.repository, **(layout.entry or {})}


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_the_estimate_is_that_of_the_published_weights(model: ModelConfig, tmp_path: Path) -> None:
    """By the files' own sizes, scaled from their dtype to the model's."""
    options = model.options_as(DiffusersOptions)
    here = local(model, tmp_path, as_loaded=False)
    runtime = DiffusersRuntime(RuntimeContext(CpuDevice(), tmp_path))
    estimate = sum(runtime._part_bytes(here).values())
    published = 0.0
    for source in sources_of(model):
        layout = pipeline_layouts()[source.repo]
        variant = options.variant if source.repo == model.source else None
        for part in layout.used(options):
            given = layout.chosen(part, variant)
            dtype = (options.vae_dtype if part.name == "vae" else None) or options.dtype
            stored = 4 if given["dtype"] == "F32" else 2
            published += given["gb"] * 1e9 * (4 if dtype == "float32" else 2) / stored
    assert estimate == pytest.approx(published, rel=TOLERANCE)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_memory_plan_is_that_of_the_tensors(machine: str) -> None:
    path = next(path for path in CONFIGS if path.stem == machine)
    text = path.read_text(encoding="utf-8")
    plan = {line["id"]: line for line in DIFFUSION_PLAN_LINE.finditer(text)}
    for model in models_of(path, "diffusers"):
        columns = dict.fromkeys(("encoders", "denoiser", "vae"), 0)
        for source in sources_of(model):
            layout = pipeline_layouts()[source.repo]
            for part in layout.used(model.options_as(DiffusersOptions)):
                is_encoder = part.name.endswith(("_encoder", "encoder_2", "checker"))
                column = "encoders" if is_encoder else part.name
                count = sum(tensor.count for tensor in part.tensors.values())
                columns[column if column in columns else "denoiser"] += count
        for column, count in columns.items():
            assert float(plan[model.id][column]) == pytest.approx(count / 1e9, abs=0.0006), (
                model.id,
                column,
            )


TOKENIZERS = {"CLIPTokenizer": "tiny-sdxl/tokenizer", "T5Tokenizer": "tiny-ltx/tokenizer",
              "T5TokenizerFast": "tiny-wan/tokenizer", "Qwen2Tokenizer": "tiny-z-image/tokenizer",
              "Qwen2TokenizerFast": "tiny-z-image/tokenizer",
              "CLIPImageProcessor": "tiny-svd/feature_extractor"}  # fmt: skip
"""Folders of the starters: what a tokenizer knows does not matter here."""
SCHEDULERS = {"PNDMScheduler": "tiny-sd15", "EulerDiscreteScheduler": "tiny-sdxl",
              "EulerAncestralDiscreteScheduler": "tiny-sdxl-turbo",
              "FlowMatchEulerDiscreteScheduler": "tiny-flux-dev",
              "UniPCMultistepScheduler": "tiny-wan"}  # fmt: skip


def local(model: ModelConfig, folder: Path, *, as_loaded: bool) -> ModelConfig:
    """The model with its repositories in local folders."""
    made = {}
    for source in sources_of(model):
        layout = pipeline_layouts()[source.repo]
        built = layout.as_loaded(model) if as_loaded else layout
        wanted = built.fetched(source)
        made[source.repo] = built.build(folder / source.repo.replace("/", "--"), only=wanted)
    options = dict(model.options)
    if "components" in options:
        options["components"] = {
            name: str(made[each]) for name, each in options["components"].items()
        }
    return model.model_copy(update={"source": str(made[model.source]), "options": options})


LOADED = {
    (model.source, options.pipeline, options.dtype, options.vae_dtype, options.variant): model
    for model in MODELS
    for options in [model.options_as(DiffusersOptions)]
    if options.pipeline != "AnimateDiffPipeline"
}
"""One model of each way to load a repository. AnimateDiff's pipeline copies a UNet of 1.3 B into a
new one, in memory: its UNet is that of Stable Diffusion 1.5, and its adapter has a test below."""


@pytest.mark.slow
@pytest.mark.parametrize("model", LOADED.values(), ids=named)
def test_the_load_takes_every_key(
    model: ModelConfig, tmp_path: Path, starter_dir: StarterDir, caplog: pytest.LogCaptureFixture
) -> None:
    """The real load of the real size: the weights are mapped holes, and none is converted."""
    from engine.runtimes.diffusers.pipeline import Pipeline

    here = local(model, tmp_path, as_loaded=True)
    folder = Path(here.source)
    index = layout_of(model).documents["model_index.json"]
    for name, value in index.items():
        if not isinstance(value, list) or value[1] is None:
            continue
        if value[1] in TOKENIZERS:
            starter, part = TOKENIZERS[value[1]].split("/")
            shutil.rmtree(folder / name)
            shutil.copytree(starter_dir(starter) / part, folder / name)
        elif value[1] in SCHEDULERS:
            shutil.rmtree(folder / name)
            shutil.copytree(starter_dir(SCHEDULERS[value[1]]) / name, folder / name)
    options = here.options_as(DiffusersOptions)
    folders = {name: Path(each) for name, each in options.components.items()}
    pipeline = Pipeline(folder, folders, {}, options, "cpu", group_offload=False)
    parts = {part.name: part for part in layout_of(model).parts}
    for name, module in pipeline.modules().items():
        tensors = module.state_dict().values()
        assert not any(tensor.is_meta for tensor in tensors), name
        # Each tensor of the file has a place of its own: none is left over, and tied ones are one.
        assert len({tensor.data_ptr() for tensor in tensors}) == len(parts[name].tensors), name
    if options.vae_tiling and hasattr(pipeline.base.vae, "tile_latent_min_size"):
        vae = pipeline.base.vae
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)


@pytest.mark.slow
def test_the_load_of_a_motion_adapter_takes_every_key(tmp_path: Path) -> None:
    import torch
    from diffusers import MotionAdapter

    model = next(each for each in MODELS if each.id == "animatediff")
    here = local(model, tmp_path, as_loaded=True).options_as(DiffusersOptions)
    adapter = MotionAdapter.from_pretrained(
        here.components["motion_adapter"], dtype=torch.float16, use_safetensors=True
    )
    assert not [key for key, tensor in adapter.state_dict().items() if tensor.is_meta]


def test_a_layout_takes_no_disk(tmp_path: Path) -> None:
    model = next(each for each in MODELS if each.id == "z-image-turbo")
    folder = Path(local(model, tmp_path, as_loaded=False).source)
    assert sum(file.nbytes for file in list_folder(folder).files) > 2**34
    assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) < 2**21
