"""Runs the steps of `scripts/check-gpu` and writes what they found, after each step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from server.bench.machine import describe
from server.bench.target_commands import import_path
from tests.gpu.device import CACHE, VARIABLE
from tests.gpu.models import CACHE_FOLDER
from tests.gpu.record import RECORD, Figure, Line, Outcome, Record
from tests.gpu.steps import Step

ROOT = Path(__file__).resolve().parents[2]

LEAST_S = 15.0
"""A step that would have less time is left out: its imports alone take that."""

KILL_S = 5.0
"""How long a step that was asked to stop has for that."""

TAIL_LINES = 40
"""Of the output of a step that failed."""


@dataclass(slots=True)
class Result:
    """What became of one step."""

    step: Step
    status: str = "left out"
    """`passed`, `failed`, `timed out` or `left out`."""
    seconds: float = 0.0
    lines: list[Line] = field(default_factory=list)
    tail: str = ""

    @property
    def failed(self) -> bool:
        """Whether something is wrong. A missed aim is not; a step without time is not either."""
        return self.status in ("failed", "timed out")


class Check:
    """One run of the steps."""

    def __init__(
        self, out: Path, device: str, *, small: bool, minutes: float, beside: int, folder: Path
    ) -> None:
        """`beside` is the number of steps at once; `folder` is for models, cache and state."""
        self.out = out
        self.device = device
        self.small = small
        self._ends = time.monotonic() + 60 * minutes
        self._beside = beside
        self._folder = folder
        self._writing = threading.Lock()
        self.results: list[Result] = []
        self._machine = describe()

    def run(self, steps: Sequence[Step]) -> bool:
        """Run them; whether none failed."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").unlink(missing_ok=True)
        self.results = [Result(step) for step in steps]
        running: list[Future[None]] = []
        with ThreadPoolExecutor(self._beside) as pool:
            for result in self.results:
                # With starters nothing is measured that others could disturb.
                alone = result.step.alone and not self.small
                if alone:
                    _wait(running)
                running.append(pool.submit(self._run, result))
                if alone:
                    _wait(running)
        self._write()
        return not any(each.failed for each in self.results)

    def _run(self, result: Result) -> None:
        step = result.step
        began = time.monotonic()
        # Small steps may share a busy machine, and nothing is measured there.
        limit_s = min(step.limit_s * (3 if self.small else 1), self._ends - began)
        if limit_s < LEAST_S:
            print(f"{step.name}: left out, the time is over", flush=True)  # noqa: T201 - progress of a command
            self._write()
            return
        with tempfile.TemporaryDirectory(prefix=f"{step.name}-", dir=self._folder) as name:
            record = Record(self.out / f"{step.name}.jsonl")
            record.path.unlink(missing_ok=True)
            log = self.out / f"{step.name}.log"
            with log.open("wb") as file:
                code = 0
                for command in self._commands(step, Path(name)):
                    left_s = limit_s - (time.monotonic() - began)
                    code = self._call(command, file, record, left_s)
                    if code:
                        break
            result.seconds = time.monotonic() - began
            result.lines = record.read()
            output = log.read_text(encoding="utf-8", errors="replace")
            if code:
                result.status = "timed out" if result.seconds >= limit_s else "failed"
                result.tail = "\n".join(output.splitlines()[-TAIL_LINES:])
            else:
                result.status = "passed"
            self._write(f"==== {step.name}: {result.status}\n{output}\n")
            print(f"{step.name}: {result.status} in {result.seconds:.0f} s", flush=True)  # noqa: T201 - progress of a command
            # A machine may give back a handful of files only.
            log.unlink()
            record.path.unlink(missing_ok=True)
        self._forget_models()

    def _commands(self, step: Step, folder: Path) -> list[list[str]]:
        config = folder / "config.yaml"
        commands = []
        if step.models:
            build = [sys.executable, "-m", "tests.gpu.models", str(self._folder), str(config)]
            build += [*step.models, "--device", self.device]
            build += ["--small"] if self.small else []
            memory = step.small_memory if self.small else step.memory
            build += ["--memory", memory] if memory else []
            commands.append(build)
        filled = {
            "config": str(config),
            "device": self.device,
            "size": "--small" if self.small else "--real",
            "rounds": "2" if self.small else "30",
            "requests": "8" if self.small else "24",
        }
        commands.append([sys.executable, *(each.format(**filled) for each in step.command)])
        return commands

    def _call(self, command: list[str], log: Any, record: Record, limit_s: float) -> int:
        """The exit status of a command, which is stopped with all its children at its limit."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": import_path(ROOT),
                "HF_HUB_OFFLINE": "1",
                RECORD: str(record.path),
                VARIABLE: self.device,
                CACHE: str(self._folder / CACHE_FOLDER),
                "XDG_CACHE_HOME": str(self._folder),
                **({"OMP_NUM_THREADS": "1"} if self.small else {}),
            },
        )
        try:
            return process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            log.write(b"\n(stopped: its time is over)\n")
            return 1
        finally:
            # Also what it has left behind, as servers of its own.
            _end(process)

    def _forget_models(self) -> None:
        """Delete the real models: they may take the host's memory, and are built in seconds."""
        if self._beside == 1:
            shutil.rmtree(self._folder / "models", ignore_errors=True)

    def _write(self, output: str = "") -> None:
        with self._writing:
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write(output)
            document = {
                "machine": self._machine,
                "device": self.device,
                "small": self.small,
                "steps": [
                    {
                        "name": each.step.name,
                        "shows": each.step.shows,
                        "status": each.status,
                        "seconds": round(each.seconds, 1),
                        "figures": [asdict(x) for x in each.lines if isinstance(x, Figure)],
                        "tests": [asdict(x) for x in each.lines if isinstance(x, Outcome)],
                        "tail": each.tail,
                    }
                    for each in self.results
                ],
            }
            _replace(self.out / "results.json", json.dumps(document, indent=1) + "\n")
            _replace(self.out / "results.md", page(self.results, self._machine, small=self.small))


