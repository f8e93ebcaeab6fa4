"""The starter models that listen through ONNX: a tiny Parakeet and a tiny Canary of NeMo.

Both have the layout of NeMo's exports for onnx-asr: `config.json`, `vocab.txt` and the graphs. The
encoder makes one frame of eight steps of the spectrogram, by one convolution. All weights are
random, and the recording alone decides what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.starters.json_text import write_json
from engine.starters.tensors import RandomTensors, Tensor

WORDS = """the a one my old red fast long train engine wagon driver leaves passes meets sees station
bridge tunnel signal then now soon later it he she everyone waits turns stops sleeps by near under
behind tree house river tower""".split()  # noqa: SIM905

MELS, WIDTH, SUBSAMPLING = 128, 32, 8
DURATIONS = (0, 1, 2, 3, 4)
"""Frames that a token of a TDT model lasts, as in Parakeet."""

ENDINGS = ("s", "ing", "ly")
"""Tokens that continue a word."""

LANGUAGES = ("en", "de", "fr", "es")
PROMPT = (
    "<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|pnc|>", "<|nopnc|>",
    "<|noitn|>", "<|notimestamp|>", "<|nodiarize|>", "<|endoftext|>",
)  # fmt: skip
"""Canary's own tokens, besides those of its languages."""

ANSWER_TOKENS = 14
PROMPT_TOKENS = 10
OPSET, IR_VERSION = 17, 8
SEED = 11


