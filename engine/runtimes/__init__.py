"""The native libraries Roundhouse can load, by the name used in a configuration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.runtimes.base import Runtime

REGISTRY = {
    "bark": "engine.runtimes.bark:BarkRuntime",
    "coqui": "engine.runtimes.coqui:CoquiRuntime",
    "diffusers": "engine.runtimes.diffusers:DiffusersRuntime",
    "kokoro": "engine.runtimes.kokoro:KokoroRuntime",
    "vllm": "engine.runtimes.vllm:VllmRuntime",
    "whisper": "engine.runtimes.whisper:WhisperRuntime",
}


def runtime_class(name: str) -> type[Runtime]:
    """The adapter class of a runtime. Importing it must not import its library.

    Raises:
        KeyError: no such runtime.

    """
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Runtime] = getattr(import_module(module), attribute)
    return found
