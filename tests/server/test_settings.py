from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import SecretStr

from engine.errors import ConfigError
from server.keys.record import Key
from server.keys.store import KeyStore
from server.settings import STARTER_CONFIG, ServerSettings, config_path, is_loopback, load_settings

CONFIG = """
engine: {memory: 1GiB}
server: {port: 9000, api_keys: [from-file]}
models: [{id: small, runtime: fake, source: none}]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def secrets(keys: tuple[SecretStr, ...]) -> list[str]:
    return [key.get_secret_value() for key in keys]


def test_file_then_environment_then_command_line(config: Path) -> None:
    environ = {"ROUNDHOUSE_PORT": "9001", "ROUNDHOUSE_LOG_LEVEL": "debug", "HOME": "/"}
    engine_config, settings = load_settings(config, environ, {"log_level": "error"})
    assert engine_config.models[0].id == "small"
    assert settings.port == 9001
    assert settings.log_level == "error"
    assert secrets(settings.api_keys) == ["from-file"]


def test_keys_of_a_variable_are_separated_by_commas(config: Path) -> None:
    _, settings = load_settings(
        config, {"ROUNDHOUSE_API_KEYS": " a, b ,", "ROUNDHOUSE_ADMIN_KEYS": "c"}
    )
    assert secrets(settings.api_keys) == ["a", "b"]
    assert secrets(settings.admin_keys) == ["c"]


def test_keys_of_a_file_come_on_top(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n one # of Anna\nadmin:two\nadmin: three\n")
    path.chmod(0o600)
    _, settings = load_settings(config, {"ROUNDHOUSE_API_KEYS_FILE": str(path)})
    assert secrets(settings.api_keys) == ["from-file", "one"]
    assert secrets(settings.admin_keys) == ["two", "three"]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_key_file_that_others_can_read(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = tmp_path / "keys"
    path.write_text("one")
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        load_settings(config, {"ROUNDHOUSE_API_KEYS_FILE": str(path)})
    assert ("chmod 600" in caplog.text) is warned


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "two words\n", "admin:\n"])
def test_key_file_without_a_usable_key(config: Path, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"server\.(api_keys_file|admin_keys|api_keys)"):
        load_settings(config, {"ROUNDHOUSE_API_KEYS_FILE": str(path)})


@pytest.mark.parametrize("key", ["has space", "", "clé", "line\nbreak"])
def test_a_wrong_key_is_not_repeated_in_the_error(config: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.admin_keys") as caught:
        load_settings(config, {}, {"admin_keys": [key]})
    assert not key or key not in caught.value.message


def test_keys_are_hidden() -> None:
    settings = ServerSettings(api_keys=(SecretStr("hush-1"),), admin_keys=(SecretStr("hush-2"),))
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hush" not in text


class TestExposure:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text("models: [{id: small, runtime: fake, source: none}]")
        return path

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu.example.com"])
    def test_beyond_loopback_needs_a_key(self, config: Path, host: str) -> None:
        with pytest.raises(ConfigError, match=r"server\.host.*server\.api_keys.*--insecure"):
            load_settings(config, {}, {"host": host})

    @pytest.mark.parametrize(
        "overrides",
        [
            {"host": "127.0.0.1"},
            {"host": "::1"},
            {"host": "localhost"},
            {"host": "0.0.0.0", "api_keys": ["k"]},
            {"host": "0.0.0.0", "admin_keys": ["k"]},
            {"host": "0.0.0.0", "insecure": True},
        ],
    )
    def test_allowed(self, config: Path, overrides: dict[str, object]) -> None:
        load_settings(config, {}, overrides)

    def test_a_key_file_will_do(self, config: Path, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.write_text("one")
        keys.chmod(0o600)
        load_settings(config, {}, {"host": "0.0.0.0", "api_keys_file": keys})


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"prot": 1}, r"server\.prot: unknown key \(did you mean port\?\)"),
        ({"port": 70_000}, r"server\.port"),
        ({"drain_s": "forever"}, r"server\.drain_s"),
        ({"max_body_bytes": "many"}, r"server\.max_body_bytes"),
        ({"log_level": "loud"}, r"server\.log_level"),
    ],
)
def test_wrong_key_is_named(config: Path, overrides: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_settings(config, {}, overrides)


def test_units(config: Path) -> None:
    _, settings = load_settings(config, {}, {"drain_s": "2m", "max_body_bytes": "1MiB"})
    assert (settings.drain_s, settings.max_body_bytes) == (120.0, 2**20)


def test_what_is_served_without_a_configuration() -> None:
    engine_config, settings = load_settings(None, {})
    assert all(model.source.startswith("starter:") for model in engine_config.models)
    assert is_loopback(settings.host)


def test_which_file_is_read(tmp_path: Path) -> None:
    named = tmp_path / "named.yaml"
    environ = {"ROUNDHOUSE_CONFIG": "/from/environment.yaml"}
    assert config_path(named, environ) == named
    assert config_path(None, environ) == Path("/from/environment.yaml")
    assert config_path(None, {}) == STARTER_CONFIG


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "LOCALHOST", "localhost."])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "localhost.example", "127.0.0.1.example"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("written", "held"),
    [
        ("off", "off"),  # which YAML takes for false
        ('"off"', "off"),
        ("on", "sqlite"),
        ("sqlite", "sqlite"),
        ("./off", "./off"),
        ("/var/cache/answers.sqlite3", "/var/cache/answers.sqlite3"),
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("rediss://user:word@redis.example.com", "rediss://user:word@redis.example.com"),
    ],
)
def test_where_the_response_cache_is(config: Path, written: str, held: str) -> None:
    config.write_text(f"{CONFIG.replace('port: 9000', f'response_cache: {written}')}")
    assert load_settings(config, {})[1].response_cache == held


@pytest.mark.parametrize("text", ["off", "Off", "false"])
def test_a_variable_turns_the_response_cache_off(config: Path, text: str) -> None:
    config.write_text(CONFIG.replace("port: 9000", "response_cache: sqlite"))
    _, settings = load_settings(config, {"ROUNDHOUSE_RESPONSE_CACHE": text})
    assert settings.response_cache == "off"


@pytest.mark.parametrize(
    "text",
    [
        "", "redis://", "memcached://:secret-word@localhost", "redis://:secret-word@host/name",
        "redis://:secret-word@host:port/0", "redis://a:secret-word/1@host", "redis://[secret-word",
    ],
)  # fmt: skip
def test_a_place_for_the_response_cache_that_is_none(config: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(config, {"ROUNDHOUSE_RESPONSE_CACHE": text})
    assert caught.value.message.startswith("server.response_cache: ")
    assert "secret-word" not in caught.value.message


def test_the_password_of_redis_is_not_shown() -> None:
    settings = ServerSettings(response_cache="redis://:secret-word@localhost/0")
    assert "secret-word" not in f"{settings!r} {settings}"


def named(settings: ServerSettings) -> list[tuple[str, bool]]:
    return [(key.name, key.admin) for key in settings.configured_keys]


def test_keys_have_names(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(
        "one\nalice = two  # hers\nadmin: root = three\nkey=with=signs\nadmin:four\nalice = five\n"
    )
    path.chmod(0o600)
    environ = {"ROUNDHOUSE_API_KEYS_FILE": str(path), "ROUNDHOUSE_ADMIN_KEYS": "a,b"}
    _, settings = load_settings(config, environ)
    assert secrets(settings.api_keys) == ["from-file", "one", "two", "key=with=signs", "five"]
    assert secrets(settings.admin_keys) == ["a", "b", "three", "four"]
    assert named(settings) == [
        ("config-1", False),
        ("file-1", False),
        ("alice", False),
        ("file-4", False),
        ("alice", False),
        ("config-admin-1", True),
        ("config-admin-2", True),
        ("root", True),
        ("file-5", True),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config-1 = hush", "line 1: what is before = is not a name"),
        ("hu/sh = hush", "line 1: what is before = is not a name"),
        ("alice = admin:hush", "line 1: admin: comes before the name"),
        ("alice hush", "printable ASCII without spaces"),
        ("alice =hush", "printable ASCII without spaces"),
    ],
)
def test_a_wrong_line_of_the_file_is_told_without_the_key(
    config: Path, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(config, {"ROUNDHOUSE_API_KEYS_FILE": str(path)})
    assert "hush" not in str(caught.value)


def test_keys_of_the_store_are_keys(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "without-keys.yaml"
    path.write_text(config.read_text().replace(", api_keys: [from-file]", ""))
    environ = {"ROUNDHOUSE_DATA_DIR": str(tmp_path / "data")}
    with pytest.raises(ConfigError, match=r"roundhouse keys add NAME"):
        load_settings(path, environ, {"host": "0.0.0.0"})
    assert not (tmp_path / "data").exists()
    store = KeyStore(tmp_path / "data")
    store.add(Key(name="alice", digest=b"1", created_at=1, revoked_at=2))
    _, settings = load_settings(path, environ, {"host": "0.0.0.0"})
    assert settings.has_keys and not settings.has_admin_keys
    store.add(Key(name="root", digest=b"2", created_at=1, admin=True))
    assert not settings.has_admin_keys  # it is read once
    _, settings = load_settings(path, environ, {"host": "0.0.0.0"})
    assert settings.has_admin_keys
    store.close()
