"""What vLLM's imports leave out, and that it is there when it is wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Late = Callable[..., Any]
ROOT = Path(__file__).parents[4]
START = """
import json, sys
from pathlib import Path
from engine.memory.device import CpuDevice
from engine.runtimes.base import RuntimeContext
from engine.runtimes.vllm.runtime import VllmRuntime

VllmRuntime(RuntimeContext(CpuDevice(), Path("nowhere"))).start()
loaded = [*sys.modules]
from torch._inductor.lowering import FALLBACK_ALLOW_LIST
from transformers.utils import is_scipy_available, is_sklearn_available
from vllm.multimodal.audio import scipy_signal
from engine.runtimes.vllm.imports import prepare_to_compile
prepare_to_compile()
from torch._inductor import lowering
print(json.dumps({
    "loaded": loaded,
    "available": [is_scipy_available(), is_sklearn_available()],
    "resampled": len(scipy_signal.resample_poly([0.0] * 100, 1, 2)),
    "known": "vllm::any" in lowering.FALLBACK_ALLOW_LIST,
}))
"""


def test_what_is_not_used_is_not_imported_until_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    left_out = {"torch._inductor.compile_fx", "torch._inductor.lowering", "scipy", "sklearn"}
    assert not {"opentelemetry", *left_out} & {*found["loaded"]}
    assert "llguidance.torch" in found["loaded"]  # the first structured answer would compile it
    assert found["available"] == [True, True]
    assert found["resampled"] == 50
    assert found["known"]


@pytest.fixture
def compile_late() -> tuple[Late, list[Any]]:
    """torch's own, with its simplest backend, and the functions that it was given."""
    import torch

    from engine.runtimes.vllm.imports import _compiling_late

    compiled = []

    def torch_compile(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return torch.compile(function, backend="eager", **options)

    return _compiling_late(torch_compile, eager=False), compiled


def test_a_function_is_compiled_once_when_it_is_called(
    compile_late: tuple[Late, list[Any]],
) -> None:
    import torch

    late, compiled = compile_late

    def twice(tensor: Any) -> Any:
        """Twice as much."""
        return tensor * 2

    def thrice(tensor: Any) -> Any:
        return tensor * 3

    twice, thrice = late(dynamic=True)(twice), late(thrice)
    assert compiled == []
    assert twice.__doc__ == "Twice as much."
    assert [twice(torch.tensor(each)).item() for each in (1, 2)] == [2, 4]
    assert len(compiled) == 1
    assert thrice(torch.tensor(1)).item() == 3
    assert len(compiled) == 2


def test_a_function_is_a_part_of_a_compiled_one_that_calls_it(
    compile_late: tuple[Late, list[Any]],
) -> None:
    import torch

    late, compiled = compile_late

    twice = late(lambda tensor: tensor * 2)

    def outer(tensor: Any) -> Any:
        return twice(tensor) + 1

    whole = torch.compile(outer, backend="eager", fullgraph=True)
    assert whole(torch.tensor(1)).item() == 3
    assert compiled == []


@pytest.mark.parametrize("options", [{"backend": "inductor"}, {"backend": "eager"}])
def test_a_helper_with_a_backend_never_compiles(
    compile_late: tuple[Late, list[Any]], options: dict[str, str]
) -> None:
    late, compiled = compile_late
    assert late(dynamic=True, **options)(abs) is abs
    assert compiled == []


def test_nothing_compiles_for_an_eager_model() -> None:
    import torch

    from engine.runtimes.vllm.imports import compiling_late

    with compiling_late(eager=True):
        assert torch.compile(abs) is abs
        assert torch.compile(fullgraph=True)(abs) is abs


def test_a_module_is_compiled_as_ever(
    compile_late: tuple[Late, list[Any]],
) -> None:
    import torch

    late, compiled = compile_late
    module = torch.nn.Linear(2, 2)
    late(module)
    assert compiled == [module]
