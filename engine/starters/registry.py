"""Starter models: tiny, real model folders that are built on the spot, with no download.

Their weights are random, so what they say means nothing; everything else about them is
real. They have the folder format of a hub repository, a tokenizer, a chat template with
tools, and run through the same runtime as any other model. A configuration names one as
`starter:NAME`. The same version of this file always writes the same bytes.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from engine.errors import ConfigError, LoadFailed
from engine.starters.json_text import write_json

FORMAT = "v1"
"""Part of the path. Raise it with any change to what is written, so that no old folder is used."""

VOCABULARY_SIZE = 512

Tensors = dict[str, NDArray[np.float32]]

_CORPUS = """
The quick brown fox jumps over the lazy dog while the engine waits in the roundhouse. A
locomotive stands on the turntable, and the driver asks for another track. What is the
weather in Paris today? It will be sunny with a light wind from the west. Please write a short
story about a small robot that learns to paint. Once upon a time there was a king who had three
daughters. Explain how memory is shared between models: every byte is counted before it is used,
and given back when the work is done. Hello, how are you? I am fine, thank you, and how can I help
you with this question? You are a helpful assistant. Answer in one sentence. First, second and
third; one, two, three, four and five. {"name": "get_weather", "arguments": {"location": "Berlin",
"unit": "celsius"}} {"type": "function", "parameters": {"properties": {}, "required": []}}
def main(): return [value for value in items if value is not None] # a comment
There should be something interesting here, because nothing that they would have said could
make people forget where those other things were found before the station was closed.
"""
"""What the byte-pair merges are learned from: enough English and JSON to fill the vocabulary."""

_LLAMA_TEMPLATE = """\
{%- set instruction -%}
To call a function, answer with nothing but one JSON object of the form \
{"name": function name, "parameters": dictionary of argument names and values}.
{%- endset -%}
{{- bos_token }}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- if system or tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {%- if tools %}
        {{- 'Environment: ipython\\n\\nThese functions can be called. ' + instruction + '\\n\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) + '\\n\\n' }}
        {%- endfor %}
    {%- endif %}
    {{- system + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' or message['role'] == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message['content'] is mapping %}
            {{- message['content'] | tojson }}
        {%- else %}
            {{- message['content'] }}
        {%- endif %}
    {%- elif message['tool_calls'] %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- for call in message['tool_calls'] %}
            {%- set function = call['function'] or call %}
            {{- '; ' if not loop.first }}
            {{- '{"name": "' + function['name'] + '", "parameters": ' }}
            {%- if function['arguments'] is string %}
                {{- function['arguments'] }}
            {%- else %}
                {{- function['arguments'] | tojson }}
            {%- endif %}
            {{- '}' }}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- (message['content'] or '') | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Llama 3's turns; tools as JSON in the system turn, results in `ipython` turns."""

_QWEN_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'You are a helpful assistant.' %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nThe signatures of the functions you may call:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each call, write its name and arguments as JSON between tags:\\n' }}
    {{- '<tool_call>\\n{"name": <function name>, "arguments": <JSON object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message['role'] }}
        {%- if message['content'] or not message['tool_calls'] %}
            {{- '\\n' + (message['content'] or '') }}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {{- '\\n<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
            {%- if function['arguments'] is string %}
                {{- function['arguments'] }}
            {%- else %}
                {{- function['arguments'] | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML; tools in Hermes' way, as Qwen 2.5 does: calls and results between XML tags."""


@dataclass(frozen=True, slots=True)
class Starter:
    """One starter model: what it is, and the function that writes it into an empty folder.

    `pipeline` and `library` are the hub's words for what it is for and what loads it.
    """

    summary: str
    pipeline: str
    write: Callable[[Path], None]
    library: str = "transformers"


@dataclass(frozen=True, slots=True)
class _DecoderShape:
    """The sizes of a Llama-like decoder; `head_dim` is the width of one attention head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 32
    positions: int = 2048


class _Weights:
    """Random float32 tensors from one seeded stream: the order of the calls decides the bytes."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def normal(self, *shape: int, std: float) -> NDArray[np.float32]:
        return self._generator.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def linear(self, outputs: int, inputs: int, gain: float = 1.0) -> NDArray[np.float32]:
        """A projection that keeps the scale of what it is given, times `gain`."""
        return self.normal(outputs, inputs, std=gain * inputs**-0.5)


def starter_folder(name: str, cache_dir: Path) -> Path:
    """Where a starter model is, once it is built."""
    return cache_dir / "starter" / FORMAT / name


def ensure_starter(name: str, cache_dir: Path) -> Path:
    """The folder of a starter model, built if it is not there.

    That takes well under a second, but for the first of `DIFFUSION_STARTERS` in a process, which
    imports the libraries they are built with (some seven seconds).

    Any number of threads and processes may ask at once, and one that is cut off leaves no
    half-made folder behind under the model's name.

    Raises:
        ConfigError: there is no starter model of that name.
        LoadFailed: the folder cannot be written, or what builds it is not installed.

    """
    starter = STARTERS.get(name) or DIFFUSION_STARTERS.get(name) or SPEECH_STARTERS.get(name)
    if starter is None:
        known = ", ".join(
            [*sorted(STARTERS), *sorted(DIFFUSION_STARTERS), *sorted(SPEECH_STARTERS)]
        )
        raise ConfigError(f"starter:{name}: no such starter model; there is {known}")
    folder = starter_folder(name, cache_dir)
    if folder.is_dir():
        return folder
    building = folder.with_name(f".{name}-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        starter.write(building)
        _write_card(building, name, starter)
        building.rename(folder)
    except OSError as error:
        # A folder cannot be renamed onto one that holds files: whoever was first has
        # written the same bytes.
        if not folder.is_dir():
            reason = error.strerror or error
            raise LoadFailed(f"cannot build starter:{name} in {folder.parent}: {reason}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write_tiny_llama(folder: Path) -> None:
    bos, eot, pad = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
    tokenizer = _tokenizer(
        [bos, eot, "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", pad]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    shape = _DecoderShape(hidden=256, intermediate=512, layers=4, heads=8, kv_heads=4)
    ids = {
        "bos_token_id": tokenizer.token_to_id(bos),
        "eos_token_id": tokenizer.token_to_id(eot),
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_decoder_config(shape, tokenizer),
        **ids,
        "head_dim": shape.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
    }
    tensors = _decoder_tensors(_Weights(seed=5), shape, tokenizer, eot, qkv_bias=False)
    _write_tokenizer(
        folder,
        tokenizer,
        {"bos_token": bos, "eos_token": eot, "pad_token": pad},
        max_length=shape.positions,
        chat_template=_LLAMA_TEMPLATE,
    )
    _write_model(folder, config, tensors)
    write_json(folder / "generation_config.json", ids)


def _write_tiny_qwen(folder: Path) -> None:
    pad, eos = "<|endoftext|>", "<|im_end|>"
    tokenizer = _tokenizer([pad, "<|im_start|>", eos], tags=["<tool_call>", "</tool_call>"])
    shape = _DecoderShape(hidden=192, intermediate=384, layers=3, heads=6, kv_heads=2)
    ids = {
        "bos_token_id": tokenizer.token_to_id(pad),
        "eos_token_id": tokenizer.token_to_id(eos),
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_decoder_config(shape, tokenizer),
        **ids,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    }
    tensors = _decoder_tensors(_Weights(seed=2), shape, tokenizer, eos, qkv_bias=True)
    _write_tokenizer(
        folder,
        tokenizer,
        {"eos_token": eos, "pad_token": pad},
        max_length=shape.positions,
        chat_template=_QWEN_TEMPLATE,
    )
    _write_model(folder, config, tensors)
    write_json(folder / "generation_config.json", ids)


def _write_tiny_embed(folder: Path) -> None:
    pad, cls, sep = "[PAD]", "[CLS]", "[SEP]"
    hidden, intermediate, layers, heads, positions = 128, 256, 2, 4, 512
    tokenizer = _tokenizer([pad, cls, sep])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "pad_token_id": tokenizer.token_to_id(pad),
        # Any leading part of a random vector is as good an embedding as the whole, so the
        # `dimensions` of a request can be honoured.
        "is_matryoshka": True,
    }
    weights = _Weights(seed=3)
    tensors: Tensors = {
        "embeddings.word_embeddings.weight": weights.normal(
            tokenizer.get_vocab_size(), hidden, std=1.0
        ),
        # Small, so that texts with the same words are near each other in any order.
        "embeddings.position_embeddings.weight": weights.normal(positions, hidden, std=0.1),
        "embeddings.token_type_embeddings.weight": weights.normal(2, hidden, std=0.1),
        **_layer_norm("embeddings.LayerNorm", hidden),
    }
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for part, outputs, inputs in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", intermediate, hidden),
            ("output.dense", hidden, intermediate),
        ):
            tensors[f"{layer}.{part}.weight"] = weights.linear(outputs, inputs)
            tensors[f"{layer}.{part}.bias"] = np.zeros(outputs, np.float32)
        tensors |= _layer_norm(f"{layer}.attention.output.LayerNorm", hidden)
        tensors |= _layer_norm(f"{layer}.output.LayerNorm", hidden)
    tensors["pooler.dense.weight"] = weights.linear(hidden, hidden)
    tensors["pooler.dense.bias"] = np.zeros(hidden, np.float32)

    _write_tokenizer(
        folder,
        tokenizer,
        {"cls_token": cls, "sep_token": sep, "pad_token": pad},
        max_length=positions,
    )
    _write_model(folder, config, tensors)
    _write_sentence_transformer(folder, hidden, positions)


def _tokenizer(specials: Sequence[str], tags: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY_SIZE` tokens: the specials, then the 256 bytes, then merges.

    `tags` are whole tokens at the end that decoding keeps, unlike specials.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(tags),
        special_tokens=list(specials),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return tokenizer


def _decoder_config(shape: _DecoderShape, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
    }


def _decoder_tensors(
    weights: _Weights, shape: _DecoderShape, tokenizer: Tokenizer, eos: str, *, qkv_bias: bool
) -> Tensors:
    """The weights of a Llama-like decoder, by their names in a checkpoint.

    Random weights as they are trained from would repeat one token for ever: the embedding
    of the last token outweighs what the layers add. Small embeddings and sharp attention
    let the whole context decide the next token.
    """
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    vocabulary_size = tokenizer.get_vocab_size()
    tensors: Tensors = {
        "model.embed_tokens.weight": weights.normal(vocabulary_size, shape.hidden, std=0.3),
        "model.norm.weight": np.ones(shape.hidden, np.float32),
        "lm_head.weight": _head(weights, shape.hidden, tokenizer, eos),
    }
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        for part, outputs, inputs, gain in (
            ("self_attn.q_proj", q_width, shape.hidden, 3.0),
            ("self_attn.k_proj", kv_width, shape.hidden, 3.0),
            ("self_attn.v_proj", kv_width, shape.hidden, 1.0),
            ("self_attn.o_proj", shape.hidden, q_width, 1.0),
            ("mlp.gate_proj", shape.intermediate, shape.hidden, 1.0),
            ("mlp.up_proj", shape.intermediate, shape.hidden, 1.0),
            ("mlp.down_proj", shape.hidden, shape.intermediate, 1.0),
        ):
            tensors[f"{layer}.{part}.weight"] = weights.linear(outputs, inputs, gain)
            if qkv_bias and part.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{layer}.{part}.bias"] = weights.normal(outputs, std=0.05)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = np.ones(shape.hidden, np.float32)
    return tensors


def _head(weights: _Weights, hidden: int, tokenizer: Tokenizer, eos: str) -> NDArray[np.float32]:
    """The output projection: logits with a spread of about 3.5 for what can be read.

    Control tokens and bytes beyond ASCII get a logit of zero, which among some 300 others
    of that spread is hardly ever chosen; so answers are readable, if meaningless. The end
    of the answer gets a wider spread than the rest, so that it comes after a hundred tokens or so.
    """
    head = weights.linear(tokenizer.get_vocab_size(), hidden, gain=3.5)
    end = tokenizer.token_to_id(eos)
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        if token == end:
            head[token] *= 1.15
        elif not text or not text.isascii() or not text.isprintable():
            head[token] = 0.0
    return head


def _layer_norm(name: str, width: int) -> Tensors:
    return {
        f"{name}.weight": np.ones(width, np.float32),
        f"{name}.bias": np.zeros(width, np.float32),
    }


def _write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    roles: Mapping[str, str],
    *,
    max_length: int,
    chat_template: str | None = None,
) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
    )
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_model(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_sentence_transformer(folder: Path, dimensions: int, positions: int) -> None:
    """The files by which sentence-transformers and vLLM know how token vectors become one."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, (path, kind) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": dimensions, "pooling_mode_mean_tokens": True},
    )
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False}
    )


def _write_card(folder: Path, name: str, starter: Starter) -> None:
    (folder / "README.md").write_text(
        f"---\npipeline_tag: {starter.pipeline}\nlibrary_name: {starter.library}\n---\n\n"
        f"# {name}\n\n{starter.summary}\n\n"
        "**The weights are random numbers: nothing was trained, and what this model answers\n"
        "means nothing.** It exists so that a server can be started, tried and tested with no\n"
        "download. Built by Roundhouse; delete the folder and it is built again.\n",
        encoding="utf-8",
    )


STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        "tiny-llama": Starter(
            "A Llama of 2.6 million parameters that calls tools in Llama 3's way.",
            "text-generation",
            _write_tiny_llama,
        ),
        "tiny-qwen": Starter(
            "A Qwen 2 of 1.2 million parameters that calls tools in Hermes' way.",
            "text-generation",
            _write_tiny_qwen,
        ),
        "tiny-embed": Starter(
            "A BERT of 0.4 million parameters that turns a text into 128 numbers.",
            "sentence-similarity",
            _write_tiny_embed,
        ),
    }
)
"""The language models, by name, as in `starter:NAME`."""


def _diffusion(name: str, pipeline: str, summary: str) -> Starter:
    def write(folder: Path) -> None:
        # Imported here: it brings torch, transformers and diffusers with it.
        try:
            from engine.starters.diffusion import write_diffusion_starter
        except ImportError as error:
            raise LoadFailed(f"cannot build starter:{name}: {error}") from error
        write_diffusion_starter(name, folder)

    return Starter(summary, pipeline, write, library="diffusers")


DIFFUSION_STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        name: _diffusion(name, pipeline, summary)
        for name, pipeline, summary in (
            ("tiny-sdxl-turbo", "text-to-image", "An SDXL Turbo: one to four steps, no guidance."),
            ("tiny-sdxl", "text-to-image", "An SDXL."),
            ("tiny-sd15", "text-to-image", "A Stable Diffusion 1.5, with no safety checker."),
            ("tiny-flux-schnell", "text-to-image", "A FLUX.1 schnell: one to four steps."),
            ("tiny-flux-dev", "text-to-image", "A FLUX.1 dev, which takes guidance as an input."),
            ("tiny-svd", "image-to-video", "A Stable Video Diffusion: an image starts to move."),
            ("tiny-animatediff", "text-to-video", "An AnimateDiff on Stable Diffusion 1.5."),
            ("tiny-animatediff-sdxl", "text-to-video", "An AnimateDiff on SDXL."),
            ("tiny-wan", "text-to-video", "A Wan 2.1."),
            ("tiny-ltx", "text-to-video", "An LTX-Video."),
            ("tiny-cogvideox", "text-to-video", "A CogVideoX."),
            ("tiny-hunyuanvideo", "text-to-video", "A HunyuanVideo."),
            ("tiny-lora-sd15", "text-to-image", "A LoRA for tiny-sd15."),
            (
                "tiny-lora-sd15-b",
                "text-to-image",
                "Another LoRA for tiny-sd15, which changes the text encoder as well.",
            ),
            (
                "tiny-lora-sdxl",
                "text-to-image",
                "A LoRA for tiny-sdxl and tiny-sdxl-turbo.",
            ),
            ("tiny-controlnet-sd15", "image-to-image", "A ControlNet for tiny-sd15."),
            (
                "tiny-controlnet-sdxl",
                "image-to-image",
                "A ControlNet for tiny-sdxl and tiny-sdxl-turbo.",
            ),
            ("tiny-ip-adapter-sd15", "text-to-image", "An IP-Adapter for tiny-sd15."),
        )
    }
)
"""Those that make images and videos and what is added to such, by name."""


def _write_tiny_whisper(folder: Path) -> None:
    # Imported here, as every family of starters has its own file.
    from engine.starters.whisper import write_whisper_starter

    write_whisper_starter(folder)


def _write_tiny_kokoro(folder: Path) -> None:
    # Imported here: it brings torch and kokoro with it.
    try:
        from engine.starters.kokoro import write_kokoro_starter
    except ImportError as error:
        raise LoadFailed(f"cannot build starter:tiny-kokoro: {error}") from error
    write_kokoro_starter(folder)


def _coqui(name: str, summary: str) -> Starter:
    def write(folder: Path) -> None:
        # Imported here: it brings torch and coqui-tts with it.
        try:
            from engine.starters.coqui import write_coqui_starter
        except ImportError as error:
            raise LoadFailed(f"cannot build starter:{name}: {error}") from error
        write_coqui_starter(name, folder)

    return Starter(summary, "text-to-speech", write, library="coqui")


def _write_tiny_bark(folder: Path) -> None:
    # Imported here: it brings torch and transformers with it.
    try:
        from engine.starters.bark import write_bark_starter
    except ImportError as error:
        raise LoadFailed(f"cannot build starter:tiny-bark: {error}") from error
    write_bark_starter(folder)


SPEECH_STARTERS: Mapping[str, Starter] = MappingProxyType(
    {
        "tiny-kokoro": Starter(
            "A Kokoro that speaks as fast as it can be made to, with voices of each language.",
            "text-to-speech",
            _write_tiny_kokoro,
            library="kokoro",
        ),
        "tiny-bark": Starter(
            "A Bark with two voices.",
            "text-to-speech",
            _write_tiny_bark,
            library="transformers",
        ),
        "tiny-vits": _coqui("tiny-vits", "A VITS of one English voice, spelled by its letters."),
        "tiny-vits-multi": _coqui("tiny-vits-multi", "A VITS of three English voices."),
        "tiny-xtts": _coqui("tiny-xtts", "An XTTS v2 with two voices, which clones others."),
        "tiny-whisper": Starter(
            "A multilingual Whisper of 1.3 million parameters in CTranslate2's format.",
            "automatic-speech-recognition",
            _write_tiny_whisper,
            library="ctranslate2",
        ),
    }
)
"""Those that speak and listen, by name."""
