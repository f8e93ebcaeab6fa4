"""`roundhouse bench`."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.errors import ConfigError
from server.bench import plot, report, target_commands
from server.bench.errors import BadSetUp, BenchError
from server.bench.machine import describe, gpus
from server.bench.runner import Result, round_count, run
from server.bench.scenarios import SCENARIOS
from server.bench.scenarios.scenario import Peer, Scenario, Settings
from server.bench.set_up import SetUp, choose_models, fetch, read_overrides
from server.bench.targets import Address, BareLibrary, Server, Target
from server.commands.options import ApiKey, first_key
from server.commands.terminal import exit_with
from server.exit_codes import BAD_CONFIG, FAILED, TERMINATED
from server.settings import load_settings

REFRESHES_PER_S = 2
"""Refreshes of the progress bar. Each costs the clients a few milliseconds."""

ScenarioName = StrEnum("ScenarioName", {name: name for name in SCENARIOS})  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Request:
    """The options of the command line."""

    scenario: str
    url: str | None
    api_key: str | None
    against: Peer | None
    models: tuple[str, ...]
    config: Path | None
    overrides: tuple[str, ...]
    threads: int | None
    settings: Settings
    repeats: int
    timeout_s: float


def bench(
    scenario: Annotated[ScenarioName, typer.Argument(help="What to measure.")],
    url: Annotated[
        str | None, typer.Option(help="A running server. By default ours is started.")
    ] = None,
    api_key: ApiKey = None,
    against: Annotated[
        Peer | None, typer.Option(help="Start this too and measure both alternately.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model to request. Repeat it for each model.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The configuration that has the models.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: an option of the models.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="OMP_NUM_THREADS of each started target.")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Concurrent streams. May be repeated.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of each prompt.")] = 16,
    rounds: Annotated[
        int, typer.Option(min=0, help="Requests of each stream in a repeat. 0: scenario's default.")
    ] = 0,
    single_tokens: Annotated[
        bool, typer.Option("--single-tokens", help="Text: ask for an event with each token.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats for each target.")] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 600.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON, the table and the plot.")
    ] = None,
) -> None:
    """Measure a server, or ours and another alternately. Exits with 1 if any answer is an error."""
    request = Request(
        scenario=scenario.value,
        url=url,
        api_key=first_key(api_key),
        against=against,
        models=tuple(model or ()),
        config=config,
        overrides=tuple(set_ or ()),
        threads=threads,
        settings=Settings(tuple(streams or ()), output_tokens, prompt_words, rounds, single_tokens),
        repeats=repeats,
        timeout_s=timeout,
    )
    screen, messages = Console(), Console(stderr=True)
    machine = describe()
    if threads is not None:
        machine["omp_num_threads"] = str(threads)
    command = shlex.join(["roundhouse", *sys.argv[1:]])
    try:
        result = _measure(request, messages)
        paths = []
        if out is not None:
            paths = report.write(out, result, machine, command, repeats)
            paths += _plot(result, out, messages)
    except (BadSetUp, ConfigError) as error:
        raise exit_with(str(error), BAD_CONFIG) from error
    except asyncio.CancelledError as error:
        raise typer.Exit(TERMINATED) from error
    except (BenchError, OSError) as error:
        raise exit_with(str(error), FAILED) from error
    screen.print(_table(result))
    for line in (*result.warnings(), *(f"written: {path}" for path in paths)):
        messages.print(line, markup=False, highlight=False, soft_wrap=True)
    if result.errors:
        raise typer.Exit(FAILED)


def _measure(request: Request, screen: Console) -> Result:
    kind = SCENARIOS[request.scenario]
    if request.against is not None and request.against not in kind.peers:
        can = ", ".join(sorted(kind.peers)) or "nothing"
        raise BadSetUp(f"{kind.name} can be measured against {can}")
    if request.url is not None and request.against is not None:
        raise BadSetUp("--against starts both servers; leave --url out")
    names = request.models or kind.models
    if len(names) != len(kind.models):
        raise BadSetUp(f"{kind.name} asks {len(kind.models)} models; give --model as often")
    scenario = kind(names, request.settings)
    with tempfile.TemporaryDirectory(prefix="roundhouse-bench-") as folder:
        targets = _targets(request, scenario, names, Path(folder))
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=screen,
            transient=True,
            refresh_per_second=REFRESHES_PER_S,
        )
        with progress:
            task = progress.add_task(
                scenario.name, total=round_count(scenario, len(targets), request.repeats)
            )
            first = True

            def on_round(what: str) -> None:
                nonlocal first
                if not what.endswith(": starting"):
                    progress.advance(task, 0 if first else 1)
                    first = False
                progress.update(task, description=escape(what))

            return asyncio.run(_run(scenario, targets, request.repeats, on_round))


async def _run(
    scenario: Scenario, targets: Sequence[Target], repeats: int, on_round: Callable[[str], None]
) -> Result:
    """As `run`; SIGTERM too ends it in order. Otherwise the started servers would stay behind."""
    task = asyncio.current_task()
    assert task is not None  # a coroutine always runs in one
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await run(scenario, targets, repeats, on_round)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _targets(
    request: Request, scenario: Scenario, names: Sequence[str], folder: Path
) -> list[Target]:
    """The server at the URL, or ours; and the peer if the command line names one."""
    if request.url is not None:
        return [Address(request.url, request.api_key, request.timeout_s)]
    config, _ = load_settings(request.config, os.environ)
    models = choose_models(config, names, read_overrides(request.overrides))
    environment = {} if request.threads is None else {"OMP_NUM_THREADS": str(request.threads)}
    set_up = SetUp(
        folder,
        models,
        fetch(models, folder / "cache"),
        environment,
        on_gpu=config.device != "cpu" and bool(gpus()),
        memory=scenario.memory,
    )
    set_up.write()
    targets: list[Target] = [Server(target_commands.ours(set_up), folder, request.timeout_s)]
    match request.against:
        case Peer.VLLM_SERVE:
            targets.append(Server(target_commands.vllm_serve(set_up), folder, request.timeout_s))
        case Peer.TRANSFORMERS_SERVE:
            targets.append(
                Server(target_commands.transformers_serve(set_up), folder, request.timeout_s)
            )
        case Peer.BARE:
            targets.append(BareLibrary(target_commands.bare(set_up), folder))
    return targets


def _table(result: Result) -> Table:
    head, rows = report.table(result)
    table = Table(*map(escape, head))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _plot(result: Result, folder: Path, screen: Console) -> list[Path]:
    path = folder / f"{result.scenario.name}.png"
    try:
        plot.draw(result, path)
    except ImportError:
        screen.print("no plot: matplotlib is not installed", highlight=False)
        return []
    return [path]
