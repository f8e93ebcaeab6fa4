"""A server that is killed by SIGKILL in the middle of a batch, as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import openai
import yaml

from tests.server.real import ROOT, Server, free_port

LINES = 100
LIMIT_S = 120.0


class CountingServer(Server):
    """`roundhouse serve` with four fake models in room for two."""

    def __init__(self, home: Path) -> None:
        # A host copy needs no device of a known size, so the models say what they take.
        models = [
            {"id": f"m{n}", "runtime": "fake", "source": "none", "options": {"nbytes": 2**20}}
            for n in range(4)
        ]
        config = home / "config.yaml"
        document = {
            "engine": {"memory": "2200KiB", "device": "cpu"},
            "server": {"batch_idle": 0, "batch_evict_idle": 0},
            "models": models,
        }
        config.write_text(yaml.safe_dump(document), encoding="utf-8")
        port = free_port()
        environ = {
            **os.environ,
            "ROUNDHOUSE_CONFIG": str(config),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_STATE_HOME": str(home / "state"),
            "COUNTED": str(home / "counted.txt"),
        }
        command = [sys.executable, "-m", "tests.server.batches.serve_counting", "serve"]
        log = home / "server.log"
        self._start(port, [*command, "--port", str(port)], ROOT, environ, log)


def test_every_line_has_one_result_after_a_kill(tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": f"m{n % 4}", "prompt": str(n)},
        }
        for n in range(LINES)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    server = CountingServer(tmp_path)
    try:
        server.wait_ready()
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        file = sdk.files.create(file=("in.jsonl", data), purpose="batch")
        batch = sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        deadline = time.monotonic() + LIMIT_S
        done = 0
        while done < LINES // 3:
            assert time.monotonic() < deadline, server.log()
            counts = sdk.batches.retrieve(batch.id).request_counts
            done = 0 if counts is None else counts.completed
        server.stop(signal.SIGKILL)

        server = CountingServer(tmp_path)
        server.wait_ready()
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        while (batch := sdk.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < deadline, server.log()
            time.sleep(0.02)
        text = sdk.files.content(batch.output_file_id or "").text
    finally:
        server.stop()
    results = [json.loads(each) for each in text.splitlines()]
    assert [each["custom_id"] for each in results] == [line["custom_id"] for line in lines]
    assert all(each["response"]["body"] == {"ok": True} for each in results)
    assert batch.request_counts is not None and batch.request_counts.completed == LINES
    counted = [each.split() for each in (tmp_path / "counted.txt").read_text().splitlines()]
    runs = Counter(prompt for _, prompt in counted)
    assert set(runs) == {line["custom_id"] for line in lines}
    # Only what ran at the kill ran twice, and each model came once, but for that of the kill.
    assert sum(runs.values()) - LINES <= 8
    assert sum(a != b for a, b in pairwise(model for model, _ in counted)) <= 4
