"""What the imports of diffusers leave out, and that it is there when it is wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
START = """
import json, sys
from pathlib import Path
from engine.memory.device import CpuDevice
from engine.runtimes.base import RuntimeContext
from engine.runtimes.diffusers.runtime import DiffusersRuntime

DiffusersRuntime(RuntimeContext(CpuDevice(), Path("nowhere"))).start()
loaded = [*sys.modules]
from diffusers import EulerDiscreteScheduler, LMSDiscreteScheduler
sigmas = EulerDiscreteScheduler(use_beta_sigmas=True)
sigmas.set_timesteps(3)
linear = LMSDiscreteScheduler()
linear.set_timesteps(3)
print(json.dumps({
    "loaded": loaded,
    "beta": len(sigmas.sigmas),
    "linear": linear.get_lms_coefficient(1, 1, 0) != 0,
}))
"""


def test_scipy_is_imported_when_a_scheduler_computes_with_it() -> None:
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
    assert not {"scipy.stats", "scipy.integrate", "sklearn"} & {*found["loaded"]}
    assert "diffusers.schedulers.scheduling_lms_discrete" in found["loaded"]
    assert (found["beta"], found["linear"]) == (4, True)
