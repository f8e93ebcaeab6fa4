"""What a model is at this moment: its configuration, and the files that a load would read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.files.source import Source
from engine.model_folder import present_folder
from engine.runtimes.registry import runtime_class


@dataclass(frozen=True, slots=True)
class Identity:
    """Two models with the same identity give the same answers, as far as a model alone decides."""

    digest: str
    """Of the runtime, the source, the options, and the files."""
    changed_at: float
    """Unix seconds at which the newest of its files came to this disk; 0 without files."""
    complete: bool
    """Whether something of each of its parts is on this disk."""
    loras_changed_at: float
    """The same of its folder of LoRAs, which a loaded model reads when a request names one."""


@dataclass(frozen=True, slots=True)
class _Found:
    content: Any
    changed_at: float = 0.0
    present: bool = True


def identity_of(model: ModelConfig, cache_dir: Path) -> Identity:
    """The identity of a model. Blocks on the disk, for the status of some dozen files.

    What does not touch its answers, such as aliases and `keep_alive`, is no part of it.

    Raises:
        EngineError: its options are wrong, or its parts cannot be told.
        OSError: the disk cannot be read.

    """
    runtime = runtime_class(model.runtime)
    lora_folder = runtime.lora_folder(model)
    loras = _NOTHING if lora_folder is None else _folder(lora_folder)
    found = [_of_source(each.repo, each.revision, cache_dir) for each in runtime.hub_sources(model)]
    # Such as a chat template. A folder of LoRAs is one of these options as well.
    paths = {value for _, value in model.options_as(runtime.Options) if isinstance(value, Path)}
    found += [_path(path) for path in sorted(paths) if path != lora_folder]
    own = [model.id, model.runtime, model.task, model.source, model.options]
    text = json.dumps(
        [own, [each.content for each in found], loras.content], sort_keys=True, default=str
    )
    return Identity(
        digest=hashlib.sha256(text.encode()).hexdigest(),
        changed_at=max((each.changed_at for each in found), default=0.0),
        complete=all(each.present for each in found),
        loras_changed_at=loras.changed_at,
    )


_NOTHING = _Found(None)


def _of_source(source: str, revision: str | None, cache_dir: Path) -> _Found:
    folder = present_folder(source, cache_dir, revision=revision)
    if folder is None:
        return _Found([source, None], present=False)
    found = _folder(folder)
    if Source(source).is_repo:
        # The commit says what is in the files. A file that was fetched again is the same file.
        return _Found([source, folder.name], found.changed_at)
    return _Found([source, found.content], found.changed_at)


def _path(path: Path) -> _Found:
    return _folder(path) if path.is_dir() else _of_files(path.parent, (path,))


def _folder(folder: Path) -> _Found:
    return _of_files(folder, _files_below(folder))


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(names))


def _of_files(folder: Path, files: Iterator[Path] | tuple[Path, ...]) -> _Found:
    content = []
    changed_at = 0.0
    for path in files:
        try:
            link, status = path.lstat(), path.stat()
        except OSError:
            continue  # it vanished, or leads nowhere
        content.append([str(path.relative_to(folder)), status.st_size, status.st_mtime_ns])
        # Not the time of modification: a copy may keep that of its original.
        changed_at = max(changed_at, link.st_ctime, status.st_ctime)
    return _Found(content, changed_at)
