"""The versions of installed packages, from their metadata: importing torch takes seconds."""

from __future__ import annotations

from importlib import metadata


def installed_version(*distributions: str) -> str | None:
    """The version of the first distribution that is installed; None if none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
