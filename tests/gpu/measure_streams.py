"""Measure tokens of our server against vLLM's engine alone, by `roundhouse bench`.

Usage: python -m tests.gpu.measure_streams CONFIG.yaml (--small | --real)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.gpu.arguments import arguments, read
from tests.gpu.record import Figure, tell

STREAMS = (1, 16, 64, 256)
SMALL_STREAMS = (1, 4)
LEAST_TOKENS = 0.95
"""Of the engine's alone."""


def main(path: Path, *, small: bool) -> int:
    """Run the comparison, and tell its figures; the exit status of the command."""
    (model,) = read(path).models
    out = path.parent / "streams"
    streams = SMALL_STREAMS if small else STREAMS
    command = [
        *(sys.executable, "-m", "server.commands.cli", "bench", "llm"),
        *("--config", str(path), "--model", model.id, "--against", "bare", "--out", str(out)),
        *("--repeats", "1", "--output-tokens", "8" if small else "128"),
        *(word for number in streams for word in ("--streams", str(number))),
    ]
    status = subprocess.run(command, check=False).returncode
    found = out / "llm.json"
    if not found.is_file():
        return status or 1
    for case in json.loads(found.read_text(encoding="utf-8"))["cases"]:
        ours, bare = (side["summary"] for side in case["sides"])
        if not ours:
            continue
        for name, unit in (("tokens", "tokens/s"), ("TTFT p50", "ms"), ("ITL p50", "ms")):
            note = f"alone {bare[name]['median']:.4g} {unit}" if name in bare else ""
            value = ours[name]["median"]
            tell(Figure(f"{model.id}, {case['name']}: {name}", value, unit, note=note))
        if (ratio := case["ratios"].get("tokens")) is not None:
            name = f"{model.id}, {case['name']}: tokens/s ÷ engine alone"
            tell(Figure(name, ratio["median"], at_least=LEAST_TOKENS))
    return status


if __name__ == "__main__":
    given = arguments(__doc__)
    sys.exit(main(given.config, small=given.small))
