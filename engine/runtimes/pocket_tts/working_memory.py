"""The working memory of a run, from the sizes in a model's configuration. All is in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

CHUNK_TOKENS = 50
"""The most tokens that are spoken at once, from one state of the voice: the library's limit."""

MAX_SAMPLE_S = 30.0
"""Of a recording of a voice. The rest is not heard, as in the library's own server."""

TOKENS_PER_S = 3.0
PADDING_S = 2.0
"""The library stops speech that is slower than this (`_estimate_max_gen_len`)."""

BYTES = 4


def speech_bytes(config: Mapping[str, Any], tokens: int, frames: int) -> int:
    """Of a text of so many tokens: both key-value caches, and `frames` in the decoder.

    The sizes of `english` took 60 MB with 50 tokens, on a CPU, for a voice of 10 s.
    """
    flow, mimi = config["flow_lm"]["transformer"], config["mimi"]
    rate = mimi["frame_rate"]
    voice = MAX_SAMPLE_S * rate + 1
    spoken = math.ceil((tokens / TOKENS_PER_S + PADDING_S) * rate)
    heads = flow["num_heads"]
    width = (flow.get("attn_dim") or flow["d_model"]) // heads * (flow.get("num_kv_heads") or heads)
    # The voice is there as it was read, in a copy, and in the cache that the copy grows into.
    positions = 3 * voice + tokens + spoken
    text_cache = 2 * flow["num_layers"] * width * positions
    decoder = mimi.get("decoder_transformer") or mimi["transformer"]
    seanet = mimi.get("decoder_seanet") or mimi["seanet"]
    steps = mimi["sample_rate"] / math.prod(seanet["ratios"]) / rate
    sound_cache = 2 * decoder["num_layers"] * decoder["d_model"] * spoken * steps
    return int(BYTES * (text_cache + sound_cache + _convolved(mimi, seanet, frames / rate)))


def cloning_bytes(config: Mapping[str, Any], seconds: float) -> int:
    """Of hearing a recording: the encoder's convolutions, then the masks of its attention.

    The sizes of `english` took 89 MB for 4 s and 653 MB for 30 s, on a CPU.
    """
    mimi = config["mimi"]
    seanet = mimi["seanet"]
    steps = seconds * mimi["sample_rate"] / math.prod(seanet["ratios"])
    return int(BYTES * max(_convolved(mimi, seanet, seconds), 1.25 * steps * steps))


def _convolved(mimi: Mapping[str, Any], seanet: Mapping[str, Any], seconds: float) -> float:
    """Numbers at the widest place, the convolutions at full rate: four tensors."""
    return 4.0 * seconds * float(seanet["n_filters"] * mimi["sample_rate"])
