"""Errors of libraries built on torch, as errors of the engine.

Nothing here imports torch before the first call.
"""

from __future__ import annotations

import errno

from engine.errors import EngineError, OutOfDeviceMemory, RuntimeFailed, reason

SHORTAGES = (
    "DefaultCPUAllocator: ",  # c10/core/impl/alloc_cpu.cpp
    "CUDA error: out of memory",  # of a kernel that is loaded, or a context
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What a lack of memory is called where torch has no class of its own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on the device or the host."""
    import torch

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in SHORTAGES)


def torch_error(error: BaseException) -> EngineError:
    """The error of a run as an error of the engine."""
    if is_out_of_memory(error):
        return OutOfDeviceMemory(f"The device ran out of memory: {reason(error)}")
    return RuntimeFailed(f"The model failed while running: {reason(error)}")
