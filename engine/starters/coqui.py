"""Starter models of Coqui TTS: VITS with one and with several speakers, and XTTS v2.

Each folder has the files of a released model, which Coqui's own classes load. The constructors
draw the parameters from a seeded generator, so the same versions of coqui-tts and torch always
write the same bytes. Importing this module imports both (some 5 s).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from TTS.tts.configs.shared_configs import CharactersConfig
from TTS.tts.configs.vits_config import VitsConfig
from TTS.tts.configs.xtts_config import XttsArgs, XttsAudioConfig, XttsConfig
from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
from TTS.tts.models.vits import Vits, VitsArgs
from TTS.tts.models.xtts import Xtts

from engine.process.gate import GATE
from engine.starters.json_text import write_json

VITS_SPEAKERS = ("p225", "p226", "p227")
"""The speakers of tiny-vits-multi, with names of VCTK."""

XTTS_SPEAKERS = ("Claribel Dervla", "Damien Black")
"""The speakers of tiny-xtts, two of XTTS v2's own."""

_MAX_STORED = 40_000
"""The most numbers of one tensor that the file holds; the rest repeats them. XTTS's vocoder and
speaker encoder have no settings for their sizes: they always have 22 million parameters."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ACCENTED = "àâäçéèêëîïñôöùûüß"


def _write(write: Callable[[Path], None], folder: Path) -> None:
    """Write a starter model into an empty folder by `write`, from one seed. Takes a second.

    Modules are constructed behind the gate; torch's random state is afterwards what it was.

    Raises:
        OSError: the folder cannot be written.

    """
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(7)
        write(folder)


def _write_vits(folder: Path, *, name: str, speakers: tuple[str, ...]) -> None:
    config = VitsConfig(
        run_name=name,
        test_sentences=[],
        output_path="",
        languages=["en"],
        use_phonemes=False,
        text_cleaner="english_cleaners",
        add_blank=True,
        characters=CharactersConfig(
            characters_class="TTS.tts.models.vits.VitsCharacters",
            pad="_",
            eos="&",
            bos="*",
            blank=None,
            characters=_LETTERS,
            punctuations="!'(),-.:;? ",
            phonemes=None,
        ),
        model_args=VitsArgs(
            hidden_channels=16,
            hidden_channels_ffn_text_encoder=32,
            num_heads_text_encoder=2,
            num_layers_text_encoder=1,
            num_layers_posterior_encoder=1,
            num_layers_flow=1,
            resblock_kernel_sizes_decoder=[3],
            resblock_dilation_sizes_decoder=[[1, 3, 5]],
            upsample_initial_channel_decoder=32,
            init_discriminator=False,
        ),
    )
    if speakers:
        ids = {speaker: index for index, speaker in enumerate(speakers)}
        path = folder / "speakers.json"
        write_json(path, ids)
        for section in (config, config.model_args):
            section.use_speaker_embedding = True
            section.num_speakers = len(speakers)
            section.speakers_file = str(path)
    model = Vits(config)
    for section in (config, config.model_args):
        if speakers:
            section.speakers_file = "speakers.json"
    # An untrained flow does nothing, as its last layers are zero.
    for name, parameter in model.named_parameters():
        if name.startswith("flow.") and ".proj." in name:
            parameter.normal_(std=0.1)
    # Every character and the blank after it take some 3 frames of 12 ms.
    model.duration_predictor.flows[0].translation[0] = -0.8
    model.eval()
    latents = torch.randn(1, config.model_args.hidden_channels, 40)
    speaker = model.emb_g.weight[:1, :, None] if speakers else None
    audio = model.waveform_decoder(latents, g=speaker)
    # Loud enough to hear. A power of two: the same bytes, however the device rounds.
    model.waveform_decoder.conv_post.weight.mul_(2.0 ** round(math.log2(0.1 / float(audio.std()))))
    _write_checkpoint(folder / "model_file.pth", model, config)
    write_json(folder / "config.json", config.to_dict())


def write_xtts(folder: Path, arguments: XttsArgs) -> None:
    """Write XTTS of these sizes into an empty folder, with two speakers.

    Raises:
        OSError: the folder cannot be written.

    """
    _write(partial(_write_xtts, arguments=arguments), folder)


def _write_xtts(folder: Path, *, arguments: XttsArgs) -> None:
    arguments.tokenizer_file = "vocab.json"
    config = XttsConfig()
    config.model_args = arguments
    config.audio = XttsAudioConfig(output_sample_rate=24000)
    _xtts_tokenizer(config.languages).save(str(folder / "vocab.json"))
    model = Xtts(config)
    model.tokenizer = VoiceBpeTokenizer(str(folder / "vocab.json"))
    model.init_models()
    # Mostly the end comes after all 30 tokens, each 46 ms, and sometimes before.
    model.gpt.mel_head.bias[config.model_args.gpt_stop_audio_token] = 0.0
    _write_checkpoint(folder / "model.pth", model, config)
    write_json(folder / "config.json", config.to_dict())
    width = arguments.gpt_n_model_channels
    torch.save({name: _speaker(width) for name in XTTS_SPEAKERS}, folder / "speakers_xtts.pth")


def _tiny_xtts() -> XttsArgs:
    return XttsArgs(
        gpt_layers=2,
        gpt_n_model_channels=64,
        gpt_n_heads=4,
        gpt_max_audio_tokens=30,
        gpt_num_audio_tokens=258,
        gpt_start_audio_token=256,
        gpt_stop_audio_token=257,
        gpt_use_perceiver_resampler=True,
        decoder_input_dim=64,
    )


def _xtts_tokenizer(languages: list[str]) -> Tokenizer:
    """Single characters after the language's tag, as XTTS's own spells words without merges."""
    tags = [f"[{language}]" for language in languages]
    specials = ["[STOP]", "[UNK]", "[SPACE]", *tags, "[START]"]
    characters = [chr(code) for code in range(33, 127)] + list(_ACCENTED)
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _speaker(width: int) -> dict[str, torch.Tensor]:
    return {
        "gpt_cond_latent": torch.randn(1, 32, width) * 0.1,
        "speaker_embedding": torch.nn.functional.normalize(torch.randn(1, 512, 1), dim=1),
    }


def _write_checkpoint(path: Path, model: Any, config: Any) -> None:
    tensors = {name: _repeating(tensor) for name, tensor in model.state_dict().items()}
    torch.save({"model": tensors, "config": config.to_dict(), "step": 1, "epoch": 1}, path)


def _repeating(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a large one as a stored part that is repeated to the whole shape."""
    kept = tensor.detach()
    if kept.is_floating_point():
        for dim in range(kept.dim()):
            if kept.numel() > _MAX_STORED:
                kept = kept.narrow(dim, 0, 1)
    return kept.clone().expand_as(tensor)


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        "tiny-vits": partial(_write, partial(_write_vits, name="tiny-vits", speakers=())),
        "tiny-vits-multi": partial(
            _write, partial(_write_vits, name="tiny-vits-multi", speakers=VITS_SPEAKERS)
        ),
        "tiny-xtts": lambda folder: write_xtts(folder, _tiny_xtts()),
    }
)
"""The function that writes each model into an empty folder, by the model's name."""
