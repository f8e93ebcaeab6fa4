"""The command line of a server whose device is lost when it gets SIGUSR2.

On a card a kernel reads beyond its tensor: after that error no CUDA call of the process works. On a
CPU, which cannot be lost, the check of the device fails from then on.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from engine.memory.device import CpuDevice
from server.commands.cli import main
from tests.gpu.device import DEVICE


def poison() -> None:
    """Lose the device."""
    if DEVICE == "cuda":
        import torch

        beyond = torch.tensor([10**6], device="cuda")
        torch.zeros(4, device="cuda")[beyond] += 1
        torch.cuda.synchronize()
    CpuDevice.check = _fail  # type: ignore[method-assign, assignment]


def _fail(self: CpuDevice) -> None:
    raise RuntimeError("the device is lost")


def _on_signal(*_: Any) -> None:
    threading.Thread(target=poison, daemon=True).start()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, _on_signal)
    main()
