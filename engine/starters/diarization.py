"""The starter model that tells voices apart: by pitch alone, in the files of real diarizers.

`model.onnx` has the shape of pyannote's segmentation 3.0, and `embedding.onnx` that of WeSpeaker's
models. Nothing was trained: both compute a fixed function. A voice around 110 Hz is one speaker,
and one above 180 Hz is another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RATE = 16_000
WINDOW, FIELD, STEP = 10 * RATE, 991, 270
"""Samples of a window, of what a frame sees, and between two frames: 589 frames a window."""

SPEAKERS, CLASSES = 3, 7
"""A frame has nobody, one of three speakers, or two of them: pyannote's powerset."""

LOW_HZ = (85.0, 105.0, 125.0, 145.0)
HIGH_HZ = (185.0, 210.0, 235.0, 260.0)
LOW_SHARE = 0.3
"""A low voice has its second harmonic among the high tones. A high voice has nothing lower."""

SPEECH_ENERGY = 1e-5
"""The mean square of samples, -1 to 1, above which somebody speaks: -50 dB."""

SMOOTH_FRAMES, HOLD_FRAMES = 31, 11
"""Frames whose tones and whose energy count together: half a second, and a fifth."""

MEL_BINS, PITCH_BANDS = 80, 8
"""Bands of the spectrogram, and how many of the lowest hold the pitch of a voice."""

STEEP = 1.5
"""Half the rise, in nepers, over those bands that is neither a low nor a high voice."""

OPSET, IR_VERSION = 17, 8
Array = NDArray[np.float32] | NDArray[np.int64]


def _write(folder: Path) -> None:
    """Write both models into an empty folder.

    Raises:
        OSError: the folder cannot be written.

    """
    _write_segmentation(folder / "model.onnx")
    _write_embedding(folder / "embedding.onnx")


