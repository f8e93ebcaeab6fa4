"""The native libraries Roundhouse can load, by the name used in a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.section import Section

if TYPE_CHECKING:  # commands that only read `--help` need none of what it imports
    from engine.runtimes.base import Runtime

REGISTRY = {
    "vllm": "engine.runtimes.vllm.runtime:VllmRuntime",
    "diffusers": "engine.runtimes.diffusers.runtime:DiffusersRuntime",
    "kokoro": "engine.runtimes.kokoro.runtime:KokoroRuntime",
    "coqui": "engine.runtimes.coqui.runtime:CoquiRuntime",
    "bark": "engine.runtimes.bark.runtime:BarkRuntime",
    "pocket_tts": "engine.runtimes.pocket_tts.runtime:PocketRuntime",
    "onnx_asr": "engine.runtimes.onnx_asr.runtime:OnnxAsrRuntime",
    "sherpa_diarization": "engine.runtimes.sherpa_diarization.runtime:SherpaDiarizationRuntime",
    "whisper": "engine.runtimes.whisper.runtime:WhisperRuntime",
    "remote": "engine.runtimes.remote.runtime:RemoteRuntime",
}
"""Module and class of each. A repository of a hub is offered to the last line first: vLLM, on the
first, takes any language model."""


def runtime_class(name: str) -> type[Runtime]:
    """The adapter class of a runtime. Importing it must not import its library.

    Raises:
        KeyError: no such runtime.

    """
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Runtime] = getattr(import_module(module), attribute)
    return found


def options_of(model: ModelConfig) -> Section:
    """The parsed options of a model, whatever its runtime. A runtime itself uses `options_as`.

    Raises:
        KeyError: no such runtime.
        ConfigError: naming every option at fault.

    """
    return model.options_as(runtime_class(model.runtime).Options)


class _Runtimes(Mapping[str, "type[Runtime]"]):
    """The adapter classes by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> type[Runtime]:
        return runtime_class(name)

    def __contains__(self, name: object) -> bool:
        return name in REGISTRY

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY)

    def __len__(self) -> int:
        return len(REGISTRY)


RUNTIMES: Mapping[str, type[Runtime]] = _Runtimes()
"""What `engine.config` checks the models of a configuration against."""
