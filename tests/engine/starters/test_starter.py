"""Starter models: real folders, the same bytes every time, never half-made."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from engine.errors import ConfigError, LoadFailed
from engine.starters import registry
from engine.starters.language import VOCABULARY_SIZE
from engine.starters.registry import FORMAT, LANGUAGE_STARTERS, Starter, ensure_starter
from tests.conftest import StarterDir

SEEING = "tiny-idefics3"
DECODERS = ("tiny-llama", "tiny-qwen", SEEING)
CLASSIFIERS = ("tiny-rerank", "tiny-classify")
BYTE_LEVEL = (*DECODERS, "tiny-embed", *CLASSIFIERS)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOL_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
            }
        ],
    },
    {"role": "tool", "content": "sunny"},
]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def with_write(write: Callable[[Path], None]) -> Starter:
    """tiny-embed, written by another function."""
    return dataclasses.replace(LANGUAGE_STARTERS["tiny-embed"], write=write)


def writing_class(name: str) -> Any:
    """transformers' class for a starter that writes."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if name == SEEING else AutoModelForCausalLM


@pytest.fixture(scope="session")
def tokenizer_of(starter_dir: StarterDir) -> Any:
    """Loads a starter model's tokenizer as any user of transformers would, once."""
    from transformers import AutoTokenizer

    loaded = {name: AutoTokenizer.from_pretrained(starter_dir(name)) for name in LANGUAGE_STARTERS}
    return loaded.__getitem__


def test_another_process_writes_the_same_bytes(starter_dir: StarterDir, tmp_path: Path) -> None:
    build_all = (
        "import sys, pathlib\n"
        "from engine.starters.registry import LANGUAGE_STARTERS, ensure_starter\n"
        "for name in reversed(LANGUAGE_STARTERS): ensure_starter(name, pathlib.Path(sys.argv[1]))"
    )
    built = run_python(build_all, str(tmp_path), PYTHONHASHSEED="7")
    assert built.returncode == 0, built.stderr
    for name in LANGUAGE_STARTERS:
        assert contents(tmp_path / "starter" / FORMAT / name) == contents(starter_dir(name))


@pytest.mark.parametrize("name", LANGUAGE_STARTERS)
def test_the_card_says_that_the_weights_are_random(name: str, starter_dir: StarterDir) -> None:
    card = (starter_dir(name) / "README.md").read_text(encoding="utf-8")
    assert f"# {name}\n\n{LANGUAGE_STARTERS[name].summary}" in card
    assert "The weights are random numbers" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE_STARTERS)
