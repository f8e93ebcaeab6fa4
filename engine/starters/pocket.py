"""The starter model of Pocket TTS: a folder with a configuration of the library, and two voices.

The parts are instances of the library's classes with small sizes. Their constructors draw the
parameters from a seeded generator, so the same versions of pocket-tts and torch always write the
same bytes. Importing this module imports both.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from pocket_tts import TTSModel, export_model_state
from pocket_tts.models.mimi import build_mimi
from pocket_tts.models.tts_model import stamp_state_names
from pocket_tts.modules.stateful_module import init_states
from pocket_tts.utils.config import Config
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from engine.process.gate import GATE

VOICES = ("alba", "marius")
"""Two voices, with names of the library's."""

_VOICE_FRAMES = 12

_LETTERS = string.ascii_letters + string.digits + ".,;:!?'\"()-–—…" + "àâäçéèêëîïñôöùûüß"

_CONFIG: dict[str, Any] = {
    "weights_path": "model.safetensors",
    "flow_lm": {
        "insert_bos_before_voice": True,
        "dtype": "float32",
        "flow": {"depth": 1, "dim": 32},
        "transformer": {
            "d_model": 64,
            "hidden_scale": 2,
            "max_period": 10000,
            "num_heads": 4,
            "num_layers": 2,
        },
        "lookup_table": {
            "dim": 64,
            "n_bins": 2 + len(_LETTERS),
            "tokenizer": "tokenizers",
            "tokenizer_path": "tokenizer.json",
        },
    },
    "mimi": {
        "dtype": "float32",
        "sample_rate": 24000,
        "inner_dim": 8,
        "outer_dim": 32,
        "channels": 1,
        "frame_rate": 12.5,
        "seanet": {
            "dimension": 32,
            "channels": 1,
            "n_filters": 4,
            "n_residual_layers": 1,
            "ratios": [6, 5, 4],
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 3,
            "dilation_base": 2,
            "pad_mode": "constant",
            "compress": 2,
        },
        "transformer": {
            "d_model": 32,
            "num_heads": 2,
            "num_layers": 1,
            "layer_scale": 0.01,
            "context": 50,
            "dim_feedforward": 64,
            "input_dimension": 32,
            "output_dimensions": [32],
        },
        "quantizer": {"dimension": 8, "output_dimension": 32},
    },
}


def _write_pocket(folder: Path) -> None:
    """Write the starter model into an empty folder. Takes a second.

    Modules are constructed behind the gate; torch's random state is afterwards what it was.

    Raises:
        OSError: the folder cannot be written.

    """
    text = yaml.safe_dump(_CONFIG, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    _tokenizer().save(str(folder / "tokenizer.json"))
    table = {**_CONFIG["flow_lm"]["lookup_table"], "tokenizer_path": str(folder / "tokenizer.json")}
    config = Config(**{**_CONFIG, "flow_lm": {**_CONFIG["flow_lm"], "lookup_table": table}})
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(4)
        model = TTSModel._from_pydantic_config(
            config,
            temp=config.default_temperature,
            sampler_decode_steps=1,
            noise_clamp=None,
            eos_threshold=config.default_eos_threshold,
            origin=None,
        )
        width = _CONFIG["mimi"]["inner_dim"]
        model.flow_lm.speaker_proj_weight = torch.nn.Parameter(torch.randn(64, width))
        model.mimi = build_mimi(config.mimi)
        stamp_state_names(model)
        model.eval()
        _make_it_speak(model)
        tensors = {name: each.contiguous() for name, each in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "embeddings").mkdir()
        for name in VOICES:
            heard = torch.randn(1, _VOICE_FRAMES, 64)
            state = init_states(model.flow_lm, batch_size=1, sequence_length=_VOICE_FRAMES)
            model._run_flow_lm_and_increment_step(model_state=state, audio_conditioning=heard)
            export_model_state(state, folder / "embeddings" / f"{name}.safetensors")


def _make_it_speak(model: Any) -> None:
    """Mostly end a chunk after one to two seconds, and make samples loud but in range."""
    model.flow_lm.out_eos.weight.mul_(4.0)
    model.flow_lm.out_eos.bias.fill_(-3.5)
    steps = int(model.mimi.encoder_frame_rate / model.mimi.frame_rate)
    state = init_states(model.mimi, batch_size=1, sequence_length=10 * steps)
    audio = model.mimi.decode_from_latent(torch.randn(1, 10, model.flow_lm.ldim), state)
    last = [each for each in model.mimi.decoder.modules() if isinstance(each, torch.nn.Conv1d)][-1]
    # A power of two: the same bytes, however the device rounds.
    scale = 2.0 ** round(math.log2(0.1 / float(audio.std())))
    last.weight.mul_(scale)
    if last.bias is not None:
        last.bias.mul_(scale)


def _tokenizer() -> Tokenizer:
    """Single characters, with the marks of words that SentencePiece has."""
    tokens = ["<unk>", "▁", *_LETTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType({"tiny-pocket-tts": _write_pocket})
"""The function that writes each model into an empty folder, by the model's name."""