def _write_parakeet(folder: Path) -> None:
    """Write a token-and-duration transducer into an empty folder.

    Raises:
        OSError: the folder cannot be written.

    """
    vocabulary = ["<unk>", *(f"\u2581{word}" for word in WORDS), *ENDINGS, ".", "<blk>"]
    count = len(vocabulary)
    random = RandomTensors(SEED)
    bias = np.zeros(count + len(DURATIONS), np.float32)
    bias[0] = -9.0  # never <unk>
    joint: dict[str, Tensor] = {
        "heard": random.normal(WIDTH, count + len(DURATIONS), std=2 * WIDTH**-0.5),
        "said": random.normal(count, count + len(DURATIONS), std=0.5),
        "bias": bias,
    }
    _save(
        folder / "encoder-model.onnx",
        [*_heard("outputs"), *_lengths()],
        [_float("audio_signal", "batch", MELS, "time"), _int64("length", "batch")],
        [_float("outputs", "batch", WIDTH, "frames"), _int64("encoded_lengths", "batch")],
        _kernel(random),
    )
    state = ("input_states_1", "input_states_2")
    _save(
        folder / "decoder_joint-model.onnx",
        [
            helper.make_node("Transpose", ["encoder_outputs"], ["frames"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["frames", "heard"], ["by_sound"]),
            helper.make_node("Gather", ["said", "targets"], ["by_text"]),
            helper.make_node("Add", ["by_sound", "by_text"], ["sum"]),
            helper.make_node("Add", ["sum", "bias"], ["logits"]),
            helper.make_node("Unsqueeze", ["logits", "axis"], ["outputs"]),
            helper.make_node("Identity", [state[0]], ["output_states_1"]),
            helper.make_node("Identity", [state[1]], ["output_states_2"]),
        ],
        [
            _float("encoder_outputs", "batch", WIDTH, "frames"),
            helper.make_tensor_value_info("targets", TensorProto.INT32, ["batch", "tokens"]),
            helper.make_tensor_value_info("target_length", TensorProto.INT32, ["batch"]),
            *(_float(name, 1, "batch", WIDTH) for name in state),
        ],
        [
            _float("outputs", "batch", 1, 1, count + len(DURATIONS)),
            *(_float(f"output_states_{at}", 1, "batch", WIDTH) for at in (1, 2)),
        ],
        {**joint, "axis": np.array([1], np.int64)},
    )
    _write_texts(folder, "nemo-conformer-tdt", vocabulary)


def _write_canary(folder: Path) -> None:
    """Write an encoder and a decoder with attention to it into an empty folder.

    Raises:
        OSError: the folder cannot be written.

    """
    vocabulary = [
        "<unk>",
        *PROMPT,
        *(f"<|{language}|>" for language in LANGUAGES),
        "\u2581",
        *(f"\u2581{word}" for word in WORDS),
        *ENDINGS,
    ]
    count, special = len(vocabulary), 2 + len(PROMPT) + len(LANGUAGES)
    random = RandomTensors(SEED + 1)
    bias = np.zeros(count, np.float32)
    bias[:special] = -99.0  # it says words until it has said enough
    decoder: dict[str, Tensor] = {
        "embedding": random.normal(count, WIDTH),
        "projection": random.normal(WIDTH, count, std=2 * WIDTH**-0.5),
        "bias": bias,
    }
    _save(
        folder / "encoder-model.onnx",
        [
            *_heard("channels"),
            helper.make_node("Transpose", ["channels"], ["encoder_embeddings"], perm=[0, 2, 1]),
            *_lengths(),
            helper.make_node("Shape", ["encoder_embeddings"], ["shape"], end=2),
            helper.make_node(
                "ConstantOfShape",
                ["shape"],
                ["encoder_mask"],
                value=numpy_helper.from_array(np.array([1], np.int64)),
            ),
        ],
        [_float("audio_signal", "batch", MELS, "time"), _int64("length", "batch")],
        [
            _float("encoder_embeddings", "batch", "frames", WIDTH),
            _int64("encoder_mask", "batch", "frames"),
        ],
        _kernel(random),
    )
    _save(
        folder / "decoder-model.onnx",
        [
            helper.make_node("Gather", ["embedding", "input_ids"], ["tokens"]),
            helper.make_node("ReduceMean", ["encoder_embeddings"], ["sound"], axes=[1]),
            # The language is one of the first tokens, so all of them count.
            helper.make_node("Unsqueeze", ["tokens", "axis"], ["new"]),
            helper.make_node("Concat", ["decoder_mems", "new"], ["decoder_hidden_states"], axis=2),
            helper.make_node(
                "ReduceMean", ["decoder_hidden_states"], ["all_tokens"], axes=[0], keepdims=0
            ),
            helper.make_node("ReduceMean", ["all_tokens"], ["mean"], axes=[1]),
            helper.make_node("Mul", ["mean", "gain"], ["context"]),
            helper.make_node("Sum", ["tokens", "sound", "context"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "projection"], ["scores"]),
            helper.make_node("Add", ["scores", "bias"], ["biased"]),
            helper.make_node("LogSoftmax", ["biased"], ["logits"], axis=-1),
        ],
        [
            _int64("input_ids", "batch", "tokens"),
            _float("encoder_embeddings", "batch", "frames", WIDTH),
            _int64("encoder_mask", "batch", "frames"),
            _float("decoder_mems", 1, "batch", "before", WIDTH),
        ],
        [
            _float("logits", "batch", "tokens", count),
            _float("decoder_hidden_states", 1, "batch", "all", WIDTH),
        ],
        {**decoder, "axis": np.array([0], np.int64), "gain": np.array(6, np.float32)},
    )
    length = PROMPT_TOKENS + ANSWER_TOKENS
    _write_texts(folder, "nemo-conformer-aed", vocabulary, max_sequence_length=length)


def _heard(output: str) -> list[onnx.NodeProto]:
    """The convolution over the spectrogram: `(batch, mels, time)` to `(batch, width, frames)`."""
    return [
        helper.make_node(
            "Conv",
            ["audio_signal", "kernel"],
            ["convolved"],
            kernel_shape=[SUBSAMPLING],
            strides=[SUBSAMPLING],
            pads=[0, SUBSAMPLING - 1],
        ),
        helper.make_node("Tanh", ["convolved"], [output]),
    ]


def _lengths() -> list[onnx.NodeProto]:
    """Frames of each recording, from steps of its spectrogram."""
    return [
        helper.make_node("Sub", ["length", "one"], ["last"]),
        helper.make_node("Div", ["last", "subsampling"], ["last_frame"]),
        helper.make_node("Add", ["last_frame", "one"], ["encoded_lengths"]),
    ]


def _kernel(random: RandomTensors) -> dict[str, Tensor]:
    return {
        "kernel": random.normal(WIDTH, MELS, SUBSAMPLING, std=2 * (MELS * SUBSAMPLING) ** -0.5),
        "one": np.array(1, np.int64),
        "subsampling": np.array(SUBSAMPLING, np.int64),
    }


def _float(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _int64(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def _save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, Tensor],
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        inputs,
        outputs,
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _write_texts(
    folder: Path, model_type: str, vocabulary: Sequence[str], **settings: object
) -> None:
    write_json(
        folder / "config.json",
        {
            "model_type": model_type,
            "features_size": MELS,
            "subsampling_factor": SUBSAMPLING,
            **settings,
        },
    )
    lines = (f"{token} {index}\n" for index, token in enumerate(vocabulary))
    (folder / "vocab.txt").write_text("".join(lines), encoding="utf-8")


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {"tiny-parakeet": _write_parakeet, "tiny-canary": _write_canary}
)
"""The function that writes each model into an empty folder, by the model's name."""
