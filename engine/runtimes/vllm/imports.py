"""vLLM's imports without the modules that are not used here.

That saves half of their time and a tenth of the memory.

Importing this module imports torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from engine.runtimes.common.late_imports import replaced, sparing_transformers


@contextmanager
def sparing_imports(*, eager: bool) -> Iterator[None]:
    """Import vLLM inside this context. With `eager`, no function of it compiles.

    Three packages are left out, which vLLM and transformers declare optional: those that
    `sparing_transformers` names, and OpenTelemetry for vLLM's tracing. Two imports are put off
    until they are needed: the compiler, 150 modules of torch's Inductor, and the resampling of
    sound.
    """
    with sparing_transformers(), compiling_late(eager=eager):
        with _absent("torch._inductor.lowering"):
            import_module("vllm.env_override")
        with _absent("opentelemetry"):
            import_module("vllm.tracing")
        with _absent("scipy.signal"):
            audio = import_module("vllm.multimodal.audio")
        lazy_loader = import_module("vllm.utils.import_utils").LazyLoader
        vars(audio)["scipy_signal"] = lazy_loader("scipy_signal", vars(audio), "scipy.signal")
        # It decorates a function, which the first structured answer would otherwise compile.
        import_module("llguidance.torch")
        yield


@contextmanager
def compiling_late(*, eager: bool) -> Iterator[None]:
    """Decorate functions with `torch.compile` inside this context, and compile them when called.

    vLLM's small helpers, those with a `backend` of their own, never compile. They count tokens for
    `logprobs` and the like. The first request that needed one held up all models for 22 s, and
    killed its model where there is no C++ compiler. With `eager`, no function compiles.
    """
    with replaced(torch, compile=_compiling_late(torch.compile, eager=eager)):
        yield


def prepare_to_compile() -> None:
    """Patch Inductor as vLLM does at its import. Call it before a model that compiles."""
    env_override = import_module("vllm.env_override")
    env_override._patch_inductor_fallback_allow_list()  # harmless when repeated


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Make the import of a module fail as if it were not installed, unless it is imported."""
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None  # type: ignore[assignment]  # makes imports fail
    try:
        yield
    finally:
        if hide:
            sys.modules.pop(module)


def _compiling_late(torch_compile: Callable[..., Any], *, eager: bool) -> Callable[..., Any]:
    """`torch.compile` that compiles a function when it is first called.

    The original imports the compiler as soon as a function is decorated.
    """

    def decorate(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda function: decorate(function, **options)
        if isinstance(model, torch.nn.Module):
            return torch_compile(model, **options)
        if eager or "backend" in options:
            return model
        compiled: Callable[..., Any] | None = None

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if torch.compiler.is_compiling():  # as a part of its caller
                return model(*args, **kwargs)
            if compiled is None:
                compiled = torch_compile(model, **options)
            return compiled(*args, **kwargs)

        return call

    return decorate
