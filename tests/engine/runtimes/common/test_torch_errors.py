"""Errors of torch as errors of the engine."""

from __future__ import annotations

import mmap

import pytest
import torch

from engine.errors import OutOfDeviceMemory, RuntimeFailed
from engine.runtimes.common.torch_errors import torch_error

pytestmark = pytest.mark.slow

TOO_MUCH = 2**46


def test_too_much_for_the_host_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as torch_raised:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with pytest.raises(OSError) as system_raised:
        mmap.mmap(-1, TOO_MUCH)
    for error in (torch_raised.value, system_raised.value, MemoryError()):
        assert isinstance(torch_error(error), OutOfDeviceMemory)


def test_any_other_error_is_a_failure() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2) @ torch.zeros(3)
    for error in (raised.value, FileNotFoundError(2, "no such file")):
        assert type(torch_error(error)) is RuntimeFailed
