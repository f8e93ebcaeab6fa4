"""A Dockerfile and its build context, read as a builder reads them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import dropwhile
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile; `text` is all after its name, in one line."""

    name: str
    text: str

    @property
    def flags(self) -> list[str]:
        """What is before the arguments: `--from=stage`."""
        found = re.match(r"(?:--\S+\s+)*", self.text)
        return found.group().split() if found else []

    def words(self) -> list[str]:
        """The arguments, in the JSON form or by the rules of a shell; without leading flags."""
        if self.text.startswith("["):
            listed: list[str] = json.loads(self.text)
            return listed
        return list(dropwhile(lambda word: word.startswith("--"), shlex.split(self.text)))

    def command(self) -> list[str]:
        """The program it starts, and the program's arguments: a shell, but for the JSON form."""
        if self.text.startswith("["):
            return self.words()
        return ["/bin/sh", "-c", re.sub(r"^(?:--\S+\s+)*", "", self.text)]

    def nested(self) -> Instruction:
        """The instruction in this one: the CMD of a HEALTHCHECK."""
        name, _, text = re.sub(r"^(?:--\S+\s+)*", "", self.text).partition(" ")
        return Instruction(name, text.strip())


def stages(text: str) -> list[list[Instruction]]:
    """The stages of a Dockerfile, each beginning with its FROM."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, arguments.strip()))
    return found


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch(PurePosixPath(path).name, pattern.removeprefix("**/"))
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a build may copy: a folder, less what the lines of its `.dockerignore` leave out."""

    folder: Path
    ignored: Sequence[str]

    def sends(self, path: str) -> bool:
        """Whether a path of the folder is sent to the build: the last pattern decides."""
        kept = True
        names = [path, *map(str, PurePosixPath(path).parents)]
        for line in self.ignored:
            if line and not line.startswith("#"):
                exception = line.startswith("!")
                if any(_matches(name, line.removeprefix("!")) for name in names):
                    kept = exception
        return kept

    def copy(self, sources: Sequence[str], target: Path) -> None:
        """Do what COPY does: files into the folder `target`, of folders what is in them.

        FileNotFoundError for a source that does not exist, or is not sent.
        """
        for source in map(PurePosixPath, sources):
            if not self.sends(str(source)):
                raise FileNotFoundError(f"{source} is not sent to the build")
            path = self.folder / source
            for file in [path] if path.is_file() else self._files(path):
                copied = target / (file.name if file == path else file.relative_to(path))
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copied)

    def _files(self, folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if self.sends(path.relative_to(self.folder).as_posix()):
                if path.is_dir():
                    yield from self._files(path)
                else:
                    yield path
