"""Where a model's files are: a local folder, a starter model, or a hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError, LoadFailed
from engine.starter import ensure_starter, starter_folder

STARTER_PREFIX = "starter:"

WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What is fetched from a hub: never pickled weights, never code."""


def local_folder(
    source: str,
    cache_dir: Path,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = WANTED_FILES,
) -> Path:
    """The folder with the files of `source`, built or downloaded if need be. May take minutes.

    `patterns` are the files to fetch from a hub; paths count, and `*` matches a slash.

    Raises:
        LoadFailed: there is no such folder or starter model, or the hub could not be asked.

    """
    if source.startswith(STARTER_PREFIX):
        try:
            return ensure_starter(source.removeprefix(STARTER_PREFIX), cache_dir)
        except ConfigError as error:
            raise LoadFailed(error.message) from error
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")):
        raise LoadFailed(f"there is no folder {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LoadFailed(f"cannot fetch {source} from the model hub: {reason}") from error


def present_folder(source: str, cache_dir: Path, *, revision: str | None = None) -> Path | None:
    """The folder with the files of `source` if they are here already. Quick; fetches nothing."""
    if source.startswith(STARTER_PREFIX):
        folder = starter_folder(source.removeprefix(STARTER_PREFIX), cache_dir)
    else:
        folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith((STARTER_PREFIX, "/", ".", "~")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
