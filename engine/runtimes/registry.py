"""The native libraries Roundhouse can load, by the name used in a configuration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.runtimes.base import Runtime

REGISTRY = {
    "bark": "engine.runtimes.bark.runtime:BarkRuntime",
    "coqui": "engine.runtimes.coqui.runtime:CoquiRuntime",
    "diffusers": "engine.runtimes.diffusers.runtime:DiffusersRuntime",
    "kokoro": "engine.runtimes.kokoro.runtime:KokoroRuntime",
    "vllm": "engine.runtimes.vllm.runtime:VllmRuntime",
    "whisper": "engine.runtimes.whisper.runtime:WhisperRuntime",
}


def runtime_class(name: str) -> type[Runtime]:
    """The adapter class of a runtime. Importing it must not import its library.

    Raises:
        KeyError: no such runtime.

    """
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Runtime] = getattr(import_module(module), attribute)
    return found
