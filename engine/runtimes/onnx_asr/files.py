"""The files of a model in ONNX, as NVIDIA NeMo's exports for onnx-asr name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from engine.errors import LoadFailed
from engine.runtimes.onnx_asr.options import ModelType, OnnxAsrOptions

GRAPHS: Mapping[ModelType, tuple[str, ...]] = {
    "nemo-conformer-ctc": ("model",),
    "nemo-conformer-rnnt": ("encoder-model", "decoder_joint-model"),
    "nemo-conformer-tdt": ("encoder-model", "decoder_joint-model"),
    "nemo-conformer-aed": ("encoder-model", "decoder-model"),
}
"""The graphs of each kind of model."""

CONFIG = "config.json"
VOCABULARY = "vocab.txt"


def graph_file(name: str, quantization: str | None) -> str:
    """The file of a graph: `encoder-model.onnx`, or `encoder-model.int8.onnx`."""
    return f"{name}.{quantization}.onnx" if quantization else f"{name}.onnx"


def wanted_files(options: OnnxAsrOptions) -> tuple[str, ...]:
    """What to fetch of a hub. Large graphs have their weights in a second file beside them."""
    kinds = GRAPHS.values() if options.model_type is None else (GRAPHS[options.model_type],)
    names = dict.fromkeys(name for names in kinds for name in names)
    graphs = [graph_file(name, options.quantization) for name in names]
    return (CONFIG, VOCABULARY, *graphs, *(f"{graph}.data" for graph in graphs))


def model_type(folder: Path, options: OnnxAsrOptions) -> ModelType:
    """The kind of a model.

    Raises:
        LoadFailed: nothing says it, or it is none of those that are served.

    """
    if options.model_type is not None:
        return options.model_type
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        said = config.get("model_type") if isinstance(config, dict) else None
    except OSError:
        raise LoadFailed(f"{folder.name}: no {CONFIG}; the option model_type is wanted") from None
    except ValueError as error:
        raise LoadFailed(f"{folder.name}: cannot read {CONFIG}: {error}") from error
    for known in get_args(ModelType):
        if said == known:
            found: ModelType = known
            return found
    raise LoadFailed(
        f"{folder.name}: the model_type {said!r} is not served; there is "
        + ", ".join(get_args(ModelType))
    )


def weight_files(folder: Path, options: OnnxAsrOptions) -> tuple[Path, ...]:
    """The files that a load reads.

    Raises:
        LoadFailed: one is missing, or the kind of the model is unknown.

    """
    found: list[Path] = []
    for name in GRAPHS[model_type(folder, options)]:
        graph = folder / graph_file(name, options.quantization)
        if not graph.is_file():
            raise LoadFailed(f"{folder.name}: no {graph.name}")
        data = graph.with_name(f"{graph.name}.data")
        found += [graph, data] if data.is_file() else [graph]
    if not (folder / VOCABULARY).is_file():
        raise LoadFailed(f"{folder.name}: no {VOCABULARY}")
    return tuple(found)
