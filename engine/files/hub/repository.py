"""A repository of the hub while it is looked at: its files, and its documents, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from engine.errors import LoadFailed
from engine.files.hub.listing import Listing, read_json, read_text

CONFIG = "config.json"


class Repository:
    """A listing whose JSON documents are read from the hub when somebody asks for them."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._documents: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """`owner/name`."""
        return self.listing.repo

    @cached_property
    def paths(self) -> frozenset[str]:
        """Every file."""
        return frozenset(file.path for file in self.listing.files)

    def has(self, suffix: str) -> bool:
        """Whether there is a file whose name ends so."""
        return any(path.endswith(suffix) for path in self.paths)

    def json(self, path: str) -> Any:
        """A JSON document.

        Raises:
            LoadFailed: it is missing, too long, or not JSON, or the hub does not give it.

        """
        if path not in self._documents:
            self._documents[path] = read_json(self.listing, path)
        return self._documents[path]

    def text(self, path: str) -> str:
        """A text.

        Raises:
            LoadFailed: it is missing, or too long, or the hub does not give it.

        """
        return read_text(self.listing, path)

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`, which most models have; empty without one.

        Raises:
            LoadFailed: it is not a mapping; or see `json`.

        """
        if CONFIG not in self.paths:
            return {}
        config = self.json(CONFIG)
        if not isinstance(config, Mapping):
            raise LoadFailed(f"{self.name}: {CONFIG} is no mapping")
        return config
