"""A starter model of Kokoro: a folder like hexgrad/Kokoro-82M, with a voice of each kind.

Kokoro's code fixes the sizes of its vocoder, so even the smallest has 59 million parameters. The
large tensors are overlapping windows on a few thousand random numbers, and a file of torch holds
only those numbers. Importing this module imports torch and kokoro (some 5 s).
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from kokoro import KModel

from engine.process.gate import GATE

VOICES = (
    *("af_alloy", "af_bella", "af_heart", "af_nova", "af_sarah", "af_sky"),
    *("am_adam", "am_echo", "am_michael", "am_onyx", "bf_emma", "bm_fable", "bm_george"),
    *("ef_dora", "ff_siwis", "hf_alpha", "if_sara", "pf_dora"),
)
"""Voices of Kokoro-82M: all targets of OpenAI's names, and one of each language."""

_PHONEMES = (
    ';:,.!?—…"()“” \u0303ʣʥʦʨᵝ\uab67AIOQSTWYᵊabcdefhijklmnopqrstuvwxyzɑɐɒæβɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴ'
    "øɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ"
)
"""Kokoro's vocabulary; here the id of each is its place."""

_STYLE_WIDTH = 256
_MAX_PHONEMES = 510
_LARGE = 4096
"""Tensors with more numbers than this are windows."""

_UNTRAINED = (".norm.weight", ".norm.bias")
"""Suffixes of the weights that the real file lacks: the library leaves them at 1 and 0."""

CONFIG: dict[str, Any] = {
    # Fixed by the library's code or by its vocoder.
    "hidden_dim": 512,
    "style_dim": 128,
    "n_mels": 80,
    "max_conv_dim": 512,
    "multispeaker": True,
    "n_token": 178,
    "istftnet": {
        "upsample_kernel_sizes": [20, 12],
        "upsample_rates": [10, 6],
        "gen_istft_hop_size": 5,
        "gen_istft_n_fft": 20,
        "resblock_dilation_sizes": [[1, 3, 5]],
        "resblock_kernel_sizes": [3],
        "upsample_initial_channel": 512,
    },
    # As small as they can be.
    "dim_in": 64,
    "dropout": 0.2,
    "max_dur": 50,
    "n_layer": 1,
    "text_encoder_kernel_size": 5,
    "plbert": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "num_hidden_layers": 1,
        "dropout": 0.1,
    },
    "vocab": {phoneme: index + 1 for index, phoneme in enumerate(_PHONEMES)},
}


def write_kokoro(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model of that configuration into an empty folder. Takes about a second.

    The module is constructed behind the gate; torch's random state is afterwards what it was.
    The same versions of kokoro and torch always write the same bytes.

    Raises:
        OSError: the folder cannot be written.

    """
    (folder / "voices").mkdir()
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(82)
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = KModel(repo_id="hexgrad/Kokoro-82M", config=dict(config), model=nothing)
        _make_it_speak(module)
        windows = _Windows()
        # Every key of the real file begins with `module.` too.
        parts = {
            part: {
                f"module.{name}": windows.like(tensor)
                for name, tensor in child.state_dict().items()
                if not name.endswith(_UNTRAINED)
            }
            for part, child in module.named_children()
        }
        voices = {name: _voice() for name in VOICES}
    torch.save(parts, folder / "kokoro-v1_0.pth")
    for name, pack in voices.items():
        torch.save(pack, folder / "voices" / f"{name}.pt")


def _make_it_speak(module: Any) -> None:
    """Give a phoneme a few frames (25 ms each), and make samples loud but in range."""
    duration = module.predictor.duration_proj.linear_layer
    duration.weight.mul_(8.0)
    duration.bias.fill_(-4.6)
    last = module.decoder.generator.conv_post
    last.weight_g.mul_(0.02)
    last.bias[: last.bias.numel() // 2].fill_(2.5)  # log magnitudes; the others are phases


class _Windows:
    """Tensors that overlap in memory: one shared row of random numbers for each scale."""

    def __init__(self) -> None:
        self._rows: dict[int, torch.Tensor] = {}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and about the same spread; a small one is copied."""
        if tensor.numel() <= _LARGE:
            return tensor.clone()
        scale = round(math.log2(float(tensor.std())))
        # Neighbours along every dimension differ, and so do rows: constants would carry nothing.
        strides = [(1, 13, 7)[dimension] for dimension in range(tensor.dim())]
        needed = 1 + sum(
            (size - 1) * step for size, step in zip(tensor.shape, strides, strict=True)
        )
        if scale not in self._rows or self._rows[scale].numel() < needed:
            self._rows[scale] = torch.randn(max(2**14, needed)) * 2.0**scale
        return self._rows[scale].as_strided(tensor.shape, strides)


def _voice() -> torch.Tensor:
    """A style for every number of phonemes: (510, 1, 256), each a shifted window on one row."""
    row = 0.1 * torch.randn(_MAX_PHONEMES + _STYLE_WIDTH)
    return row.as_strided((_MAX_PHONEMES, 1, _STYLE_WIDTH), (1, 1, 1))


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {"tiny-kokoro": partial(write_kokoro, config=CONFIG)}
)
"""The function that writes each model into an empty folder, by the model's name."""
