"""The commands that fetch, list, remove and add models: `pull`, `ls`, `rm`, `prune`, `add`.

They work on the files of this machine, without a running server.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from engine.config import ENV_CONFIG, EngineConfig, ModelConfig, engine_config, user_dir
from engine.errors import ConfigError, EngineError, LoadFailed, ModelNotFound
from engine.files.source import Source
from engine.runtimes.registry import RUNTIMES
from engine.section import parse_section
from engine.units import format_size
from server.commands.default_config import configuration
from server.commands.options import ConfigFile
from server.commands.terminal import (
    err,
    exit_with,
    new_table,
    out,
    print_error,
    print_line,
    print_note,
)
from server.exit_codes import BAD_CONFIG, FAILED, INTERRUPTED
from server.settings import read_engine_config

if TYPE_CHECKING:
    # They import numpy, and the other commands need not wait for that.
    from engine.catalog.model_files import Files
    from engine.files.hub.fetch import FetchProgress
    from engine.files.hub.listing import Listing
    from engine.files.hub.selection import HubSource

DAY_S = 86_400.0

AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Download pickled weights if there are no safetensors. A pickle can hold code.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (pull, ls, rm, prune, add):
        app.command()(command)


def pull(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models of the configuration, by id or alias, or owner/name of the hub."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every model of the configuration.")] = False,
    config: ConfigFile = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Bring the files of models to this disk, so that their first request need not wait for that.

    It downloads what comes from the hub, and builds samples and starters. What is here already is
    left as it is. A download that was stopped goes on where it stopped. Without --config it reads
    the configuration that `serve` would take.
    """
    from engine.catalog.downloads import built_sources_of, sources_of

    configured = _read(config)
    if bool(models) is every:
        raise exit_with("name the models to pull, or --all", BAD_CONFIG)
    names = models or [model.id for model in configured.models]
    failed = False
    for name in names:
        try:
            model, sources = _find(name, configured, allow_pickle)
            built = built_sources_of(model) if model else ()
            for each in built:
                _build(name, each, configured.cache_dir)
            if sources:
                _fetch(name, sources)
            elif not built:
                assert model is not None
                print_line(f"{name}: nothing to fetch, its files are in {model.source}")
        except EngineError as error:
            failed = True
            print_error(f"{name}: {error.message}")
        except KeyboardInterrupt:
            raise exit_with("stopped; the next pull goes on from here", INTERRUPTED) from None
    if every and not any(sources_of(model) for model in configured.models):
        print_line("no configured model comes from a hub")
    if failed:
        raise typer.Exit(FAILED)


def ls(
    config: ConfigFile = None,
    every: Annotated[bool, typer.Option("--all", help="Also the rest of the hub's cache.")] = False,
) -> None:
    """Show where the files of the configured models are, and their sizes."""
    from engine.catalog.model_files import files_of, other_repos

    configured = _read(config)
    table = new_table("model", "source", "here", "size", "last used", "where")
    counted: dict[Path, int] = {}
    for model in configured.models:
        for number, each in enumerate(files_of(model, configured)):
            _row(table, "" if number else model.id, each, counted)
    for each in other_repos(configured) if every else ():
        _row(table, "(none)", each, counted)
    out.print(table)
    out.print(f"{format_size(sum(counted.values()))} together", highlight=False)


def rm(
    model: Annotated[str, typer.Argument(help="Id of the configuration, or owner/name.")],
    config: ConfigFile = None,
    yes: Yes = False,
) -> None:
    """Delete the files of a model that came from a hub."""
    from engine.catalog.model_files import other_repos, removable

    configured = _read(config)
    try:
        try:
            found = removable(configured.find(model), configured)
        except ModelNotFound:
            found = tuple(each for each in _every_repo(configured) if each.source == model)
            found += tuple(each for each in other_repos(configured) if each.source == model)
            found = found[:1]
    except EngineError as error:
        raise exit_with(error.message, FAILED) from error
    if not found:
        raise exit_with(f"nothing of {model} is on this disk", FAILED)
    _remove(found, yes=yes)


