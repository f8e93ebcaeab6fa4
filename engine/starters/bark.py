"""The starter model of Bark: a folder like suno/bark-small, with two voices.

The parts are instances of the transformers classes with small sizes and vocabularies. Their
constructors draw the parameters from a seeded generator, so the same versions of transformers
and torch always write the same bytes. Importing this module imports both.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BarkConfig, BarkModel, EncodecConfig
from transformers.models.bark.configuration_bark import (
    BarkCoarseConfig,
    BarkFineConfig,
    BarkSemanticConfig,
)
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkFineGenerationConfig,
    BarkGenerationConfig,
    BarkSemanticGenerationConfig,
)

from engine.process.gate import GATE
from engine.starters.json_text import write_json

VOICES = ("v2/en_speaker_0", "v2/de_speaker_0")

_CODEBOOK = 1024
_SEMANTIC = 200
"""The number of semantic tokens; the one after them is the end. Real Bark has 10,000."""
_TEXT_OFFSET = 256
_TEXT_PAD, _SEMANTIC_INFER, _TEXT_VOCABULARY = 500, 501, 512
_COARSE_PAD = _SEMANTIC + 2 * _CODEBOOK


def _write_bark(folder: Path) -> None:
    """Write the starter model into an empty folder. Takes a second.

    Modules are constructed behind the gate; torch's random state is afterwards what it was.

    Raises:
        OSError: the folder cannot be written.

    """
    config = _config()
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(9)
        model = BarkModel(config).eval()
        for part in (model.semantic, model.coarse_acoustics):
            # As initialised, every token is as likely as any other, and the text decides
            # nothing. Sharper logits let it decide.
            part.lm_head.weight.mul_(20.0)
        for layer in model.codec_model.quantizer.layers:
            layer.codebook.embed.normal_(std=5.0)  # zero until it is trained
        tied = set(model.all_tied_weights_keys)
        tensors = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name not in tied
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**config.to_dict(), "architectures": ["BarkModel"]})
    write_json(folder / "generation_config.json", _generation().to_dict())
    _write_tokenizer(folder)
    _write_voices(folder)


def _config() -> BarkConfig:
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_size": 32, "block_size": 1024}
    return BarkConfig(
        semantic_config=BarkSemanticConfig(
            input_vocab_size=_TEXT_VOCABULARY, output_vocab_size=_SEMANTIC + 8, **sizes
        ).to_dict(),
        coarse_acoustics_config=BarkCoarseConfig(
            input_vocab_size=_COARSE_PAD + 8, output_vocab_size=_COARSE_PAD + 8, **sizes
        ).to_dict(),
        fine_acoustics_config=BarkFineConfig(
            input_vocab_size=_CODEBOOK + 32, output_vocab_size=_CODEBOOK + 32, **sizes
        ).to_dict(),
        codec_config=EncodecConfig(
            target_bandwidths=[6.0],  # kbit/s at 75 frames of 10 bits: eight codebooks
            num_filters=4,
            hidden_size=32,
            codebook_dim=32,
            codebook_size=_CODEBOOK,
            num_lstm_layers=1,
        ).to_dict(),
    )


def _generation() -> BarkGenerationConfig:
    return BarkGenerationConfig.from_sub_model_configs(
        BarkSemanticGenerationConfig(
            eos_token_id=_SEMANTIC,
            max_new_tokens=60,  # 1.2 s
            temperature=0.7,
            do_sample=True,
            text_encoding_offset=_TEXT_OFFSET,
            text_pad_token=_TEXT_PAD,
            semantic_infer_token=_SEMANTIC_INFER,
            semantic_vocab_size=_SEMANTIC,
            min_eos_p=0.2,
        ),
        BarkCoarseGenerationConfig(
            temperature=0.7,
            do_sample=True,
            coarse_semantic_pad_token=_COARSE_PAD,
            coarse_infer_token=_COARSE_PAD + 2,
        ),
        BarkFineGenerationConfig(temperature=0.5),
    )


def _write_tokenizer(folder: Path) -> None:
    """Words as pieces of one character, as BERT's tokenizer spells unknown words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    tokens = [*specials, *letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(
        WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(specials)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "model_max_length": 512},
    )


def _write_voices(folder: Path) -> None:
    """For each of the three models, tokens that the speaker has supposedly said before."""
    random = np.random.Generator(np.random.PCG64(9))
    paths: dict[str, object] = {"repo_or_path": "roundhouse/tiny-bark"}
    for voice in VOICES:
        prompts = {
            "semantic_prompt": random.integers(0, _SEMANTIC, 50),
            "coarse_prompt": random.integers(0, _CODEBOOK, (2, 75)),
            "fine_prompt": random.integers(0, _CODEBOOK, (8, 75)),
        }
        paths[voice] = {name: f"speaker_embeddings/{voice}_{name}.npy" for name in prompts}
        for name, prompt in prompts.items():
            path = folder / "speaker_embeddings" / f"{voice}_{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, prompt, allow_pickle=False)
    write_json(folder / "speaker_embeddings_path.json", paths)


WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType({"tiny-bark": _write_bark})
"""The function that writes each model into an empty folder, by the model's name."""
