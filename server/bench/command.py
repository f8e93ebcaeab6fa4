"""The command `roundhouse bench`."""

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
from server.bench import launches, plot, report
from server.bench.errors import BadSetUp, BenchError
from server.bench.machine import describe, gpus
from server.bench.runner import Result, run, turn_count
from server.bench.scenarios import SCENARIOS
from server.bench.scenarios.scenario import Peer, Scenario, Settings
from server.bench.sides import Address, BareLibrary, Server, Side
from server.commands.terminal import leave
from server.settings import load_settings

BAD_SET_UP = 2
FAILED = 1
REFRESHES_PER_S = 2
"""Of the progress bar: each costs the clients a few milliseconds."""

ScenarioName = StrEnum("ScenarioName", {name: name for name in SCENARIOS})  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

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
        str | None, typer.Option(help="A running server; else ours is started for it.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ROUNDHOUSE_API_KEYS", help="A key; of several the first is used."),
    ] = None,
    against: Annotated[
        Peer | None, typer.Option(help="Start this too and measure both in turn.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model to ask for, as often as there are several.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The configuration with the models of started servers.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: an option of the models.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="OMP_NUM_THREADS of all sides that are started.")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Concurrent streams; may be repeated.")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of each prompt.")] = 16,
    rounds: Annotated[
        int, typer.Option(min=0, help="Requests of each stream in a turn; 0: as the scenario has.")
    ] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 600.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON, the table and the plot.")
    ] = None,
) -> None:
    """Measure a server, or ours and another in turn. Exits with 1 if any answer was an error."""
    request = Request(
        scenario=scenario.value,
        url=url,
        api_key=(api_key or "").split(",")[0].strip() or None,
        against=against,
        models=tuple(model or ()),
        config=config,
        overrides=tuple(set_ or ()),
        threads=threads,
        settings=Settings(tuple(streams or ()), output_tokens, prompt_words, rounds),
        repeats=repeats,
        timeout_s=timeout,
    )
    screen, complaints = Console(), Console(stderr=True)
    machine = describe()
    if threads is not None:
        machine["omp_num_threads"] = str(threads)
    command = shlex.join(["roundhouse", *sys.argv[1:]])
    try:
        result = _measure(request, complaints)
        paths = []
        if out is not None:
            paths = report.write(out, result, machine, command, repeats)
            paths += _plot(result, out, complaints)
    except (BadSetUp, ConfigError) as error:
        raise leave(str(error), BAD_SET_UP) from error
    except asyncio.CancelledError as error:
        raise typer.Exit(128 + signal.SIGTERM) from error
    except (BenchError, OSError) as error:
        raise leave(str(error), FAILED) from error
    screen.print(_table(result))
    for line in (*result.warnings(), *(f"written: {path}" for path in paths)):
        complaints.print(line, markup=False, highlight=False, soft_wrap=True)
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
        sides = _sides(request, scenario, names, Path(folder))
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
                scenario.name, total=turn_count(scenario, len(sides), request.repeats)
            )
            first = True

            def on_turn(what: str) -> None:
                nonlocal first
                if not what.endswith(": starting"):
                    progress.advance(task, 0 if first else 1)
                    first = False
                progress.update(task, description=escape(what))

            return asyncio.run(_run(scenario, sides, request.repeats, on_turn))


async def _run(
    scenario: Scenario, sides: Sequence[Side], repeats: int, on_turn: Callable[[str], None]
) -> Result:
    """As `run`, ended in order by SIGTERM too: the started servers would else stay behind."""
    task = asyncio.current_task()
    assert task is not None  # a coroutine always runs in one
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await run(scenario, sides, repeats, on_turn)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _sides(request: Request, scenario: Scenario, names: Sequence[str], folder: Path) -> list[Side]:
    """The server at the address, or ours, and the peer if one is asked for."""
    if request.url is not None:
        return [Address(request.url, request.api_key, request.timeout_s)]
    config, _ = load_settings(request.config, os.environ)
    models = launches.choose_models(config, names, launches.read_overrides(request.overrides))
    environment = {} if request.threads is None else {"OMP_NUM_THREADS": str(request.threads)}
    set_up = launches.SetUp(
        folder,
        models,
        launches.fetch(models, folder / "cache"),
        environment,
        on_gpu=config.device != "cpu" and bool(gpus()),
        memory=scenario.memory,
    )
    set_up.write()
    sides: list[Side] = [Server(launches.ours(set_up), folder, request.timeout_s)]
    match request.against:
        case Peer.VLLM_SERVE:
            sides.append(Server(launches.vllm_serve(set_up), folder, request.timeout_s))
        case Peer.TRANSFORMERS_SERVE:
            sides.append(Server(launches.transformers_serve(set_up), folder, request.timeout_s))
        case Peer.BARE:
            sides.append(BareLibrary(launches.bare(set_up), folder))
    return sides


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
