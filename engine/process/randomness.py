"""Random numbers of one thread, for libraries that draw from torch's global generator.

The process has one global generator. Two models that draw from it at once change each other's
numbers, and a seed for one run seeds all runs. `torch.random.fork_rng` does not help: what it
restores is global as well.

So in the modules that draw, and only there, the name `torch` is bound to a stand-in. Inside
`seeded` it draws from the thread's own generator; otherwise it is torch itself. The numbers are
those that torch gives after `manual_seed`.

Importing this module imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch

_thread = threading.local()


class _Init(ModuleType):
    """`torch.nn.init`, with draws as in `_Torch`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.init, name)

    def normal_(self, tensor: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        """As `torch.nn.init.normal_`."""
        return torch.nn.init.normal_(tensor, *args, **_with_generator(settings, tensor.device))


class _Nn(ModuleType):
    """`torch.nn`, with that `init`."""

    init = _Init("torch.nn.init")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn, name)


class _Torch(ModuleType):
    """Torch, except that draws use the thread's generator where it has one."""

    def __init__(self) -> None:
        super().__init__(torch.__name__)
        # Found without `__getattr__`, which took a twentieth of Bark's time. Built-in functions and
        # types only: the modules use none of the attributes that other code replaces.
        kept = (BuiltinFunctionType, type, torch.dtype)
        self.__dict__.update(
            (name, value)
            for name, value in vars(torch).items()
            if isinstance(value, kept) and name not in vars(_Torch)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    nn = _Nn("torch.nn")

    def randn(self, *size: Any, **settings: Any) -> torch.Tensor:
        """As `torch.randn`."""
        return torch.randn(*size, **_with_generator(settings, settings.get("device")))

    def randn_like(self, tensor: torch.Tensor, **settings: Any) -> torch.Tensor:
        """As `torch.randn_like`, which fills an `empty_like`."""
        empty = torch.empty_like(tensor, **settings)
        return empty.normal_(**_with_generator({}, empty.device))

    def rand(self, *size: Any, **settings: Any) -> torch.Tensor:
        """As `torch.rand`."""
        return torch.rand(*size, **_with_generator(settings, settings.get("device")))

    def multinomial(self, weights: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        """As `torch.multinomial`."""
        return torch.multinomial(weights, *args, **_with_generator(settings, weights.device))


_TORCH = _Torch()


def draw_by_thread(*module_names: str) -> None:
    """Bind the name `torch` of these modules to the stand-in; imports the modules.

    Without `seeded` they draw as before. It may be called again.
    """
    for name in module_names:
        module = import_module(name)
        assert module.torch in (torch, _TORCH)
        module.torch = _TORCH  # type: ignore[attr-defined]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Give the calling thread a generator of its own for each device that it draws on."""
    _thread.seed, _thread.generators = seed, {}
    try:
        yield
    finally:
        del _thread.seed, _thread.generators


def _with_generator(settings: dict[str, Any], device: Any) -> dict[str, Any]:
    generators = getattr(_thread, "generators", None)
    if generators is None or settings.get("generator") is not None:
        return settings
    device = torch.device(device if device is not None else torch.get_default_device())
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in generators:
        generators[device] = torch.Generator(device).manual_seed(_thread.seed)
    return {**settings, "generator": generators[device]}
