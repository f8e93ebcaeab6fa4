"""Small random models of architectures that the configurations name, through the real runtime.

The yardstick is transformers, which generates from the same folder. A model that may think does so
as its options and the request say.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from engine.config import ModelConfig
from engine.events import Document
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.checkpoint import Checkpoint
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.conftest import StarterDir
from tests.engine.runtimes.vllm.greedy import PROMPTS, answer

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HALF = "\N{REPLACEMENT CHARACTER}"
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"head_dim": 32, "tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": {"head_dim": 32, "tie_word_embeddings": False, **EXPERTS},
    "SmolLM3ForCausalLM": {"tie_word_embeddings": True},
}


def own_class(architecture: str) -> Any:
    """transformers' class, read anew.

    vLLM decorates the classes that it runs through transformers, and then nobody else can use them.
    """
    import transformers

    spec = find_spec(getattr(transformers, architecture).__module__)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, architecture)


def write_model(architecture: str, tokenizer: Path, folder: Path) -> Any:
    """Write a random model with that tokenizer; returns transformers' own instance."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    made = own_class(architecture)
    for path in tokenizer.glob("*token*"):
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    config = made.config_class(
        **SHAPE,
        **KINDS[architecture],
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(3)
        model = made(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as initialised, every token would be as likely as any other
                torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    if architecture == "Qwen3ForCausalLM":
        # As in Qwen3-0.6B's own file, which holds its embedding twice.
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    return model


def greedy(model: Any, folder: Path, prompt: str, max_tokens: int) -> str:
    """What transformers writes after the prompt."""
    import torch
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    tokens = words(prompt, return_tensors="pt").input_ids
    for _ in range(max_tokens):
        with torch.no_grad():
            scores = model(tokens).logits[:, -1]
        tokens = torch.cat([tokens, scores.argmax(dim=-1, keepdim=True)], dim=1)
    start = words(prompt, return_tensors="pt").input_ids.shape[1]
    return str(words.decode(tokens[0, start:], skip_special_tokens=True))


@pytest.mark.parametrize("architecture", KINDS)
async def test_it_answers_as_transformers_does_also_after_a_park(
    architecture: str, vllm_runtime: VllmRuntime, starter_dir: StarterDir, tmp_path: Path
) -> None:
    folder = tmp_path / architecture
    model = write_model(architecture, starter_dir("tiny-qwen"), folder)
    expected = [greedy(model, folder, prompt, 12) for prompt in PROMPTS]
    options = {"dtype": "float32", "max_model_len": 256, "kv_cache": "16MiB", "max_num_seqs": 4}
    entry = ModelConfig(id=architecture, source=str(folder), options=options)
    checkpoint = Checkpoint(folder)
    loaded = await vllm_runtime.load(entry, lambda reason: pytest.fail(reason))
    try:
        # The second copy of an embedding is gone. A CPU keeps a form of its own of the first one.
        own = sum(each.numel() * each.element_size() for each in model.parameters())
        weights = next(block.nbytes for block in loaded.blocks() if block.name == "weights")
        beside = checkpoint.rotary_bytes("float32") + checkpoint.embedding_bytes("float32")
        assert weights <= 1.01 * (own + beside)
        for _ in range(2):
            told = [await answer(vllm_runtime, entry, loaded, each, 12) for each in PROMPTS]
            # A stream keeps back the bytes of a character that is not complete.
            assert told == [text.rstrip(HALF) for text in expected]
            names = [block.name for block in loaded.blocks() if block.parkable]
            await vllm_runtime.park(loaded, names)
            await vllm_runtime.wake(loaded, names)
    finally:
        await vllm_runtime.unload(loaded)


TEMPLATE = """\
{% for message in messages %}{{ message.content }}{% endfor %}\
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}\
"""


async def chat(runtime: VllmRuntime, model: ModelConfig, loaded: Any, **more: Any) -> Any:
    """The message of an answer of a few tokens."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    request = TextRequest(model.id, TextOperation.CHAT, {**body, **more}, request_id="test")
    (event,) = [event async for event in loaded.run(runtime.prepare(model, request))]
    assert isinstance(event, Document)
    return json.loads(event.body)["choices"][0]["message"]


async def message(runtime: VllmRuntime, model: ModelConfig, loaded: Any, **more: Any) -> set[str]:
    """The kinds of content in a message of Anthropic's form."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    request = TextRequest(model.id, TextOperation.MESSAGES, {**body, **more}, request_id="test")
    (event,) = [event async for event in loaded.run(runtime.prepare(model, request))]
    assert isinstance(event, Document)
    return {block["type"] for block in json.loads(event.body)["content"]}


async def test_a_model_thinks_as_its_options_say_unless_the_request_says_otherwise(
    vllm_runtime: VllmRuntime, starter_dir: StarterDir, tmp_path: Path
) -> None:
    folder, tokenizer = tmp_path / "thinks", tmp_path / "tokenizer"
    shutil.copytree(starter_dir("tiny-qwen"), tokenizer)
    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    words.add_tokens([AddedToken(each, normalized=False) for each in ("<think>", "</think>")])
    words.save(str(tokenizer / "tokenizer.json"))
    write_model("Qwen3ForCausalLM", tokenizer, folder)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    options = {
        "dtype": "float32",
        "max_model_len": 256,
        "kv_cache": "16MiB",
        "reasoning_parser": "qwen3",
        "chat_template": str(template),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    model = ModelConfig(id="thinks", source=str(folder), options=options)
    loaded = await vllm_runtime.load(model, lambda reason: pytest.fail(reason))
    try:
        quiet = await chat(vllm_runtime, model, loaded)
        assert quiet["content"] and not quiet.get("reasoning")
        for asked in (
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "low"},
        ):
            thoughtful = await chat(vllm_runtime, model, loaded, **asked)
            assert thoughtful["reasoning"] and not thoughtful["content"]
        quiet = await chat(vllm_runtime, model, loaded, reasoning_effort="none")
        assert quiet["content"] and not quiet.get("reasoning")
        kinds = await message(vllm_runtime, model, loaded)
        assert kinds == {"text"}
        kinds = await message(vllm_runtime, model, loaded, thinking={"type": "adaptive"})
        assert kinds == {"thinking"}
    finally:
        await vllm_runtime.unload(loaded)
