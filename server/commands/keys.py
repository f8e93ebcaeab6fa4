"""`roundhouse keys`: makes, lists, changes and revokes the keys of the store.

The commands work on the file of this machine, with a running server or without one. A running
server takes a change up within a second.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from engine.config import EngineConfig
from engine.errors import ConfigError, Conflict, EngineError
from engine.units import parse_duration
from server.commands.default_config import configuration
from server.commands.options import ConfigFile
from server.commands.terminal import exit_with, new_table, out, print_line, print_note
from server.exit_codes import BAD_CONFIG, FAILED
from server.keys.endpoints import FAMILIES
from server.keys.keyring import names_of
from server.keys.record import ANY, Key, digest_of, new_secret
from server.settings import read_engine_config

if TYPE_CHECKING:
    from server.keys.store import KeyStore

T = TypeVar("T")

NONE = "none"
NO_LIMIT = -1
"""What an option without a limit is read as: None is an option that was not given."""

commands = typer.Typer(
    no_args_is_help=True,
    help="Make, list, change and revoke API keys, each with its own scopes, limits and budget.",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(commands, name="keys")


def _count(text: str) -> int:
    if text == NONE:
        return NO_LIMIT
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a whole number of 1 or more, or {NONE}")
    return int(text)


def _dollars(text: str) -> float:
    if text == NONE:
        return NO_LIMIT
    try:
        dollars = float(text.removeprefix("$"))
    except ValueError:
        dollars = math.nan
    if not 0 <= dollars < math.inf:
        raise typer.BadParameter(f"{text!r} is not an amount of dollars, or {NONE}")
    return dollars


def _moment(text: str) -> int:
    """Unix seconds of a date, or of now and a duration."""
    if text in (NONE, "never"):
        return NO_LIMIT
    try:
        moment = time.time() + parse_duration(text)
    except ValueError:
        try:
            named = datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is neither a time from now, as 30d or 12h, nor a date, as 2030-01-31,"
                " nor never"
            ) from None
        moment = (named if named.tzinfo else named.replace(tzinfo=UTC)).timestamp()
    if moment == math.inf:
        return NO_LIMIT
    if not time.time() < moment < 2**40:
        raise typer.BadParameter(f"{text!r} is not a time to come")
    return math.ceil(moment)


Name = Annotated[str, typer.Argument(help="Whose key it is, or what it is for.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A model or route that it may use, by id or alias, or with *, as 'qwen*'."
        " May be given several times. By default all.",
    ),
]
Endpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        help=f"A family of endpoints that it may call: {', '.join(FAMILIES)}."
        " May be given several times. By default all.",
    ),
]
Tier = Annotated[str | None, typer.Option(help="A word that routes may ask for.")]
RequestsPerMinute = Annotated[
    int | None, typer.Option(parser=_count, metavar="N", help="Requests a minute, or none.")
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(parser=_count, metavar="N", help="Tokens a minute, read and written, or none."),
]
Concurrent = Annotated[
    int | None, typer.Option(parser=_count, metavar="N", help="Requests at once, or none.")
]
Day = Annotated[
    float | None, typer.Option(parser=_dollars, metavar="DOLLARS", help="Budget of a day, or none.")
]
Month = Annotated[
    float | None,
    typer.Option(parser=_dollars, metavar="DOLLARS", help="Budget of a calendar month, or none."),
]
WhenSpent = Annotated[
    str | None,
    typer.Option(help="refuse answers 429; free passes to models that cost nothing."),
]
Expires = Annotated[
    int | None,
    typer.Option(parser=_moment, metavar="TIME", help="30d, 12h, a date (UTC), or never."),
]


@commands.command()
def add(
    name: Name,
    model: Models = None,
    endpoint: Endpoints = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may also load, unload and pin models.")
    ] = False,
    tier: Tier = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    day: Day = None,
    month: Month = None,
    when_spent: WhenSpent = None,
    expires: Expires = None,
    config: ConfigFile = None,
) -> None:
    """Make a key and print it. It is shown only now: the store keeps its digest."""
    configured = _read(config)
    changes = _changes(
        configured, model=model, endpoint=endpoint, tier=tier,
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
        concurrent=concurrent, day=day, month=month, when_spent=when_spent, expires=expires,
    )  # fmt: skip
    secret = new_secret()

    def make(store: KeyStore) -> None:
        store.add(
            Key(
                name=name,
                digest=digest_of(secret),
                admin=admin,
                created_at=int(time.time()),
                **changes,
            )
        )

    _with_store(configured, make)
    print_line(secret)
    print_note("Keep it: it is not shown again.")


@commands.command("list")
def list_keys(
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    config: ConfigFile = None,
) -> None:
    """List the keys of the store. The keys of the configuration are not among them."""
    from server.keys.store import stored_keys

    try:
        keys = stored_keys(_read(config).data_dir)
    except ConfigError as error:
        raise exit_with(error.message, FAILED) from error
    now = time.time()
    if json_output:
        print_line(json.dumps([_document(key, now) for key in keys], indent=2))
        return
    table = new_table(
        "name", "state", "tier", "models", "endpoints", "limits", "budget", "last used", "expires"
    )
    for key in keys:
        table.add_row(
            escape(key.name) + (" (admin)" if key.admin else ""),
            key.state(now),
            escape(key.tier),
            escape(", ".join(key.models)),
            ", ".join(key.endpoints),
            _limits(key),
            _budget(key),
            _date(key.last_used_at) or "never",
            _date(key.expires_at) or "never",
        )
    out.print(table)


@commands.command("set")
def set_key(
    name: Name,
    model: Models = None,
    endpoint: Endpoints = None,
    admin: Annotated[
        bool | None, typer.Option("--admin/--no-admin", help="It may load, unload and pin models.")
    ] = None,
    tier: Tier = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    day: Day = None,
    month: Month = None,
    when_spent: WhenSpent = None,
    expires: Expires = None,
    config: ConfigFile = None,
) -> None:
    """Change what a key may do. What no option names stays as it is; the key itself too."""
    configured = _read(config)
    changes = _changes(
        configured, model=model, endpoint=endpoint, tier=tier,
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
        concurrent=concurrent, day=day, month=month, when_spent=when_spent, expires=expires,
    )  # fmt: skip
    if admin is not None:
        changes["admin"] = admin
    if not changes:
        raise exit_with("name what to change: roundhouse keys set --help", BAD_CONFIG)
    _with_store(configured, lambda store: store.change(name, lambda key: replace(key, **changes)))


@commands.command()
def rotate(name: Name, config: ConfigFile = None) -> None:
    """Give a key a new secret and print that. The former one is no longer accepted."""
    secret = new_secret()

    def turn(key: Key) -> Key:
        if key.revoked_at is not None:
            raise Conflict(f"The key {name!r} is revoked.")
        return replace(key, digest=digest_of(secret))

    _with_store(_read(config), lambda store: store.change(name, turn))
    print_line(secret)
    print_note("Keep it: it is not shown again.")


@commands.command()
def revoke(name: Name, config: ConfigFile = None) -> None:
    """Accept a key no longer. Its name stays taken, so that what it used stays its own."""
    now = int(time.time())

    def end(key: Key) -> Key:
        return key if key.revoked_at is not None else replace(key, revoked_at=now)

    _with_store(_read(config), lambda store: store.change(name, end))


@commands.command()
def remove(name: Name, config: ConfigFile = None) -> None:
    """Forget a key, also a revoked one. Its name is free again."""
    _with_store(_read(config), lambda store: store.remove(name))


def _read(config: Path | None) -> EngineConfig:
    try:
        choice = configuration(config, os.environ)
        return read_engine_config(choice.path, os.environ)
    except ConfigError as error:
        raise exit_with(error.message, BAD_CONFIG) from error


def _with_store(config: EngineConfig, act: Callable[[KeyStore], T]) -> T:
    """Do something with the store of the configuration. An error ends the command."""
    from server.keys.store import KeyStore

    try:
        store = KeyStore(config.data_dir)
        try:
            return act(store)
        finally:
            store.close()
    except ConfigError as error:
        raise exit_with(error.message, BAD_CONFIG) from error
    except EngineError as error:
        raise exit_with(error.message, FAILED) from error


def _changes(
    config: EngineConfig,
    *,
    model: list[str] | None,
    endpoint: list[str] | None,
    expires: int | None,
    **others: Any,
) -> dict[str, Any]:
    """The fields of a key that the options name."""
    changes = {name: value for name, value in others.items() if value is not None}
    if model:
        groups = [*(each.names for each in config.models), *((r.id,) for r in config.routes)]
        for scope in model:
            if scope != ANY and not names_of(scope, groups):
                raise exit_with(f"--model: no model or route is called {scope!r}", BAD_CONFIG)
        changes["models"] = tuple(dict.fromkeys(model))
    if endpoint:
        changes["endpoints"] = tuple(dict.fromkeys(endpoint))
    if expires is not None:
        changes["expires_at"] = expires
    return {name: None if value == NO_LIMIT else value for name, value in changes.items()}


def _document(key: Key, now: float) -> dict[str, Any]:
    """A key for programs. Times are Unix seconds."""
    document = asdict(key)
    del document["digest"]
    return {**document, "state": key.state(now)}


def _limits(key: Key) -> str:
    limits = (
        (key.requests_per_minute, "requests/min"),
        (key.tokens_per_minute, "tokens/min"),
        (key.concurrent, "at once"),
    )
    return ", ".join(f"{limit} {what}" for limit, what in limits if limit is not None)


def _budget(key: Key) -> str:
    parts = [
        f"${dollars:g} a {period}"
        for dollars, period in ((key.day, "day"), (key.month, "month"))
        if dollars is not None
    ]
    return ", ".join(parts) + (f", then {key.when_spent}" if parts else "")


def _date(moment: int | None) -> str:
    if moment is None:
        return ""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")
