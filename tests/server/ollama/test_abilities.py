"""What the files and options of a model say that it can do, and what follows for a request."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.requests import SchedulingOptions, TextOperation, TextRequest
from server.forms import Fields
from server.ollama.abilities import Abilities
from server.ollama.folder_facts import FactsReader, FolderFacts
from server.ollama.translation import Sender, chat_request, generate_request
from server.schemas.ollama import OllamaChatBody, OllamaGenerateBody

SENDER = Sender("id", SchedulingOptions())
PNG = "iVBORw0KGgo="
CONFIG = {"model_type": "llama", "max_position_embeddings": 64, "hidden_size": 8}


def write_folder(folder: Path, template: str | None = "{{ messages }}", **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tensors = {
        "a": {"dtype": "BF16", "shape": [100, 30], "data_offsets": [0, 6000]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [6000, 6020]},
    }
    header = json.dumps(tensors).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(6020)
    (folder / "model.safetensors").write_bytes(content)


def known(folder: Path, **options: Any) -> tuple[FolderFacts | None, Abilities]:
    model = ModelConfig(id="m", source=str(folder), options=options)
    facts = FactsReader(folder / "cache").facts(model)
    return facts, Abilities.of(model, facts)


def chat(abilities: Abilities, **body: Any) -> TextRequest:
    messages = [{"role": "user", "content": "Hello"}]
    fields = Fields({"model": "m", "messages": messages, **body}, typed=True)
    return chat_request(OllamaChatBody.of(fields), abilities, SENDER).request


def generate(abilities: Abilities, **body: Any) -> TextRequest:
    fields = Fields({"model": "m", "prompt": "Hello", **body}, typed=True)
    return generate_request(OllamaGenerateBody.of(fields), abilities, SENDER).request


def test_facts_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder)
    facts, _ = known(folder)
    assert facts is not None
    assert (facts.family, facts.parameters, facts.quantization) == ("llama", 3005, "BF16")
    assert (facts.context, facts.embedding_length, facts.sees) == (64, 8, False)
    write_folder(folder, quantization_config={"quant_method": "awq"}, vision_config={})
    facts, _ = known(folder)
    assert facts is not None
    assert (facts.parameters, facts.quantization, facts.sees) == (None, "AWQ", True)


def test_nothing_is_known_of_files_that_are_not_here_or_damaged(tmp_path: Path) -> None:
    facts, abilities = known(tmp_path / "nowhere")
    assert facts is None
    assert (abilities.vision, abilities.template) == (None, None)
    (tmp_path / "config.json").write_text("{")
    assert known(tmp_path)[0] is None


def test_tools_and_thoughts_need_parsers(tmp_path: Path) -> None:
    _, bare = known(tmp_path)
    _, able = known(tmp_path, tool_call_parser="hermes", reasoning_parser="qwen3")
    assert (bare.tools, bare.thinking) == (False, False)
    assert (able.tools, able.thinking) == (True, True)
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(InvalidRequest, match='"m" does not support tools'):
        chat(bare, tools=tools)
    with pytest.raises(InvalidRequest, match='"m" does not support thinking'):
        chat(bare, think=True)
    assert "reasoning_effort" not in chat(bare, think=False).body
    assert chat(able, tools=tools, think=False).body["reasoning_effort"] == "none"


def test_a_model_that_cannot_see_gets_no_images(tmp_path: Path) -> None:
    write_folder(tmp_path)
    _, blind = known(tmp_path)
    with pytest.raises(InvalidRequest, match="does not support images") as caught:
        chat(blind, messages=[{"role": "user", "content": "", "images": [PNG]}])
    assert caught.value.param == "messages[0].images"
    with pytest.raises(InvalidRequest, match="does not support images"):
        generate(blind, images=[PNG])
    write_folder(tmp_path, vision_config={})
    _, seeing = known(tmp_path)
    (message,) = generate(seeing, images=[PNG]).body["messages"]
    assert message["content"][0]["type"] == "image_url"


def test_a_model_without_a_template_completes(tmp_path: Path) -> None:
    write_folder(tmp_path, template=None)
    _, base = known(tmp_path)
    request = generate(base, system="Be")
    assert request.operation is TextOperation.COMPLETION
    assert request.body["prompt"] == "Be\n\nHello"
    _, with_own = known(tmp_path, chat_template="other.jinja")
    assert generate(with_own).operation is TextOperation.CHAT


def test_the_context_bounds_the_answer(tmp_path: Path) -> None:
    write_folder(tmp_path)
    _, abilities = known(tmp_path)
    assert chat(abilities, options={"num_predict": 63}).body["max_completion_tokens"] == 63
    assert "max_completion_tokens" not in chat(abilities, options={"num_predict": 64}).body
    _, longer = known(tmp_path, max_model_len=128)
    assert chat(longer, options={"num_predict": 64}).body["max_completion_tokens"] == 64


def test_the_models_last_message_is_continued(tmp_path: Path) -> None:
    _, abilities = known(tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert chat(abilities, messages=messages).body["continue_final_message"] is True
    assert "continue_final_message" not in chat(abilities).body
    assert "continue_final_message" not in chat(Abilities(), messages=messages).body
