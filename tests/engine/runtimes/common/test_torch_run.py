"""A run of torch on a thread, as the watchdog sees it."""

from __future__ import annotations

import pytest
import torch

from engine.events import Event
from engine.runtimes.common.torch_run import TorchParts, TorchRun

pytestmark = pytest.mark.slow


class Steps(TorchRun):
    def _run(self) -> None:
        for _ in range(5):
            self._model._parts["all"](torch.zeros(1))


def test_a_run_of_torch_counts_its_modules_made_of_others() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    module = torch.nn.Sequential(inner, torch.nn.Linear(1, 1))
    events: list[Event] = []
    run = Steps(TorchParts({"all": module}, "cpu"), "", events.append)
    run.execute()
    assert run.progress == 5 * 2
