"""The starter model that listens: a tiny multilingual Whisper in CTranslate2's format.

It is not trained, but it does listen. It says two sentences of fixed form, and the recording,
the language, the task and the prompt decide which word stands at each place. Almost all weights
are random. The first half of the model's width says which place of the form comes next. The
second half adds up the recording and the words before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer

from engine.files.ctranslate2_file import write_variables
from engine.starters.json_text import write_json
from engine.starters.tensors import RandomTensors, Tensor, Tensors

LANGUAGES = """en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu
ta no th ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl
mr pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw
ln ha ba jw su""".split()  # noqa: SIM905
"""In the order of Whisper's tokens (github.com/openai/whisper, whisper/tokenizer.py)."""

TIMESTAMPS = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]

FIRST = ["The A One My", "old red fast long", "train engine wagon driver",
         "leaves passes meets sees", "the", "station bridge tunnel signal", "."]  # fmt: skip
SECOND = ["Then Now Soon Later", "it he she everyone", "waits turns stops sleeps",
          "by near under behind", "a", "tree house river tower", "!"]  # fmt: skip
"""The words that may stand at each place of the two sentences."""

FORM = [
    "<|startoftranscript|>", "language", "task", "<|0.00|>", *FIRST, "<|1.20|>", "<|1.40|>",
    *SECOND, "<|2.60|>", "<|endoftext|>",
]  # fmt: skip
"""The places of an answer in their order."""

WIDTH, HEADS, MELS, FRAMES, POSITIONS = 128, 2, 80, 1500, 448
HALF = WIDTH // 2

PLACE_GAIN = 120.0
"""Logits by which the tokens of the next place exceed all others."""
CHOICE_GAIN = 5.0
"""Standard deviation of the logits among the tokens of one place."""
HEARD_GAIN = 2.5
SAID_GAIN = 1.0
"""How much the recording, and how much the prompt and the words before, decide the choice."""
FOCUS = 6.0
"""How far apart the attention weights of the moments of a recording are."""
SEED = 7

SETTINGS: dict[str, NDArray[np.generic]] = {
    "decoder/activation": np.array(3, np.int8),  # GELU
    "decoder/alibi": np.array(0, np.int8),
    "decoder/alibi_use_positive_positions": np.array(0, np.int8),
    "decoder/alignment_heads": np.array(1, np.int16),
    "decoder/alignment_layer": np.array(-1, np.int16),
    "decoder/num_heads": np.array(HEADS, np.int16),
    "decoder/pre_norm": np.array(1, np.int8),
    "decoder/scale_alibi": np.array(0, np.int8),
    "decoder/scale_embeddings": np.array(0, np.int8),
    "decoder/start_from_zero_embedding": np.array(0, np.int8),
    "encoder/num_heads": np.array(HEADS, np.int16),
}
"""The scalars that `ctranslate2.specs.WhisperSpec` of revision 3 writes."""


