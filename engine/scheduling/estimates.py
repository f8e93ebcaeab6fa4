"""Measured sizes and times of models and runs, remembered across restarts."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.files.atomic import new_file
from engine.memory.block import Block, Estimate
from engine.section import Section

log = logging.getLogger(__name__)

FILE_NAME = "estimates.json"

MAX_SHAPES = 256
"""Shapes of runs to remember for each model. The one not measured for longest goes first."""


class EstimateStore:
    """The last measurement of each model, in one small JSON file.

    A model is known by its runtime, task, source and options, so a changed configuration is
    estimated afresh. A damaged or read-only file costs what it remembers, never a request. Threads
    may share it.
    """

    def __init__(
        self, state_dir: Path, device_name: str, options_of: Callable[[ModelConfig], Section]
    ) -> None:
        """`options_of` gives the options of a model with the defaults of its runtime."""
        self._path = state_dir / FILE_NAME
        self._device_name = device_name
        self._options_of = options_of
        self._lock = threading.Lock()
        self._entries: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, tuple[ModelConfig, str]] = {}
        """The key of each model that was asked for, with the configuration that it is for."""
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))
            self._entries = entries if isinstance(entries, dict) else {}
        except FileNotFoundError:
            pass  # nothing was measured yet
        except (OSError, ValueError) as error:
            log.warning("cannot read %s: %s; starting afresh", self._path, error)

    def get(self, model: ModelConfig) -> Estimate | None:
        """The last measurement, or None."""
        entry = self._entries.get(self._key(model))
        if entry is None:
            return None
        try:
            blocks = tuple(
                Block(str(name), int(size), "parkable" in marks, "scratch" in marks)
                for name, size, *marks in entry["blocks"]
            )
            return Estimate(blocks=blocks, load_seconds=float(entry["load_seconds"]))
        except (KeyError, TypeError, ValueError):
            return None

    def put(self, model: ModelConfig, estimate: Estimate) -> None:
        """Remember a measurement of the model. Writes the file."""
        blocks = [
            [
                block.name,
                block.nbytes,
                *(["parkable"] * block.parkable),
                *(["scratch"] * block.scratch),
            ]
            for block in estimate.blocks
        ]
        with self._lock:
            entry = self._entry(model)
            entry.update(blocks=blocks, load_seconds=round(estimate.load_seconds, 3))
            self._write()

    def forget(self, model: ModelConfig) -> None:
        """Drop what was measured of the model, whose files are others now."""
        with self._lock:
            if self._entries.pop(self._key(model), None) is not None:
                self._write()

    def working_bytes(self, model: ModelConfig, shape: str) -> int | None:
        """The last measured peak of a run of this shape, or None."""
        entry = self._entries.get(self._key(model))
        try:
            return None if entry is None else int(entry["working_bytes"][shape])
        except (KeyError, TypeError, ValueError):
            return None

    def put_working_bytes(self, model: ModelConfig, shape: str, nbytes: int) -> None:
        """Remember the measured peak of a run. Writes the file."""
        with self._lock:
            entry = self._entry(model)
            known = entry.get("working_bytes")
            shapes = dict(known) if isinstance(known, dict) else {}
            shapes.pop(shape, None)  # what was measured last comes last
            shapes[shape] = nbytes
            while len(shapes) > MAX_SHAPES:
                shapes.pop(next(iter(shapes)))
            entry["working_bytes"] = shapes
            self._write()

    def _entry(self, model: ModelConfig) -> dict[str, Any]:
        """What is remembered of the model, to be changed. The caller holds the lock."""
        entry = self._entries.setdefault(self._key(model), {})
        entry["model"] = model.id
        return entry

    def _write(self) -> None:
        """Write the file. The caller holds the lock."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self._path, durable=False, mode=0o600) as unfinished:
                unfinished.write_text(json.dumps(self._entries, indent=1), encoding="utf-8")
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error)

    def _key(self, model: ModelConfig) -> str:
        known, key = self._keys.get(model.id, (None, ""))
        if known is not model:
            options = self._options_of(model).model_dump_json()
            text = "\n".join((self._device_name, model.runtime, model.task, model.source, options))
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._keys[model.id] = model, key
        return key
