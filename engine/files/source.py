"""What a model's `source` names: a model built here, a local folder, or a hub repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STARTER = "starter"
"""The scheme of the models of random weights that `engine.starters` builds."""

SAMPLES = "samples"
"""The scheme of the models of trained weights that `engine.samples` builds."""

_SCHEME = re.compile(r"([a-z][a-z0-9-]*):(.*)")
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Source:
    """A source, taken apart. What each scheme stands for is in `engine.model_folder.BUILDERS`."""

    text: str
    """As the configuration has it: `starter:NAME`, `samples:NAME`, a path, or `owner/name`."""

    @property
    def scheme(self) -> str | None:
        """`starter` of `starter:NAME`; None for a path or a repository."""
        match = _SCHEME.fullmatch(self.text)
        return match[1] if match else None

    @property
    def name(self) -> str:
        """What follows the scheme."""
        match = _SCHEME.fullmatch(self.text)
        return match[2] if match else ""

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random, so that the answers mean nothing."""
        return self.scheme == STARTER

    @property
    def folder(self) -> Path:
        """The local folder that it would be."""
        return Path(self.text).expanduser()

    @property
    def is_path(self) -> bool:
        """Whether it is written as a path, so that no hub needs to be asked."""
        return self.text.startswith(("/", ".", "~"))

    @property
    def is_repo(self) -> bool:
        """Whether it is a repository of a hub, and no local folder."""
        if self.is_path or self.folder.is_dir():
            return False
        return _REPO.fullmatch(self.text) is not None


def starter_source(name: str) -> str:
    """The source of a starter model."""
    return f"{STARTER}:{name}"
