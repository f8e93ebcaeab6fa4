"""vLLM's imports without what is not used here: half of their time and a tenth of the memory.

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


@contextmanager
def sparing_imports() -> Iterator[None]:
    """Import vLLM within this.

    Left out is what vLLM and transformers can do without and say so themselves: scikit-learn for
    assisted generation and SciPy for training object detectors, OpenTelemetry for vLLM's own
    tracing. Put off until it is needed is what compiles, 150 modules of torch's Inductor, and
    what resamples sound.
    """
    from transformers import utils

    with _replaced(utils, is_sklearn_available=_no, is_scipy_available=_no):
        import_module("transformers.generation.candidate_generator")
        import_module("transformers.loss.loss_utils")
    with _replaced(torch, compile=_compiling_late(torch.compile)):
        with _absent("torch._inductor.lowering"):
            import_module("vllm.env_override")
        with _absent("opentelemetry"):
            import_module("vllm.tracing")
        with _absent("scipy.signal"):
            audio = import_module("vllm.multimodal.audio")
        lazy_loader = import_module("vllm.utils.import_utils").LazyLoader
        vars(audio)["scipy_signal"] = lazy_loader("scipy_signal", vars(audio), "scipy.signal")
        yield


def prepare_to_compile() -> None:
    """Do to Inductor what vLLM would have done at once. Call before a model that compiles."""
    env_override = import_module("vllm.env_override")
    env_override._patch_inductor_fallback_allow_list()  # harmless when repeated


def _no() -> bool:
    return False


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    kept = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Have the import of a module fail as if it were not installed, unless it is there already."""
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None  # type: ignore[assignment]  # what imports take for a refusal
    try:
        yield
    finally:
        if hide:
            sys.modules.pop(module)


def _compiling_late(torch_compile: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` that has a function compiled when it is first called.

    torch's own imports the compiler as soon as a function is decorated.
    """

    def decorate(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda function: decorate(function, **options)
        if isinstance(model, torch.nn.Module):
            return torch_compile(model, **options)
        compiled: Callable[..., Any] | None = None

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if torch.compiler.is_compiling():  # as a part of what calls it
                return model(*args, **kwargs)
            if compiled is None:
                compiled = torch_compile(model, **options)
            return compiled(*args, **kwargs)

        return call

    return decorate
