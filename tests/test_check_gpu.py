"""The runner of `scripts/check-gpu`: what it keeps when steps crash, hang, or have no time."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.gpu import check
from tests.gpu.check import Check
from tests.gpu.models import BUILDS, MODELS
from tests.gpu.record import Figure, Line, Outcome, Record
from tests.gpu.steps import STEPS, Step

TELL = """
from tests.gpu.record import Figure, tell
tell(Figure("speed", 2.5, "GB/s", at_least=3.0))
"""


def step(name: str, code: str, limit_s: float = 20.0) -> Step:
    return Step(name, f"that {name} works", ("-c", code), limit_s)


def run(folder: Path, *steps: Step, minutes: float = 1.0) -> tuple[bool, dict[str, Any], str]:
    checks = Check(folder / "out", "cpu", small=False, minutes=minutes, beside=1, folder=folder)
    good = checks.run(steps)
    document = json.loads((folder / "out" / "results.json").read_text())
    return good, document, (folder / "out" / "results.md").read_text()


def test_what_was_found_before_a_crash_is_kept(tmp_path: Path) -> None:
    good, document, page = run(
        tmp_path,
        step("crash", f"{TELL}\nimport os; print('last words', flush=True); os.abort()"),
        step("after", "print('fine')"),
    )
    assert not good
    crash, after = document["steps"]
    assert (crash["status"], after["status"]) == ("failed", "passed")
    assert [each["value"] for each in crash["figures"]] == [2.5]
    assert "last words" in crash["tail"] and "last words" in page
    assert "| crash | speed | 2.5 GB/s | ≥ 3 **missed** |" in page


def test_a_missed_aim_is_marked_and_no_failure(tmp_path: Path) -> None:
    good, document, page = run(tmp_path, step("slow", TELL))
    assert good and document["steps"][0]["status"] == "passed"
    assert "**missed**" in page


def test_a_step_that_hangs_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "KILL_S", 0.1)
    monkeypatch.setattr(check, "LEAST_S", 0.01)
    told = tmp_path / "pid"

    class Process(subprocess.Popen[bytes]):
        """Its limit is over once it hangs, however long it takes to get there."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and self.poll() is None:
                if told.exists() and told.read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.02)
            return super().wait()

    monkeypatch.setattr(
        check, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Process})
    )
    child = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); time.sleep(60)"
    code = (
        f"{TELL}\nimport pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(told)!r}).write_text(str(child.pid))\nchild.wait()"
    )
    good, document, _ = run(tmp_path, step("hang", code, limit_s=0.02))
    assert not good
    assert document["steps"][0]["status"] == "timed out"
    assert [each["value"] for each in document["steps"][0]["figures"]] == [2.5]
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(told.read_text())).status() == psutil.STATUS_ZOMBIE


def test_without_time_a_step_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    good, document, page = run(tmp_path, step("late", "print('never')"), minutes=0)
    assert good
    assert [each["status"] for each in document["steps"]] == ["left out"]
    assert "| late | left out |" in page


def test_a_file_that_was_cut_in_the_middle_of_a_line(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    lines: list[Line] = [Figure("a", 1.0, note="n"), Outcome("t", "failed", 0.1, "why")]
    for line in lines:
        record.add(line)
    with record.path.open("a") as file:
        file.write('{"name": "b", "val')
    assert record.read() == lines


def test_the_names_of_a_step_are_unique_and_its_models_can_be_built() -> None:
    assert len({each.name for each in STEPS}) == len(STEPS)
    for name in {name for each in STEPS for name in each.models}:
        real = MODELS[name].real
        parts = real["options"].get("components", {}).values() if "options" in real else ()
        assert {real["source"], *parts} <= BUILDS.keys()