def page(results: Sequence[Result], machine: Mapping[str, Any], *, small: bool) -> str:
    """The results as a page of markdown."""
    gpu = "; ".join(machine["gpus"]) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Checks of {machine['date']}",
        "",
        f"GPU: {gpu}. {machine['cores']} cores of {machine['cpu']}. Commit {machine['commit']}."
        f" {versions}.",
        "",
        *(
            ["Small: starters of random weights. The figures only show that all of it runs.", ""]
            if small
            else []
        ),
        "| step | | s | tests | shows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in results:
        tests = [line.outcome for line in each.lines if isinstance(line, Outcome)]
        told = ", ".join(f"{tests.count(kind)} {kind}" for kind in dict.fromkeys(sorted(tests)))
        row = (each.step.name, each.status, f"{each.seconds:.0f}", told, each.step.shows)
        lines.append(f"| {' | '.join(row)} |")
    figures = [
        (each.step.name, line)
        for each in results
        for line in each.lines
        if isinstance(line, Figure)
    ]
    if figures:
        lines += ["", "| step | figure | | wanted | |", "| --- | --- | --- | --- | --- |"]
    for name, figure in figures:
        mark = "" if small or not figure.wanted or figure.good else " **missed**"
        value = f"{figure.value:.4g} {figure.unit}".strip()
        row = (name, figure.name, value, figure.wanted + mark, figure.note)
        lines.append(f"| {' | '.join(row)} |")
    for each in results:
        for line in each.lines:
            if isinstance(line, Outcome) and line.outcome == "failed":
                lines += ["", f"**{line.test}**", "", "```", line.why, "```"]
        if each.tail:
            lines += ["", f"## The end of {each.step.name}", "", "```", each.tail, "```"]
    return "\n".join(lines) + "\n"


def _wait(running: list[Future[None]]) -> None:
    while running:
        running.pop().result()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a step's process group: first by asking, then by force."""
    # A benchmark's servers have groups of their own, so that it can end them in order.
    begun: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        begun = psutil.Process(process.pid).children(recursive=True)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if not (left := _living(process, begun)):
            break
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(sent)
        deadline = time.monotonic() + KILL_S
        while _living(process, begun) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _living(
    process: subprocess.Popen[bytes], begun: Sequence[psutil.Process]
) -> list[psutil.Process]:
    """What runs of them and of the group. A zombie waits only for somebody to ask how it ended."""
    process.poll()
    found = []
    for each in {*psutil.process_iter(), *begun}:
        with suppress(psutil.Error, ProcessLookupError):
            ours = each in begun or os.getpgid(each.pid) == process.pid
            if ours and each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(f"{path.suffix}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
