"""The kind of model that a repository holds. Each runtime knows its own marks and is asked."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.files.hub.listing import Listing
from engine.files.hub.repository import Repository
from engine.files.hub.selection import GGUF, has_only_gguf
from engine.runtimes.recognised import Recognised
from engine.runtimes.registry import RUNTIMES, runtime_class


def recognise(listing: Listing) -> Recognised:
    """The kind of model in a repository. Reads a few small files of it from the hub.

    Raises:
        LoadFailed: no runtime reads it.

    """
    repository = Repository(listing)
    for name in reversed(list(RUNTIMES)):
        found = RUNTIMES[name].recognise(repository)
        if found is not None:
            return found
    if has_only_gguf(repository.paths):
        raise LoadFailed(f"{listing.repo} holds only GGUF weights. {GGUF}")
    if "config.json" not in repository.paths:
        raise LoadFailed(
            f"{listing.repo} has neither model_index.json nor config.json: it is no model that is"
            " served here"
        )
    raise LoadFailed(
        f"{listing.repo} is not recognised"
        + ("" if repository.has(".safetensors") else ": it has no .safetensors files")
    )


def weight_bytes(listing: Listing, model: ModelConfig) -> int:
    """Bytes of the files that a model reads of its own repository.

    Raises:
        LoadFailed: there are no weights that its runtime reads.

    """
    sources = runtime_class(model.runtime).hub_sources(model)
    source = next(each for each in sources if each.repo == listing.repo)
    return sum(file.nbytes for file in listing.choose(source))


def free_id(repo: str, taken: frozenset[str]) -> str:
    """An id from the name of a repository or folder, as `llama-3.2-1b-instruct`, that is free."""
    base = "-".join(repo.rsplit("/", 1)[-1].lower().split())
    model_id, number = base, 2
    while model_id in taken:
        model_id, number = f"{base}-{number}", number + 1
    return model_id