def prune(
    keep_days: Annotated[
        float, typer.Option(min=0, help="Keep what was used in the last N days.")
    ] = 30.0,
    config: ConfigFile = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Also models of the hub's cache that are not configured."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be deleted.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Delete fetched files that were not used for long. Shows them first, and asks."""
    from engine.catalog.model_files import unused_repos

    configured = _read(config)
    found = unused_repos(configured, time.time() - keep_days * DAY_S, unconfigured=every)
    if not found:
        print_line(f"everything was used in the last {keep_days:g} days")
        return
    if dry_run:
        _list(found)
        return
    _remove(found, yes=yes)


def add(
    source: Annotated[str, typer.Argument(help="owner/name of the hub, a folder, or a GGUF file.")],
    config: ConfigFile = None,
    model_id: Annotated[
        str | None,
        typer.Option("--id", help="The name in requests. By default that of the source."),
    ] = None,
    fetch: Annotated[bool, typer.Option("--pull", help="Download it too.")] = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write an entry for a model of the hub, or of a folder, into the configuration file.

    A GGUF file is converted first, which may take minutes. Ollama's files count as such.
    """
    from engine.catalog.config_file import replace_text, with_model
    from engine.catalog.downloads import sources_of
    from engine.catalog.recognition import free_id, recognise, weight_bytes
    from engine.files.hub.listing import list_folder, list_repo

    named = config or os.environ.get(ENV_CONFIG)
    if not named:
        raise exit_with("name the file to write to with --config or ROUNDHOUSE_CONFIG", BAD_CONFIG)
    path = Path(named)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        taken = frozenset(_names(text))
        if source.endswith(".gguf") or Source(source).folder.is_file():
            cache_dir = read_engine_config(path, os.environ).cache_dir if text.strip() else None
            source = str(
                _converted(Source(source).folder, cache_dir or user_dir("XDG_CACHE_HOME", ".cache"))
            )
        if Source(source).is_path or Source(source).folder.is_dir():
            listing = list_folder(Source(source).folder)
        else:
            listing = list_repo(source)
        entry = recognise(listing).entry(model_id or free_id(listing.repo, taken), listing.repo)
        model = parse_section(ModelConfig, entry, f"models[{entry['id']}]", RUNTIMES)
        nbytes = weight_bytes(listing, model) if not allow_pickle else 0
        changed = with_model(text, entry)
        _check(changed)
        if fetch and listing.folder is None:
            # First, as a configuration must not name a model that cannot be fetched.
            _fetch(model.id, sources_of(model, allow_pickle=allow_pickle))
        replace_text(path, changed)
    except (ConfigError, OSError) as error:
        raise exit_with(f"{path}: {error}", BAD_CONFIG) from error
    except EngineError as error:
        raise exit_with(error.message, FAILED) from error
    except KeyboardInterrupt:
        raise exit_with("stopped; nothing was added", INTERRUPTED) from None
    size = f", {format_size(nbytes)}" if nbytes else ""
    print_line(f"added {model.id} to {path}: {model.runtime}, {model.task}{size}")
    out.print(yaml.safe_dump([entry], sort_keys=False), markup=False, highlight=False, end="")


def _converted(file: Path, cache_dir: Path) -> Path:
    """The folder that a GGUF file is converted to."""
    from engine.conversion.gguf import add_gguf, has_chat_template

    folder = add_gguf(file.resolve(), cache_dir, print_note)
    if not has_chat_template(folder):
        print_note(
            f"{file.name} has no chat template, so the model takes /v1/completions only. For"
            f" conversations put chat_template.jinja of the original into {folder}"
        )
    return folder


def _read(config: Path | None) -> EngineConfig:
    try:
        choice = configuration(config, os.environ)
        if choice.reason:
            print_note(f"configuration: {choice.path} ({choice.reason})")
        return read_engine_config(choice.path, os.environ)
    except ConfigError as error:
        raise exit_with(error.message, BAD_CONFIG) from error


def _find(
    name: str, config: EngineConfig, allow_pickle: bool
) -> tuple[ModelConfig | None, Sequence[HubSource]]:
    """The repositories of a configured model, or the repository with this name."""
    from engine.catalog.downloads import sources_of

    try:
        model = config.find(name)
        return model, sources_of(model, allow_pickle=allow_pickle)
    except ModelNotFound:
        if "/" not in name:
            raise
    return None, _unconfigured(name, allow_pickle)


def _unconfigured(repo: str, allow_pickle: bool) -> Sequence[HubSource]:
    from engine.catalog.downloads import sources_of
    from engine.catalog.recognition import recognise
    from engine.files.hub.listing import list_repo
    from engine.files.hub.selection import HubSource
    from engine.model_folder import WANTED_FILES

    listing: Listing = list_repo(repo)
    try:
        entry = recognise(listing).entry("pulled", repo)
    except LoadFailed as error:
        # A part of a pipeline, or a LoRA: not a model of its own.
        print_error(f"{repo}: {error.message}; fetching its safetensors files")
        return (HubSource(repo, WANTED_FILES, allow_pickle=allow_pickle),)
    model = parse_section(ModelConfig, entry, "models", RUNTIMES)
    return sources_of(model, allow_pickle=allow_pickle)


def _build(name: str, source: str, cache_dir: Path) -> None:
    from engine.model_folder import local_folder, present_folder

    if present_folder(source, cache_dir) is None:
        print_note(f"{name}: building {source}")
    print_line(f"{name}: {source} is in {local_folder(source, cache_dir)}")


def _fetch(name: str, sources: Sequence[HubSource]) -> None:
    from engine.catalog.downloads import pull as pull_sources

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(escape(name), total=None)

        def tell(now: FetchProgress) -> None:
            progress.update(task, total=now.total_bytes, completed=now.done_bytes)

        folders = pull_sources(sources, tell, threading.Event())
    for source, folder in zip(sources, folders, strict=True):
        print_line(f"{name}: {source.repo} is in {folder}")


def _every_repo(config: EngineConfig) -> tuple[Files, ...]:
    from engine.catalog.model_files import files_of

    found = {each.source: each for model in config.models for each in files_of(model, config)}
    return tuple(each for each in found.values() if each.is_repo and each.path is not None)


def _row(table: Table, model_id: str, files: Files, counted: dict[Path, int]) -> None:
    here = "yes" if files.present else "no" if files.path is None else "in part"
    if files.path is not None:
        counted[files.path] = files.nbytes  # once, though several models may read it
    table.add_row(
        escape(model_id),
        escape(files.source),
        here,
        format_size(files.nbytes) if files.path else "",
        _day(files.last_used),
        escape(str(files.path or "")),
    )


def _day(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d", time.localtime(seconds))


def _list(found: Sequence[Files]) -> None:
    table = new_table("repository", "size", "last used", "models")
    for each in found:
        used, models = _day(each.last_used), ", ".join(each.models) or "(none)"
        table.add_row(escape(each.source), format_size(each.nbytes), used, escape(models))
    out.print(table)
    out.print(f"{format_size(sum(each.nbytes for each in found))} together", highlight=False)


def _remove(found: Sequence[Files], *, yes: bool) -> None:
    from engine.catalog.model_files import remove

    _list(found)
    if not yes and not typer.confirm("Delete these?"):
        raise typer.Exit(FAILED)
    freed = 0
    for each in found:
        try:
            freed += remove(each.source)
        except (EngineError, OSError) as error:
            raise exit_with(f"cannot delete {each.source}: {error}", FAILED) from error
    print_line(f"{format_size(freed)} deleted")


def _names(text: str) -> list[str]:
    """The ids and aliases of a configuration. A new one has none."""
    if not text.strip():
        return []
    return [name for model in _check(text).models for name in model.names]


def _check(text: str) -> EngineConfig:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError("expected a mapping at the top")
    return engine_config(
        {"engine": document.get("engine") or {}, "models": document.get("models") or []},
        RUNTIMES,
    )
