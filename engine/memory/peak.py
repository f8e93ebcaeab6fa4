"""The peak memory of a piece of torch code, on the thread that runs it.

Importing this module imports torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorPeak(TorchDispatchMode):  # type: ignore[misc]
    """A context that counts the bytes of the tensors made in it, while they live.

    An allocator has one counter for the whole process, where other models run beside this one. The
    context does not see the memory that an operation uses only inside itself. A dispatch mode costs
    some microseconds an operation, so measure once a shape and not every run.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """`known` tensors (weights) exist already. A view of one takes no memory."""
        super().__init__()
        self.nbytes = 0
        """The peak so far."""
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}
        self._sum = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._sum += storage.nbytes()
        self.nbytes = max(self.nbytes, self._sum)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._sum -= self._live.pop(key, 0)
