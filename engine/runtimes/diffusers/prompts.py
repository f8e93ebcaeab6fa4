"""Prompts that are longer than a text encoder takes.

CLIP has 77 positions. A pipeline whose only encoders are CLIP's gets a long prompt in chunks, as
most programs for Stable Diffusion do: each chunk has 75 tokens between its own marks of beginning
and end, and the encoded chunks are put one after the other. Other pipelines cut what is beyond
their longest sequence, and the answer says so.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from engine.events import Cut
from engine.runtimes.diffusers.pipeline_arguments import call_parameters

UNCOUNTED = {"add_special_tokens": False, "truncation": False, "verbose": False}
"""Arguments of a tokenizer that gives all tokens of a text, without marks and warnings."""

PROMPTS = ("prompt", "negative_prompt")


def too_long(pipe: Any, arguments: Mapping[str, Any], *, chat_prompt: bool) -> tuple[Cut, ...]:
    """What the pipeline would cut of the prompts in the arguments of a call.

    With `chat_prompt` it puts each into a turn of a chat before it cuts.
    """
    texts = {name: arguments[name] for name in PROMPTS if arguments.get(name)}
    cuts = (
        _cut(pipe, name, text, arguments, chat_prompt=chat_prompt) for name, text in texts.items()
    )
    return tuple(cut for cut in cuts if cut)


def takes_chunks(pipe: Any) -> bool:
    """Whether CLIP alone encodes the prompt, and the denoiser takes any number of its tokens."""
    return (
        getattr(pipe, "unet", None) is not None
        and all(_is_clip(tokenizer) for tokenizer in _tokenizers(pipe))
        and "prompt_embeds" in call_parameters(pipe)
    )


def _cut(
    pipe: Any, name: str, text: str, arguments: Mapping[str, Any], *, chat_prompt: bool
) -> Cut | None:
    """What is cut of a text by the encoder that takes the most of it."""
    cuts = []
    for tokenizer in _tokenizers(pipe):
        limit = _limit(pipe, tokenizer, arguments)
        if limit is not None:
            marks = tokenizer.num_special_tokens_to_add()
            if chat_prompt:
                marks += _tokens_before(tokenizer)
            given = len(tokenizer(text, **UNCOUNTED).input_ids)
            cuts.append(Cut(name, min(given, limit - marks), given))
    best = max(cuts, key=lambda cut: cut.kept, default=None)
    return best if best is not None and best.kept < best.given else None


def _tokens_before(tokenizer: Any) -> int:
    """Tokens of a turn of a chat before its text."""
    text = "prompt"
    turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    return len(tokenizer(turn.partition(text)[0], **UNCOUNTED).input_ids)


def _tokenizers(pipe: Any) -> Iterator[Any]:
    for name in pipe.config:  # `components` reads a signature each time
        part = getattr(pipe, name, None) if name.startswith("tokenizer") else None
        if part is not None:
            yield getattr(part, "tokenizer", part)  # a processor has one


def _is_clip(part: Any) -> bool:
    return type(part).__name__.startswith("CLIP")


def _limit(pipe: Any, tokenizer: Any, arguments: Mapping[str, Any]) -> int | None:
    """The longest sequence, marks included; None if the pipeline does not say."""
    if _is_clip(tokenizer):
        return int(tokenizer.model_max_length)
    parameter = call_parameters(pipe).get("max_sequence_length")
    limit = arguments.get("max_sequence_length", parameter and parameter.default)
    return limit if isinstance(limit, int) else None


def in_chunks(pipe: Any, arguments: Mapping[str, Any], *, guided: bool) -> dict[str, Any]:
    """The arguments of a call with the prompts encoded. Call it where a run may compute.

    `guided` is whether the call computes the negative prompt too.
    """
    texts = {name: arguments.get(name) or "" for name in PROMPTS}
    encoders = [
        (getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}"))
        for suffix in ("", "_2")
        if getattr(pipe, f"text_encoder{suffix}", None) is not None
    ]
    pools = "pooled_prompt_embeds" in call_parameters(pipe)
    names = PROMPTS if guided else PROMPTS[:1]
    # Both prompts and both encoders have one number of chunks: the most that any of them needs.
    count = max(len(_chunks(tokenizer, texts[name])) for tokenizer, _ in encoders for name in names)
    found = {name: value for name, value in arguments.items() if name not in PROMPTS}
    for name in names:
        parts = []
        for tokenizer, encoder in encoders:
            chunks = _chunks(tokenizer, texts[name])
            chunks += [[]] * (count - len(chunks))
            sequence, pooled = _encode(tokenizer, encoder, chunks, pipe._execution_device, pools)
            parts.append(sequence)
        embeddings = torch.cat(parts, dim=-1)
        nothing = name == "negative_prompt" and not texts[name]
        if nothing and pools and pipe.config.get("force_zeros_for_empty_prompt"):
            # As the library does: SDXL was trained with zeros for no text.
            embeddings, pooled = torch.zeros_like(embeddings), torch.zeros_like(pooled)
        found[f"{name}_embeds"] = embeddings
        if pools:
            found[f"{name.removesuffix('prompt')}pooled_prompt_embeds"] = pooled
    return found


def _chunks(tokenizer: Any, text: str) -> list[list[int]]:
    """The tokens of a text in chunks that leave room for the two marks."""
    room = tokenizer.model_max_length - 2
    tokens = tokenizer(text, **UNCOUNTED).input_ids
    return [tokens[at : at + room] for at in range(0, len(tokens), room)]


def _encode(
    tokenizer: Any, encoder: Any, chunks: list[list[int]], device: Any, pools: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, chunks × 77, width) of the chunks, and what the encoder pooled of the first.

    One chunk at a time, so that working memory grows by the results alone.
    """
    sequences, pooled = [], []
    for chunk in chunks:
        ids = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
        with torch.no_grad():
            output = encoder(torch.tensor([ids], device=device), output_hidden_states=pools)
        # SDXL takes the last but one layer of both encoders, and the pooled text of the second.
        sequences.append(output.hidden_states[-2] if pools else output[0])
        pooled.append(output[0])
    return torch.cat(sequences, dim=1), pooled[0]