def _write_segmentation(path: Path) -> None:
    """Samples `(batch, 1, time)` to scores of the classes `(batch, frames, 7)`.

    Filters measure the tones of low and of high voices in each frame.
    """
    to_class = np.zeros((3, CLASSES), np.float32)
    to_class[0] = [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # speech
    to_class[1] = [0.0, 1.0, -1.0, -99.0, -99.0, -99.0, -99.0]  # pitch: low is the first speaker
    to_class[2] = [0.0, 0.0, 0.0, -99.0, -99.0, -99.0, -99.0]  # one: there is no third speaker
    is_low = np.repeat([1.0, 0.0], [2 * len(LOW_HZ), 2 * len(HIGH_HZ)]).reshape(1, -1, 1)
    weights: dict[str, Array] = {
        "tones": _tones(),
        "low": is_low.astype(np.float32),
        "high": (1 - is_low).astype(np.float32),
        "low_share": np.array(LOW_SHARE, np.float32),
        "least": np.array(1e-12, np.float32),
        "speech_energy": np.array(SPEECH_ENERGY, np.float32),
        "steep": np.array(10.0, np.float32),
        "to_class": to_class,
    }
    hold = {"kernel_shape": [HOLD_FRAMES], "pads": [HOLD_FRAMES // 2] * 2}
    smooth = {"kernel_shape": [SMOOTH_FRAMES], "pads": [SMOOTH_FRAMES // 2] * 2}
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "x"], ["squares"]),
        node("AveragePool", ["squares"], ["mean"], kernel_shape=[FIELD], strides=[STEP]),
        node("AveragePool", ["mean"], ["energy"], **hold),
        *_log_ratio("energy", "speech_energy", "speech_log"),
        node("Mul", ["speech_log", "steep"], ["speech"]),
        node("Conv", ["x", "tones"], ["heard"], kernel_shape=[FIELD], strides=[STEP]),
        node("Mul", ["heard", "heard"], ["powers"]),
        node("AveragePool", ["powers"], ["smooth"], **smooth),
        node("Conv", ["smooth", "low"], ["low_power"], kernel_shape=[1]),
        node("Conv", ["smooth", "high"], ["high_power"], kernel_shape=[1]),
        node("Mul", ["high_power", "low_share"], ["high_scaled"]),
        *_log_ratio("low_power", "high_scaled", "pitch_log"),
        node("Tanh", ["pitch_log"], ["pitch"]),
        node("Sub", ["pitch", "pitch"], ["zero"]),
        node("Exp", ["zero"], ["one"]),
        node("Concat", ["speech", "pitch", "one"], ["features"], axis=1),
        node("Transpose", ["features"], ["frames"], perm=[0, 2, 1]),
        node("MatMul", ["frames", "to_class"], ["scores"]),
        node("LogSoftmax", ["scores"], ["y"], axis=-1),
    ]
    metadata = {
        "num_speakers": SPEAKERS,
        "powerset_max_classes": 2,
        "num_classes": CLASSES,
        "sample_rate": RATE,
        "window_size": WINDOW,
        "receptive_field_size": FIELD,
        "receptive_field_shift": STEP,
        "model_type": "pyannote-segmentation-3.0",
        "version": "1",
    }
    inputs, outputs = _float("x", "batch", 1, "time"), _float("y", "batch", "frames", CLASSES)
    _save(path, nodes, inputs, outputs, weights, metadata)


def _write_embedding(path: Path) -> None:
    """A spectrogram `(batch, time, 80)` to numbers of a voice `(batch, 8)`: its lowest bands.

    Logarithms of powers come in. The level of each band goes out, against a slope that lies
    between those of low and of high voices.
    """
    take = np.zeros((MEL_BINS, PITCH_BANDS), np.float32)
    take[1 : 1 + PITCH_BANDS] = np.eye(PITCH_BANDS)  # the lowest is below any voice
    centre = (np.eye(PITCH_BANDS) - 1 / PITCH_BANDS).astype(np.float32)
    node = helper.make_node
    nodes = [
        node("MatMul", ["feats", "take"], ["logs"]),
        node("Mul", ["logs", "half"], ["halved"]),
        node("Exp", ["halved"], ["amplitudes"]),
        node("ReduceMean", ["amplitudes"], ["mean"], axes=[1], keepdims=0),
        node("Log", ["mean"], ["levels"]),
        node("MatMul", ["levels", "centre"], ["centred"]),
        node("Sub", ["centred", "between"], ["unlike"]),
        node("LpNormalization", ["unlike"], ["embs"], axis=1, p=2),
    ]
    weights: dict[str, Array] = {
        "take": take,
        "half": np.array(0.5, np.float32),
        "centre": centre,
        "between": np.linspace(-STEEP, STEEP, PITCH_BANDS, dtype=np.float32),
    }
    metadata = {
        "framework": "wespeaker",
        "language": "any",
        "url": "",
        "comment": "a fixed function",
        "sample_rate": RATE,
        "output_dim": PITCH_BANDS,
        "normalize_samples": 0,
    }
    inputs = _float("feats", "batch", "time", MEL_BINS)
    outputs = _float("embs", "batch", PITCH_BANDS)
    _save(path, nodes, inputs, outputs, weights, metadata)


def _tones() -> NDArray[np.float32]:
    """Filters `(tones × 2, 1, 991)`: a cosine and a sine of each tone under Hann's window."""
    at = np.arange(FIELD) / RATE
    angles = 2 * np.pi * np.outer((*LOW_HZ, *HIGH_HZ), at)
    waves = np.stack([np.cos(angles), np.sin(angles)], axis=1).reshape(-1, 1, FIELD)
    return np.asarray(waves * np.hanning(FIELD) / FIELD, np.float32)


def _log_ratio(above: str, below: str, output: str) -> list[onnx.NodeProto]:
    names = [f"{output}_{part}" for part in ("above", "below", "ratio")]
    return [
        helper.make_node("Add", [above, "least"], [names[0]]),
        helper.make_node("Add", [below, "least"], [names[1]]),
        helper.make_node("Div", names[:2], [names[2]]),
        helper.make_node("Log", [names[2]], [output]),
    ]


def _float(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: onnx.ValueInfoProto,
    outputs: onnx.ValueInfoProto,
    weights: Mapping[str, Array],
    metadata: Mapping[str, object],
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [inputs],
        [outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    helper.set_model_props(model, {key: str(value) for key, value in metadata.items()})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType({"tiny-diarization": _write})
"""The function that writes each model into an empty folder, by the model's name."""
