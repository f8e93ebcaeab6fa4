"""Conversion of GGUF files of tiny models with random weights, against those models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.conversion import gguf
from engine.conversion.config import model_config
from engine.conversion.gguf import add_gguf, check_answers, convert_gguf
from engine.conversion.header import read_header
from engine.conversion.tokenizer import build_tokenizer
from engine.errors import LoadFailed
from tests.engine.conversion.gguf_files import SHAPE, TEMPLATE, vocabulary, write_gguf

pytestmark = pytest.mark.slow

TEXT = "I'm IT'S  2026x\n\n  你好，世界 ABCdefG!?\r\n\t'll3/\n"
CHAT = {"tokenizer.chat_template": TEMPLATE}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": "gpt2",
        "pre": "smollm",
        **vocabulary(tmp_path_factory.mktemp("cache")),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def tiny_model(kind: str, size: int, **changes: Any) -> Any:
    """A model of Hugging Face whose shape is `SHAPE`, with weights that bfloat16 holds."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        kind,
        vocab_size=size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        **{"tie_word_embeddings": False, "pad_token_id": 0} | changes,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weights in model.parameters():
        weights.data = torch.randn_like(weights).mul(0.2).bfloat16().float()
    model.tie_weights()
    return model


def as_gguf(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The weights by their names in a GGUF file, as llama.cpp's converter changes them."""
    kind = model.config.model_type.removesuffix("_text")
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == kind)
    names = get_tensor_name_map(MODEL_ARCH(number), 2)
    found = {}
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        data = weights.float().numpy()
        place = names.get_name(name, (".weight", ".bias"))
        assert place is not None, name
        if kind == "llama" and (".attn_q." in place or ".attn_k." in place):
            heads = 4 if ".attn_q." in place else 2
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if kind.startswith("gemma") and "norm" in place:
            data = data + 1
        found[place] = data.copy()
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(2, 42)[None]).logits.float()


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("llama", {}, {}),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
         {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
        ("llama", {}, {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"attention.key_length": 32, "attention.value_length": 32,
                   "rope.dimension_count": 32}, {"head_dim": 32}),
        ("qwen2", {}, {}),
        ("qwen3", {"attention.key_length": 16}, {"head_dim": 16}),
        ("phi3", {"rope.dimension_count": 8, "attention.sliding_window": 16},
         {"sliding_window": 16, "rope_parameters": {
             "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}),
        ("gemma2", {"attention.key_length": 16, "attention.value_length": 16,
                    "attention.sliding_window": 16, "final_logit_softcapping": 20.0,
                    "attn_logit_softcapping": 10.0},
         {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16,
          "final_logit_softcapping": 20.0, "attn_logit_softcapping": 10.0,
          "tie_word_embeddings": True}),
        ("gemma3", {"attention.key_length": 16, "attention.value_length": 16,
                    "attention.sliding_window": 16, "rope.freq_base": 1e6,
                    "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
         {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16,
          "tie_word_embeddings": True, "rope_parameters": {
              "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    ],
    ids=["llama", "linear", "bias", "head_dim", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"],
)  # fmt: skip
def test_the_converted_model_computes_what_the_original_does(
    tmp_path: Path,
    tokens: dict[str, Any],
    kind: str,
    shape: dict[str, Any],
    options: dict[str, Any],
) -> None:
    name = "gemma3_text" if kind == "gemma3" else kind
    original = tiny_model(name, len(tokens["tokens"]), **options)
    weights = as_gguf(original)
    file = write_gguf(tmp_path / "m.gguf", kind, weights, SHAPE | shape, tokens, **CHAT)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(file, folder)
    found, notes = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes.values())
    torch.testing.assert_close(logits(found), logits(original), atol=1e-4, rtol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert config["architectures"] == [type(original).__name__]


def test_llama_3_stretches_its_positions(tmp_path: Path, tokens: dict[str, Any]) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = tiny_model("llama", len(tokens["tokens"]), head_dim=64, rope_parameters=rope)
    unscaled = 500_000.0 ** (-torch.arange(0, 64, 2) / 64)
    factors = (unscaled / original.model.rotary_emb.inv_freq).numpy()
    weights = {**as_gguf(original), "rope_freqs.weight": factors}
    shape = SHAPE | {"rope.freq_base": 500_000.0, "attention.key_length": 64}
    file = write_gguf(tmp_path / "m.gguf", "llama", weights, shape, tokens)
    found = model_config(read_header(file))
    assert found.rope_parameters == rope
    assert found.head_dim == 64
    weights["rope_freqs.weight"] = factors * np.linspace(1, 2, 32, dtype=np.float32)
    write_gguf(file, "llama", weights, shape, tokens)
    with pytest.raises(LoadFailed, match="another way than Llama 3"):
        model_config(read_header(file))


def test_long_rope_of_phi_3(tmp_path: Path, tokens: dict[str, Any]) -> None:
    factors = {
        f"rope_factors_{name}.weight": np.linspace(1, last, 8, dtype=np.float32)
        for name, last in (("long", 8), ("short", 2))
    }
    weights = {**as_gguf(tiny_model("phi3", len(tokens["tokens"]))), **factors}
    scaling = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.19}
    file = write_gguf(tmp_path / "m.gguf", "phi3", weights, SHAPE | scaling, tokens)
    rope = model_config(read_header(file)).rope_parameters
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == pytest.approx(list(range(1, 9)))
    assert rope["short_factor"][-1] == 2.0
    assert rope["original_max_position_embeddings"] == 64
    assert rope["attention_factor"] == pytest.approx(1.19)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, Any]) -> Path:
    """A Llama in 4 bits."""
    weights = as_gguf(tiny_model("llama", len(tokens["tokens"])))
    return write_gguf(
        tmp_path_factory.mktemp("files") / "Tiny Llama.Q4_0.gguf",
        "llama",
        weights,
        SHAPE,
        tokens | {"add_bos_token": True},
        quantised=GGMLQuantizationType.Q4_0,
        **CHAT,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def added(quantised: Path, cache: Path) -> Path:
    steps: list[str] = []
    folder = add_gguf(quantised, cache, steps.append)
    assert [step.split()[0] for step in steps] == ["reading", "converting", "comparing"]
    return folder


def test_quantised_weights_are_those_of_the_file(added: Path, tokens: dict[str, Any]) -> None:
    weights = as_gguf(tiny_model("llama", len(tokens["tokens"])))["blk.1.ffn_up.weight"]
    packed = quants.quantize(weights, GGMLQuantizationType.Q4_0)
    wanted = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q4_0)).bfloat16()
    found = load_file(added / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, wanted)


def test_it_is_in_the_cache_and_converted_once(
    added: Path, quantised: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert added.is_relative_to(cache / "gguf")
    assert added.name == "Tiny-Llama.Q4_0"
    assert {path.stat().st_mode for path in added.iterdir()} == {
        (added / "config.json").stat().st_mode
    }
    monkeypatch.setattr(gguf, "convert_gguf", None)
    assert add_gguf(quantised, cache, lambda _: None) == added


def test_the_written_tokenizer(added: Path, quantised: Path, tokens: dict[str, Any]) -> None:
    read = AutoTokenizer.from_pretrained(added)
    backend = read.backend_tokenizer
    wanted = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    pieces = backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert pieces == wanted.pre_tokenize_str(TEXT)
    names = tokens["tokens"]
    special = next(
        name for name, kind in zip(names, tokens["token_type"], strict=True) if kind == 3
    )
    assert (read.bos_token, read.eos_token, read.pad_token) == (names[0], names[1], None)
    assert read.model_max_length == 256
    assert read(special + TEXT)["input_ids"][:2] == [0, names.index(special)]
    assert read.decode(read(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert read.chat_template == TEMPLATE
    built = build_tokenizer(read_header(quantised))
    assert json.loads(backend.to_str()) == json.loads(built.backend_tokenizer.to_str())
    generation = json.loads((added / "generation_config.json").read_text())
    assert generation["bos_token_id"] == 0
    assert 1 in np.atleast_1d(generation["eos_token_id"])


def test_whole_words_are_not_merged(tmp_path: Path, tokens: dict[str, Any]) -> None:
    def ids(pre: str) -> list[int]:
        made = {**tokens, "pre": pre, "tokens": [*tokens["tokens"], "zqzq"]}
        made["token_type"] = [*tokens["token_type"], 1]
        file = write_gguf(tmp_path / "m.gguf", "llama", {}, SHAPE, made)
        tokenizer = build_tokenizer(read_header(file))
        found: list[int] = tokenizer("zqzq", add_special_tokens=False)["input_ids"]
        return found

    assert ids("llama-bpe") == [len(tokens["tokens"])]
    assert len(ids("smollm")) > 1


@pytest.mark.parametrize(("prefix", "wanted"), [(True, "▁a▁b"), (False, "a▁b")])
def test_sentence_pieces(tmp_path: Path, prefix: bool, wanted: str) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "▁a", "▁b", "▁a▁b", "a▁b"]
    tokenizer = {
        "model": "llama",
        "tokens": pieces + words,
        "scores": [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -3.0, -2.0, -5.0, -6.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": prefix,
    }
    file = write_gguf(tmp_path / "m.gguf", "llama", {}, SHAPE, tokenizer)
    built = build_tokenizer(read_header(file))
    ids = built("a b")["input_ids"]
    assert built.convert_ids_to_tokens(ids) == ["<s>", wanted]
    assert built.decode(ids, skip_special_tokens=True) == "a b"
    # A space also follows each special token, as in llama.cpp.
    again = built.convert_ids_to_tokens(built("a b</s>a")["input_ids"])
    assert again[-1] == ("▁a" if prefix else "a")
    assert "<0xE4>" in built.convert_ids_to_tokens(built("你")["input_ids"])


def test_answers_that_differ_are_told(added: Path, quantised: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(added, other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = -weights["lm_head.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match="after 'The capital of France is' the converted model"):
        check_answers(quantised, other)


def test_a_conversion_that_answers_differently_is_removed(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise LoadFailed("differs")

    monkeypatch.setattr(gguf, "check_answers", refuse)
    with pytest.raises(LoadFailed, match="differs"):
        add_gguf(quantised, tmp_path, lambda _: None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"v.patch_embd.weight": np.zeros((4, 32), np.float32)}, "no place for, such as v.patch"),
        ({"output_norm.weight": None}, "lacks 1 tensors"),
        ({"output_norm.weight": np.zeros(32, np.float32)}, "is damaged: output_norm.weight has 32"),
    ],
)
def test_weights_that_are_not_those_of_the_model(
    tmp_path: Path, tokens: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    weights = as_gguf(tiny_model("llama", len(tokens["tokens"]))) | change
    kept = {name: data for name, data in weights.items() if data is not None}
    file = write_gguf(tmp_path / "m.gguf", "llama", kept, SHAPE, tokens)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(LoadFailed, match=told):
        convert_gguf(file, folder)
    assert not list(folder.iterdir())


def test_a_full_disk_is_told_before_the_first_byte(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "free_disk_bytes", lambda path: 1_000)
    with pytest.raises(LoadFailed, match=r"needs 6\d\.\d MiB on the disk .* 1000 B are free"):
        convert_gguf(quantised, tmp_path)
