"""The starter models of diffusers: images, videos, and the adapters of such pipelines.

Each folder has the format of the hub repository it stands for: a `model_index.json`, a folder
per component, safetensors, tokenizer files. The components are instances of the diffusers and
transformers classes, with small sizes. A seeded stream then fills every parameter, so the same
versions of those libraries always write the same bytes. The weights are float32.

Importing this module imports torch, transformers and diffusers (some 6 s).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from engine.starters.diffusion import adapters, image, video

WRITERS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {**image.WRITERS, **video.WRITERS, **adapters.WRITERS}
)
"""The function that writes each model into an empty folder, by the model's name.

It takes less than half a second. It constructs modules one at a time behind the gate. Torch's
default dtype and random state are afterwards what they were. It raises OSError where the folder
cannot be written.
"""