def test_the_weights_are_of_the_declared_type_and_vocabulary(
    name: str, starter_dir: StarterDir, tokenizer_of: Any
) -> None:
    config = json.loads((starter_dir(name) / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    assert text["vocab_size"] == len(tokenizer_of(name))
    assert name not in BYTE_LEVEL or text["vocab_size"] == VOCABULARY_SIZE
    with safe_open(starter_dir(name) / "model.safetensors", framework="np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(name: str, tokenizer_of: Any, text: str) -> None:
    """Qwen's, as the real one does, reads text in its canonical composition (NFC)."""
    tokenizer = tokenizer_of(name)
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if name == "tiny-qwen":
        # Of both sides: its tables and Python's are of different versions of Unicode.
        decoded, text = (unicodedata.normalize("NFC", each) for each in (decoded, text))
    assert decoded == text


@pytest.mark.slow
def test_qwen_composes_what_it_reads(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("tiny-qwen")
    assert tokenizer.decode(tokenizer.encode("e\u0301 \uf900")) == "\u00e9 \u8c48"


@pytest.mark.slow
def test_each_tokenizer_frames_a_text_as_its_kind_does(tokenizer_of: Any) -> None:
    framed = {
        name: tokenizer_of(name).decode(tokenizer_of(name).encode("hello"))
        for name in LANGUAGE_STARTERS
    }
    assert framed == {
        "tiny-llama": "<|begin_of_text|>hello",
        "tiny-qwen": "hello",
        "tiny-idefics3": "hello",
        **dict.fromkeys(("tiny-embed", "tiny-rerank", "tiny-classify"), "[CLS]hello[SEP]"),
        "tiny-camembert": "<s> hello</s>",
    }


@pytest.mark.slow
def test_camembert_reads_thai_whose_spaces_have_a_symbol(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("tiny-camembert")
    text = "รถไฟออกจากสถานี<_>ถึงเชียงใหม่ตอนเย็น"
    tokens = tokenizer(text).input_ids
    assert tokens.count(tokenizer.convert_tokens_to_ids("<_>")) == 1
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer("<mask>").input_ids[1] == tokenizer.mask_token_id == len(tokenizer) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE_STARTERS)
def test_transformers_finds_every_weight_it_wants(name: str, starter_dir: StarterDir) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    kind = writing_class(name) if name in DECODERS else AutoModel
    if name in CLASSIFIERS:
        kind = AutoModelForSequenceClassification
    if name == "tiny-camembert":
        kind = AutoModelForMaskedLM
    _, info = kind.from_pretrained(starter_dir(name), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_is_varied_and_readable(
    name: str, starter_dir: StarterDir, tokenizer_of: Any
) -> None:
    model = writing_class(name).from_pretrained(starter_dir(name))
    tokenizer = tokenizer_of(name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    tokens = answer[0, prompt["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(tokens) > 16
    assert len(set(tokens)) > len(tokens) / 2
    assert text.isascii() and text.isprintable()


@pytest.mark.slow
def test_llama_template_carries_tools_calls_and_results(tokenizer_of: Any) -> None:
    text = tokenizer_of("tiny-llama").apply_chat_template(
        TOOL_CONVERSATION, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    system, _, turns = text.partition("Be brief.<|eot_id|>")
    assert system.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n")
    assert '"name": "get_weather"' in system
    assert turns == (
        "<|start_header_id|>user<|end_header_id|>\n\nWeather?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "get_weather", "parameters": {"city": "Zürich"}}<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.slow
def test_qwen_template_carries_tools_calls_and_results(tokenizer_of: Any) -> None:
    text = tokenizer_of("tiny-qwen").apply_chat_template(
        TOOL_CONVERSATION, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    system, _, turns = text.partition("</tool_call><|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '"name": "get_weather"' in system
    assert turns == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "tiny-llama",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        ),
        (
            "tiny-qwen",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n",
        ),
    ],
)
def test_template_of_a_plain_message(name: str, expected: str, tokenizer_of: Any) -> None:
    message = {"role": "user", "content": "Hi"}
    assert tokenizer_of(name).apply_chat_template([message], tokenize=False) == expected


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"starter:nope: .*tiny-embed, tiny-idefics3, tiny-llama"):
        ensure_starter("nope", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_a_failed_load(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(LoadFailed, match=r"cannot build starter:tiny-embed in .*Not a directory"):
        ensure_starter("tiny-embed", blocked)


def test_a_folder_that_is_there_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Path] = []
    monkeypatch.setattr(registry, "STARTERS", {"tiny-embed": with_write(writes.append)})
    assert ensure_starter("tiny-embed", tmp_path) == ensure_starter("tiny-embed", tmp_path)
    assert len(writes) == 1


def test_two_that_build_at_once_get_one_whole_folder(
    tmp_path: Path, starter_dir: StarterDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_are_building = threading.Barrier(2, timeout=30)

    def write(folder: Path) -> None:
        LANGUAGE_STARTERS["tiny-embed"].write(folder)
        both_are_building.wait()

    monkeypatch.setattr(registry, "STARTERS", {"tiny-embed": with_write(write)})
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: ensure_starter("tiny-embed", tmp_path), range(2))
    assert first == second
    assert contents(first) == contents(starter_dir("tiny-embed"))
    assert list(first.parent.iterdir()) == [first]


def test_a_build_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "STARTERS", {"tiny-embed": with_write(write)})
    with pytest.raises(KeyboardInterrupt):
        ensure_starter("tiny-embed", tmp_path)
    assert not list((tmp_path / "starter" / FORMAT).iterdir())


def test_a_build_that_is_killed_is_done_again(tmp_path: Path, starter_dir: StarterDir) -> None:
    killed_half_way = (
        "import os, sys, pathlib; from engine.starters import registry\n"
        "def write(folder): (folder / 'config.json').touch(); os._exit(9)\n"
        "registry.STARTERS = {'tiny-embed': registry.Starter('', '', write)}\n"
        "registry.ensure_starter('tiny-embed', pathlib.Path(sys.argv[1]))"
    )
    assert run_python(killed_half_way, str(tmp_path)).returncode == 9
    assert contents(ensure_starter("tiny-embed", tmp_path)) == contents(starter_dir("tiny-embed"))
