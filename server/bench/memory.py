"""The memory of a process and its descendants."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path

import psutil

from server.bench.work import Memory

KIB = 1024


def tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants; empty if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(pid: int) -> Memory:
    """The memory of the tree under `pid` now (Linux).

    Neither PSS nor RSS compares one process with three fairly. PSS shrinks when another program
    maps the same libraries. RSS counts shared pages three times. So file-backed pages count once
    for each file: the largest number that any process of the tree has of it.
    """
    pss = rss = anonymous = processes = 0
    files: defaultdict[str, int] = defaultdict(int)
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            sums = read_rollup(_read(process.pid, "smaps_rollup"))
            own_files = read_file_pages(_read(process.pid, "smaps"))
            # Its share: pages that a forked child has in common with its parent count once.
            anonymous += sums["Pss_Anon"]
            pss += sums["Pss"]
            rss += sums["Rss"]
            processes += 1
            for name, nbytes in own_files.items():
                files[name] = max(files[name], nbytes)
    return Memory(anonymous + sum(files.values()), pss, rss, processes)


def read_rollup(text: str) -> dict[str, int]:
    """The sums of a `/proc/PID/smaps_rollup`, in bytes, by the kernel's names."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * KIB for words in lines if words[-1] == "kB"}


def read_file_pages(text: str) -> dict[str, int]:
    """Resident bytes of files and shared memory in a `smaps`, by inode and path.

    Pages that the process wrote to privately do not count.
    """
    files: defaultdict[str, int] = defaultdict(int)
    name = ""
    rss = 0
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if " " in key:  # the head of a mapping: addresses, access, offset, device, inode, path
            parts = line.split(maxsplit=5)
            name = " ".join(parts[4:]) if parts[4] != "0" else ""
        elif key == "Rss":
            rss = int(rest.split()[0]) * KIB
        elif key == "Anonymous" and name:
            files[name] += rss - int(rest.split()[0]) * KIB
    return dict(files)


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