def _write_whisper(folder: Path) -> None:
    """Write the model into an empty folder, in the format that faster-whisper loads.

    Raises:
        OSError: the folder cannot be written.

    """
    tokenizer, words = _tokenizer()
    vocabulary = [*words, *_special_tokens(), *TIMESTAMPS]
    ids = {token: index for index, token in enumerate(vocabulary)}
    random = RandomTensors(SEED)
    weights = {**_encoder(random), **_decoder(random, vocabulary)}
    write_variables(
        folder / "model.bin",
        "WhisperSpec",
        3,
        {**SETTINGS, **{name: weight.astype(np.float16) for name, weight in weights.items()}},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    documents: dict[str, object] = {
        "vocabulary.json": vocabulary,
        "config.json": {
            "alignment_heads": [[1, head] for head in range(HEADS)],
            "lang_ids": [ids[f"<|{language}|>"] for language in LANGUAGES],
            "suppress_ids": [],
            "suppress_ids_begin": [ids["Ġ"], ids["<|endoftext|>"]],
        },
        "preprocessor_config.json": {
            "chunk_length": 30,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": MELS,
            "hop_length": 160,
            "n_fft": 400,
            "sampling_rate": 16000,
        },
    }
    for name, document in documents.items():
        write_json(folder / name, document)


def _special_tokens() -> list[str]:
    return [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *(f"<|{language}|>" for language in LANGUAGES),
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nocaptions|>",
        "<|notimestamps|>",
    ]


def _tokenizer() -> tuple[Tokenizer, list[str]]:
    """A byte-level BPE that knows every word of the form, and its tokens without the specials."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=2000, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    # Often enough to be merged until each is one token.
    trained.train_from_iterator([f" {place}" for place in FIRST + SECOND] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    # CTranslate2 takes a model for multilingual if it has an empty token: no other has one.
    words = [*sorted(model["vocab"], key=model["vocab"].__getitem__), ""]
    tokenizer = Tokenizer(
        BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[tuple(merge) for merge in model["merges"]],
        )
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _special_tokens()]
    )
    return tokenizer, words


def _encoder(random: RandomTensors) -> Tensors:
    """Two convolutions that hear changes in pitch and time; the layer after them adds nothing."""
    kernels = random.normal(WIDTH, MELS, 3)
    layer = "encoder/layer_0"
    return {
        # Without a mean, so that loudness alone has no effect.
        "encoder/conv1/weight": kernels - kernels.mean(axis=(1, 2), keepdims=True),
        "encoder/conv1/bias": np.zeros(WIDTH, np.float32),
        "encoder/conv2/weight": random.normal(WIDTH, WIDTH, 3, std=(3 * WIDTH) ** -0.5),
        "encoder/conv2/bias": np.zeros(WIDTH, np.float32),
        "encoder/position_encodings/encodings": _sinusoids(FRAMES),
        **_layer_norm("encoder/layer_norm"),
        **_attention(f"{layer}/self_attention", _zeros(3 * WIDTH), _zeros(WIDTH)),
        **_feed_forward(f"{layer}/ffn"),
    }


def _decoder(random: RandomTensors, vocabulary: Sequence[str]) -> Tensors:
    """One layer that attends to the words before and the recording, and one for word times."""
    embeddings, projection = _token_weights(random, vocabulary)
    # In the second half, so that the place is not disturbed.
    positions = random.normal(POSITIONS, WIDTH, std=0.1)
    positions[:, :HALF] = 0
    weights = {
        "decoder/embeddings/weight": embeddings,
        "decoder/projection/weight": projection,
        "decoder/position_encodings/encodings": positions,
        **_layer_norm("decoder/layer_norm"),
    }
    identity = np.eye(WIDTH, dtype=np.float32)
    for index in range(2):
        layer = f"decoder/layer_{index}"
        said, heard = _zeros(WIDTH), _zeros(WIDTH)
        if index == 0:
            said[HALF:] = random.normal(HALF, WIDTH, std=SAID_GAIN * WIDTH**-0.5)
            heard[HALF:] = random.normal(HALF, WIDTH, std=HEARD_GAIN * WIDTH**-0.5)
        query = random.normal(WIDTH, WIDTH, std=FOCUS * WIDTH**-0.5)
        key = random.normal(WIDTH, WIDTH, std=WIDTH**-0.5)
        # To all tokens alike, but to some moments of the recording more than to others.
        alike = np.concatenate([_zeros(2 * WIDTH), identity])
        weights |= _attention(f"{layer}/self_attention", alike, said)
        moments = np.concatenate([key, identity])
        weights |= _attention(f"{layer}/attention", query, moments, heard)
        weights |= _feed_forward(f"{layer}/ffn")
    return weights


def _token_weights(random: RandomTensors, vocabulary: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embedding and projection: the code of a token's place, and of the place before it."""
    codes = _codes()
    embeddings = np.zeros((len(vocabulary), WIDTH), np.float32)
    embeddings[:, HALF:] = random.normal(len(vocabulary), HALF, std=0.5)
    projection = np.zeros((len(vocabulary), WIDTH), np.float32)
    places: dict[str, int] = {}
    for place, choices in enumerate(FORM):
        places |= dict.fromkeys(_tokens_of(choices), place)
    # Without timestamps, the words begin at the place of the first timestamp.
    places["<|notimestamps|>"] = places["<|0.00|>"]
    for index, token in enumerate(vocabulary):
        choice = random.normal(HALF, std=CHOICE_GAIN * HALF**-0.5)
        if token not in places:
            continue
        place = places[token]
        embeddings[index, :HALF] = codes[place]
        if place > 0 and token != "<|notimestamps|>":
            projection[index, :HALF] = codes[place - 1] * (PLACE_GAIN / HALF)
            projection[index, HALF:] = choice
    english = vocabulary.index("<|en|>")
    # So that the detected language is mostly English.
    projection[english, :HALF] *= 1.5
    # Otherwise the task would have no more effect than any word.
    embeddings[vocabulary.index("<|translate|>"), HALF:] *= 6
    return embeddings, projection


def _tokens_of(choices: str) -> list[str]:
    if choices == "language":
        return [f"<|{language}|>" for language in LANGUAGES]
    if choices == "task":
        return ["<|transcribe|>", "<|translate|>"]
    if choices.startswith("<|") or choices in ".!":
        return [choices]
    return [f"Ġ{word}" for word in choices.split()]


def _codes() -> Tensor:
    """Vectors of ±1 that are orthogonal to each other (Sylvester's Hadamard matrix)."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < HALF:
        signs = np.block([[signs, signs], [signs, -signs]])
    codes: Tensor = signs[1:].astype(np.float32)
    return codes


def _sinusoids(length: int, longest: float = 10000.0) -> Tensor:
    """Whisper's own position encoding (whisper/model.py, `sinusoids`)."""
    rates = np.exp(-np.log(longest) / (HALF - 1) * np.arange(HALF))
    angles = np.arange(length)[:, None] * rates[None]
    encodings: Tensor = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return encodings


def _attention(name: str, *linears: Tensor) -> Tensors:
    """Projections in (query, key and value together or apart) and out."""
    weights = _layer_norm(f"{name}/layer_norm")
    for index, weight in enumerate(linears):
        weights |= _linear(f"{name}/linear_{index}", weight)
    return weights


def _feed_forward(name: str) -> Tensors:
    """A feed-forward block that adds nothing."""
    return {
        **_layer_norm(f"{name}/layer_norm"),
        **_linear(f"{name}/linear_0", _zeros(WIDTH)),
        **_linear(f"{name}/linear_1", _zeros(WIDTH)),
    }


def _linear(name: str, weight: Tensor) -> Tensors:
    return {f"{name}/weight": weight, f"{name}/bias": np.zeros(len(weight), np.float32)}


def _layer_norm(name: str) -> Tensors:
    return {
        f"{name}/gamma": np.ones(WIDTH, np.float32),
        f"{name}/beta": np.zeros(WIDTH, np.float32),
    }


def _zeros(outputs: int) -> Tensor:
    return np.zeros((outputs, WIDTH), np.float32)


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType({"tiny-whisper": _write_whisper})
"""The function that writes each model into an empty folder, by the model's name."""
