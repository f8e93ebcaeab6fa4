"""The language and embedding models of the configurations, in the form in which they are published.

The folder has true headers and no weights, and vLLM's own classes are built without memory. What is
real is the match of names and shapes: vLLM refuses a name that it does not know, and our loader a
parameter that no name has filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.memory.device import CpuDevice
from engine.process.gate import GATE
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.checkpoint import Checkpoint
from engine.runtimes.vllm.options import VllmOptions
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.layouts.configured import configured
from tests.layouts.layout import TOLERANCE, Layout, layouts
from tests.layouts.sparse import write_safetensors

pytestmark = pytest.mark.slow

MODELS = [pytest.param(model, id=model.source) for model in configured("vllm")]
BY_SOURCE = [
    pytest.param(model, id=source)
    for source, model in {model.source: model for model in configured("vllm")}.items()
]


def published(model: ModelConfig, layout: Layout, folder: Path) -> ModelConfig:
    """The model with only those files of its repository that would be fetched."""
    (source,) = VllmRuntime.hub_sources(model)
    layout.build(folder, only=layout.fetched(source))
    return model.model_copy(update={"source": str(folder)})


@contextmanager
def built(runtime: VllmRuntime, model: ModelConfig) -> Iterator[tuple[Any, Any, Any]]:
    """vLLM's module for a model, without memory; its configuration; the runtime's loader."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.torch_utils import set_default_torch_dtype

    # The command line of the runtime, but for what needs a tokenizer, which the layout has not.
    plain = {**model.options, "reasoning_parser": None, "tool_call_parser": None}
    model = model.model_copy(update={"options": plain})
    line = [*runtime._files(model).command_line(2**24), "--skip-tokenizer-init"]
    with GATE.exclusive():
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
        config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
        ):
            with torch.device("meta"):
                module = initialize_model(config)
            yield module, config.model_config, get_model_loader(config.load_config)


def parameter_bytes(module: Any) -> int:
    """Bytes of all parameters; tied ones count once."""
    return sum(each.numel() * each.element_size() for each in module.parameters())


@pytest.mark.parametrize("model", BY_SOURCE)
def test_the_published_names_fill_the_model(
    model: ModelConfig, vllm_runtime: VllmRuntime, tmp_path: Path
) -> None:
    layout = layouts()[model.source]
    if "num_experts" in layout.documents["config.json"]:
        layout = layout.shallow(2)
    local = published(model, layout, tmp_path / "repo")
    options = model.options_as(VllmOptions)
    with built(vllm_runtime, local) as (module, config, loader):
        loader.load_weights(module, config)
        nbytes = parameter_bytes(module)
    width = Checkpoint(tmp_path / "repo").item_bytes(options.dtype)
    stored = sum(each.count for name, each in layout.tensors() if name != "lm_head.weight")
    # vLLM fills a second copy of the embedding too. It drops it when both are the same.
    second = dict(layout.tensors()).get("lm_head.weight")
    expected = (stored + (0 if second is None else second.count)) * width
    assert nbytes == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_the_estimate_is_what_is_published(model: ModelConfig, tmp_path: Path) -> None:
    layout = layouts()[model.source]
    local = published(model, layout, tmp_path / "repo")
    runtime = VllmRuntime(RuntimeContext(CpuDevice(), tmp_path))
    options = model.options_as(VllmOptions)
    checkpoint = Checkpoint(tmp_path / "repo")
    stored_width = max(
        each.nbytes // each.count for _, each in layout.tensors() if each.count > 512
    )
    parameters = layout.published["bytes"] / stored_width
    blocks = {block.name: block.nbytes for block in runtime.estimate(local).blocks}
    extra = 0
    if model.task == "generate":  # a CPU keeps a form of its own of the output embedding
        extra = checkpoint.embedding_bytes(options.dtype)
    expected = parameters * checkpoint.item_bytes(options.dtype)
    assert blocks["weights"] - extra == pytest.approx(expected, rel=TOLERANCE)
    # The plan of the configuration counts a token of the cache as we do.
    if options.kv_cache:
        tokens = blocks["kv_cache"] // checkpoint.kv_bytes_per_token(options.dtype)
        assert options.max_model_len is not None
        assert tokens > options.max_model_len


@pytest.mark.parametrize("lacking", ["model.layers.3.self_attn.o_proj.weight", "model.norm.weight"])
def test_a_name_that_is_missing_is_refused(
    lacking: str, vllm_runtime: VllmRuntime, tmp_path: Path
) -> None:
    layout = layouts()["Qwen/Qwen3-0.6B"]
    folder = layout.build(tmp_path / "repo")
    rest = {name: each for name, each in layout.tensors() if name != lacking}
    write_safetensors(folder / "model.safetensors", rest)
    model = layout.model(str(folder), dtype="bfloat16")
    with (
        built(vllm_runtime, model) as (module, config, loader),
        pytest.raises(ValueError, match=lacking.replace(".", r"\.")),
    ):
        loader.load_weights(module, config)
