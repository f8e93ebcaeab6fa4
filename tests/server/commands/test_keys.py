"""`roundhouse keys`, as a person and as a program use it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.commands import cli, terminal
from server.keys.record import Key, digest_of
from server.keys.store import stored_keys

CONFIG = """
engine: {{device: cpu, state_dir: {folder}, data_dir: {folder}/data}}
models:
  - {{id: small, runtime: fake, source: none, aliases: [gpt-4o]}}
  - {{id: other, runtime: fake, source: none}}
routes:
  - {{id: auto, choose: [small]}}
"""


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.out, "width", 250)


class Keys:
    """The command with a configuration of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data"
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(folder=folder))
        self._runner = CliRunner(env={"ROUNDHOUSE_CONFIG": str(config), "COLUMNS": "250"})

    def __call__(self, *arguments: str, status: int = 0) -> Result:
        result = self._runner.invoke(cli.app, ["keys", *arguments])
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        return result

    def add(self, *arguments: str) -> str:
        return self("add", *arguments).stdout.strip()

    def listed(self) -> list[dict[str, Any]]:
        documents: list[dict[str, Any]] = json.loads(self("list", "--json").stdout)
        return documents

    def only(self) -> Key:
        (key,) = stored_keys(self.folder)
        return key


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def test_a_key_is_printed_once_and_alone(keys: Keys) -> None:
    result = keys("add", "alice")
    secret = result.stdout.strip()
    assert secret.startswith("sk-rh-") and result.stdout == f"{secret}\n"
    assert "not shown again" in result.stderr
    key = keys.only()
    assert (key.name, key.digest, key.models, key.admin) == (
        "alice", digest_of(secret), ("*",), False,
    )  # fmt: skip
    assert secret not in keys("list").output + keys("list", "--json").output


def test_all_that_may_be_given(keys: Keys) -> None:
    before = time.time()
    keys.add(
        "alice", "--model", "gpt-4o", "--model", "auto", "--endpoint", "chat", "--tier", "gold",
        "--requests-per-minute", "60", "--tokens-per-minute", "10000", "--concurrent", "4",
        "--day", "1.5", "--month", "$10", "--when-spent", "free", "--expires", "30d",
    )  # fmt: skip
    (document,) = keys.listed()
    expires_in = document.pop("expires_at") - before
    created_at = document.pop("created_at")
    assert 30 * 86_400 <= expires_in < 30 * 86_400 + 60
    assert before - 1 <= created_at < before + 60
    assert document == {
        "name": "alice",
        "tier": "gold",
        "admin": False,
        "models": ["gpt-4o", "auto"],
        "endpoints": ["chat"],
        "requests_per_minute": 60,
        "tokens_per_minute": 10_000,
        "concurrent": 4,
        "day": 1.5,
        "month": 10.0,
        "when_spent": "free",
        "last_used_at": None,
        "revoked_at": None,
        "state": "active",
    }
    shown = keys("list").stdout
    for text in (
        "60 requests/min, 10000 tokens/min, 4 at once",
        "$1.5 a day, $10 a month, then free",
        "gpt-4o, auto",
        "gold",
        "never",
    ):
        assert text in shown


def test_set_changes_what_is_named_and_nothing_else(keys: Keys) -> None:
    secret = keys.add("alice", "--concurrent", "4", "--month", "10", "--model", "small")
    keys("set", "alice", "--tier", "gold", "--concurrent", "none", "--month", "none")
    key = keys.only()
    assert (key.tier, key.concurrent, key.month, key.models) == ("gold", None, None, ("small",))
    assert key.digest == digest_of(secret)
    keys("set", "alice", "--model", "*", "--expires", "2090-01-31")
    assert (keys.only().models, keys.only().expires_at) == (("*",), 3_789_504_000)
    keys("set", "alice", "--admin", "--expires", "never")
    assert (keys.only().admin, keys.only().expires_at) == (True, None)
    assert "admin" in keys("set", "alice", "--model", "small", status=2).stderr
    assert "name what to change" in keys("set", "alice", status=2).stderr


def test_rotate_revoke_remove(keys: Keys) -> None:
    first = keys.add("alice", "--tier", "gold")
    second = keys("rotate", "alice").stdout.strip()
    assert first != second
    assert keys.only().digest == digest_of(second)
    assert keys.only().tier == "gold"
    keys("revoke", "alice")
    revoked_at = keys.only().revoked_at
    keys("revoke", "alice")
    assert keys.only().revoked_at == revoked_at is not None
    assert keys.listed()[0]["state"] == "revoked"
    assert "is revoked" in keys("rotate", "alice", status=1).stderr
    assert "There is a key 'alice' already." in keys("add", "alice", status=1).stderr
    keys("remove", "alice")
    assert keys.listed() == []
    keys.add("alice")


@pytest.mark.parametrize("command", ["set", "rotate", "revoke", "remove"])
def test_a_key_that_is_not_there(keys: Keys, command: str) -> None:
    more = ["--tier", "gold"] if command == "set" else []
    assert "There is no key 'bob'." in keys(command, "bob", *more, status=1).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nobody"], "--model: no model or route is called 'nobody'"),
        (["--model", "qwen*"], "--model: no model or route is called 'qwen*'"),
        (["--endpoint", "chats"], "endpoint: there is no 'chats'; there is chat, embeddings"),
        (["--requests-per-minute", "0"], "--requests-per-minute"),
        (["--tokens-per-minute", "many"], "--tokens-per-minute"),
        (["--concurrent", "-1"], "--concurrent"),
        (["--day", "-1"], "--day"),
        (["--month", "nan"], "--month"),
        (["--when-spent", "shrug"], "when_spent"),
        (["--expires", "tomorrow"], "--expires"),
        (["--expires", "2020-01-01"], "--expires"),
        (["--tier", "two words"], "tier"),
        (["--admin", "--model", "small"], "admin"),
    ],
)
def test_a_wrong_option_is_named(keys: Keys, options: list[str], message: str) -> None:
    error = " ".join(keys("add", "alice", *options, status=2).stderr.split())
    assert message in error
    assert stored_keys(keys.folder) == ()


def test_a_wrong_name_is_named(keys: Keys) -> None:
    assert "is not a name" in keys("add", "two words", status=2).stderr
    assert "of the configuration" in keys("add", "config-1", status=2).stderr


def test_a_listing_makes_no_file(keys: Keys) -> None:
    assert keys.listed() == []
    assert not keys.folder.exists()
