"""The files of a Pocket TTS model, found without its library.

Kyutai's repositories hold a model of each language, and the library holds their configurations.
Each names, with its commit, where the weights and the tokenizer are. The voices are in one
repository for all. A model in a folder of its own has a `config.yaml` in the same format.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from engine.config import ModelConfig
from engine.errors import LoadFailed, reason
from engine.files.hub.selection import HubSource
from engine.files.source import Source
from engine.runtimes.pocket_tts.options import PocketOptions

CONFIG_FILE = "config.yaml"

VOICES_FOLDER = "embeddings"

VOICES_REPO = "kyutai/pocket-tts-without-voice-cloning"
VOICES_REVISION = "a7056f505a4a8ca72d8b5fb1440071d6f1a35739"
"""Where the library takes the states of its voices (its `get_predefined_voice`)."""

NO_CLONING = "without-voice-cloning"
"""The end of the name of a repository whose weights cannot clone."""

LANGUAGES: Mapping[str, tuple[str, str]] = {
    "english": ("en", "alba"),
    "french": ("fr", "estelle"),
    "german": ("de", "juergen"),
    "italian": ("it", "giovanni"),
    "spanish": ("es", "lola"),
    "portuguese": ("pt", "rafael"),
    "dutch": ("nl", "daan"),
}
"""The language of the models that the library knows, and its first voice, by how the name of a
model begins."""

_ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)/(?P<path>[^@]+?)(?:@(?P<revision>.+))?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file or a folder of a model is: a source, and the path in it."""

    source: str
    path: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a model are."""

    weights: Place
    tokenizer: Place
    voices: Place
    """A folder."""

    def hub_sources(self) -> tuple[HubSource, ...]:
        """What is fetched, the weights first."""
        patterns: dict[tuple[str, str | None], list[str]] = {}
        for place, wanted in (
            (self.weights, self.weights.path),
            (self.tokenizer, self.tokenizer.path),
            (self.voices, f"{self.voices.path}/*.safetensors"),
        ):
            patterns.setdefault((place.source, place.revision), []).append(wanted)
        return tuple(
            HubSource(source, tuple(wanted), revision)
            for (source, revision), wanted in patterns.items()
        )


@dataclass(frozen=True, slots=True)
class PocketFiles:
    """The files of a model on this disk."""

    config: Mapping[str, Any]
    """In the library's format."""
    weights: Path
    tokenizer: Path
    voices: Mapping[str, Path]
    """By name, the first one first."""


def hub_sources(model: ModelConfig) -> tuple[HubSource, ...]:
    """What a model reads of a hub."""
    options = model.options_as(PocketOptions)
    if options.config is None:
        wanted = (CONFIG_FILE, "*.safetensors", "tokenizer.*")
        return (HubSource(model.source, wanted, options.revision),)
    return named_places(model.source, options, options.config).hub_sources()


def named_places(source: str, options: PocketOptions, name: str) -> Places:
    """Where a model is that the library has a name for.

    A local source holds all parts, under the same paths. Of a repository that the configuration
    names, the commit that it names is taken. A copy of it elsewhere is taken as it is.
    """
    config = library_config(name)
    _, path, _ = _address(config["weights_path"])
    voices = f"{PurePosixPath(path).parent}/{VOICES_FOLDER}"
    tokenizer_repo, tokenizer, tokenizer_revision = _address(
        config["flow_lm"]["lookup_table"]["tokenizer_path"]
    )
    if not Source(source).is_repo:
        return Places(Place(source, path), Place(source, tokenizer), Place(source, voices))
    revision = options.revision
    for key in ("weights_path", "weights_path_without_voice_cloning"):
        repo, _, tried = _address(config[key])
        if repo == source:
            revision = revision or tried
    return Places(
        Place(source, path, revision),
        Place(tokenizer_repo, tokenizer, tokenizer_revision),
        Place(VOICES_REPO, voices, VOICES_REVISION),
    )


def find_files(
    model: ModelConfig, folder_of: Callable[[str, str | None], Path | None]
) -> PocketFiles | None:
    """The files of a model; None if `folder_of` has no folder for one of its sources.

    Raises:
        LoadFailed: the configuration in the folder cannot be read.

    """
    options = model.options_as(PocketOptions)
    if options.config is not None:
        config = library_config(options.config)
        places = named_places(model.source, options, options.config)
        first = LANGUAGES[config_language(options.config)][1]
    else:
        folder = folder_of(model.source, options.revision)
        if folder is None:
            return None
        config = read_config(folder)
        places = _own_places(model.source, options.revision, config)
        first = None
    found = [
        (folder_of(place.source, place.revision), place.path)
        for place in (places.weights, places.tokenizer, places.voices)
    ]
    paths = [folder / path for folder, path in found if folder is not None]
    if len(paths) < len(found):
        return None
    weights, tokenizer, voices = paths
    states = sorted(voices.glob("*.safetensors"), key=lambda path: (path.stem != first, path.stem))
    return PocketFiles(config, weights, tokenizer, {path.stem: path for path in states})


def _own_places(source: str, revision: str | None, config: Mapping[str, Any]) -> Places:
    # An address of a hub is read as a name in the folder, as nothing is fetched by the library.
    named = (config["weights_path"], config["flow_lm"]["lookup_table"]["tokenizer_path"])
    weights, tokenizer = (PurePosixPath(each.partition("@")[0]).name for each in named)
    return Places(*(Place(source, path, revision) for path in (weights, tokenizer, VOICES_FOLDER)))


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration in the folder of a model.

    Raises:
        LoadFailed: there is none, or it names no weights or no tokenizer.

    """
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        for path in (config["weights_path"], config["flow_lm"]["lookup_table"]["tokenizer_path"]):
            if not isinstance(path, str):
                raise ValueError(f"{path!r} is no path")
    except FileNotFoundError:
        raise LoadFailed(
            f"{folder.name}: no {CONFIG_FILE}; without it the option config is wanted, such as"
            " config: english"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise LoadFailed(f"{folder.name}: cannot read {CONFIG_FILE}: {reason(error)}") from error
    found: Mapping[str, Any] = config
    return found


@functools.cache
def library_config(name: str) -> Mapping[str, Any]:
    """The library's configuration of that name. The library is not imported.

    Raises:
        LoadFailed: there is none, or the library is not installed.

    """
    known = config_names()
    if name not in known:
        raise LoadFailed(f"pocket-tts has no model {name!r}; there is {', '.join(known)}")
    text = (_configs() / f"{name}.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Any] = yaml.safe_load(text)
    return found


def config_names() -> Sequence[str]:
    """The names of the models that the library knows, of languages that are known here.

    Raises:
        LoadFailed: the library is not installed.

    """
    names = (path.stem for path in _configs().glob("*.yaml"))
    return sorted(name for name in names if config_language(name) in LANGUAGES)


def config_language(name: str) -> str:
    """`english` of `english_2026-10`."""
    return name.partition("_")[0]


def _configs() -> Path:
    spec = find_spec("pocket_tts")
    if spec is None or not spec.submodule_search_locations:
        raise LoadFailed("pocket-tts is not installed: pip install 'roundhouse[pocket-tts]'")
    return Path(spec.submodule_search_locations[0]) / "config"


def _address(text: str) -> tuple[str, str, str | None]:
    """Repository, path and revision of an address."""
    match = _ADDRESS.fullmatch(text)
    assert match is not None, text  # of the library's own, which a test reads
    return match["repo"], match["path"], match["revision"]
