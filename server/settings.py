"""The settings of the server: where it listens, its keys, its timeouts and its limits."""

from __future__ import annotations

import ipaddress
import logging
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, field_validator

from engine.config import ENV_CONFIG, EngineConfig, engine_config, engine_fields, read_sections
from engine.cost_config import CostConfig
from engine.errors import ConfigError, ModelNotFound
from engine.runtimes.registry import RUNTIMES
from engine.section import Section, parse_section
from engine.units import Duration, Size
from server.keys.keyring import ConfiguredKey
from server.keys.record import Key, check_name, digest_of
from server.vector_store_config import VectorStoreConfig

logger = logging.getLogger(__name__)

STARTER_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "starter.yaml"
"""The configuration without hardware requirements."""

ADMIN_MARK = "admin:"
_KEY = re.compile(r"[\x21-\x7e]+")
_NAMED_KEY = re.compile(r"(?P<name>\S+)\s+=\s+(?P<key>\S+)")
"""With spaces, as a key may have a `=` itself."""


def split_commas(value: Any) -> Any:
    """A tuple for a text with commas, or for null. Everything else is unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return () if value is None else value


CACHE_OFF = "off"
CACHE_SQLITE = "sqlite"
_REDIS_SCHEMES = ("redis", "rediss")
_CACHE_WORDS = {"off": CACHE_OFF, "false": CACHE_OFF, "on": CACHE_SQLITE, "true": CACHE_SQLITE}


def read_cache(value: Any) -> str:
    """Where the response cache is: `off`, `sqlite`, a path, or the URL of a Redis.

    YAML takes `off` and `on` for false and true.

    Raises:
        ValueError: it is none of these. The message has no part of the value, as a URL may hold a
            password.

    """
    if isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it is off, sqlite, a path, or redis://HOST:PORT/DB")
    text = value.strip()
    if "://" in text:
        try:
            parts = urlsplit(text)
            fits = parts.scheme in _REDIS_SCHEMES and parts.hostname and parts.port != 0
        except ValueError:  # its words have a part of the address
            fits = False
        if not fits:
            raise ValueError("its address is redis://HOST:PORT/DB, or begins with rediss://")
        path = parts.path.strip("/")
        if path and not path.isdecimal():
            raise ValueError("the database of Redis is a number, as in redis://HOST:PORT/0")
    return _CACHE_WORDS.get(text.lower(), text)


def is_redis(where: str) -> bool:
    """Whether the response cache is in Redis."""
    return "://" in where


CachePlace: TypeAlias = Annotated[str, BeforeValidator(read_cache), Field(repr=False)]

Keys: TypeAlias = Annotated[tuple[SecretStr, ...], BeforeValidator(split_commas)]
Hosts: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(split_commas)]

VECTOR_STORES = "vector_stores"
VECTOR_STORES_URL = "vector_stores_url"
"""The URL as a variable of the environment, behind the prefix of all of them."""

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_OWN_PATHS = ("/v1", "/web", "/docs", "/mcp")
"""Paths that the server has itself. Behind such a prefix it could not tell which one is meant."""


class ServerSettings(Section):
    """The `server` section of the configuration."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free port."""
    api_keys: Keys = ()
    """Keys that may use the models: a list, or one string separated by commas."""
    admin_keys: Keys = ()
    """Keys that may also load, unload and pin."""
    api_keys_file: Path | None = None
    """One key a line; `#` starts a comment, `admin:` in front marks an admin key.

    `NAME = KEY`, with spaces, gives it a name.
    """
    insecure: bool = False
    """Allow listening beyond loopback without any key."""
    drain_s: Duration = Field(default=30.0, le=86_400)
    """Seconds for running requests to finish after a stop."""
    hang_s: Duration = Field(default=10.0, ge=1, le=86_400)
    """Seconds without a heartbeat or progress after which the process counts as hung.

    It concerns the event loop, a call into a library that neither makes progress nor computes, and
    a trivial task of the device. The process is then replaced.
    """
    stall_s: Duration = Field(default=900.0, ge=1, le=86_400)
    """The same for a call that computes or compiles without progress, and for the start."""
    write_timeout_s: Duration = Field(default=60.0, ge=0.1, le=86_400)
    """Seconds in which a client may take no byte of its response; then its connection is cut."""
    max_body_bytes: Size = Field(default=32 * 2**20, gt=0)
    """A larger request body is refused with 413."""
    max_websocket_message: Size = Field(default=16 * 2**20, ge=1024, le=2**30)
    """A WebSocket with a larger message is closed with 1009."""
    max_image_pixels: int = Field(default=2**25, gt=0)
    """Pixels that the pictures of one request may have together. With more it is refused."""
    max_images: int = Field(default=32, gt=0)
    """Pictures that one text request may have. A model may take fewer."""
    max_image_bytes: Size = Field(default=20 * 2**20, gt=0)
    """The size of one picture in a text request, also of one behind a URL."""
    allowed_media_hosts: Hosts = ()
    """Hosts whose URLs a request may name for images; with `:PORT` if it is not the usual one."""
    private_media_hosts: Hosts = ()
    """Those of them whose names may lead to private addresses."""
    media_timeout: Duration = Field(default=10.0, gt=0, le=600)
    """Seconds in which a picture behind a URL must be here."""
    response_cache: CachePlace = CACHE_OFF
    """Where answers that equal requests may get are kept.

    `off`, `sqlite` (a file in `engine.cache_dir`), the path of a file, or `redis://HOST:PORT/DB`.
    """
    response_cache_size: Size = Field(default=2**30, gt=0)
    """Bytes of kept answers; beyond, the least recently used go. Redis has a bound of its own."""
    response_cache_age: Duration = Field(default=86_400.0, gt=0)
    """How long an answer is kept."""
    response_cache_shared: bool = False
    """A key may get the answers that were given to another."""
    keep_responses: bool = True
    """Keep the responses of `/v1/responses`, and conversations, in `engine.data_dir`.

    A request with `store: false` is never kept. Without this key nothing is.
    """
    responses_size: Size = Field(default=2**30, gt=0)
    """Bytes of kept responses and conversations; beyond, the least recently used go."""
    responses_age: Duration = Field(default=30 * 86_400.0, gt=0)
    """How long a conversation, or a chain of responses, is kept after its last turn."""
    max_file_bytes: Size = Field(default=2**29, gt=0)
    """A larger file of `/v1/files` is refused with 413."""
    file_storage: Size = Field(default=10 * 2**30, gt=0)
    """Bytes of all stored files together, in `engine.data_dir`; beyond, uploads get 507."""
    file_storage_per_key: Size = Field(default=10 * 2**30, gt=0)
    """The same for the files of one key."""
    file_age: Duration = Field(default=30 * 86_400.0, gt=0)
    """How long a stored file is kept; `forever` keeps it until somebody deletes it."""
    batch_concurrency: int = Field(default=8, ge=1, le=1024)
    """Lines of batches that run at once for one model."""
    batch_idle: Duration = Field(default=1.0)
    """A line of a batch begins when no other request has waited or run for so long."""
    batch_evict_idle: Duration = Field(default=30.0)
    """A batch evicts no model that has served another request within this time."""
    cors_origins: Hosts = ()
    """Origins of web pages whose scripts may read answers, as `https://app.example.com`, or `*`."""
    public_url: str | None = None
    """The address of the server for clients, with a proxy's prefix. Links in answers begin so."""
    root_path: str = ""
    """The prefix that a proxy removes from paths, such as `/ai`."""
    forwarded_allow_ips: Hosts = ()
    """Addresses or networks of proxies whose `X-Forwarded-*` headers are believed, or `*`."""
    mcp: bool = True
    """Serve tools for agents at `POST /mcp`. The package is imported at the first request."""
    otlp_endpoint: str | None = None
    """Send traces to this OpenTelemetry collector, by OTLP over HTTP: `http://HOST:4318`.

    Without it `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` and `OTEL_EXPORTER_OTLP_ENDPOINT` count.
    """
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    vector_stores: VectorStoreConfig = VectorStoreConfig()
    # The names of the keys of the file, by key.
    _names: Mapping[str, str] = PrivateAttr(default_factory=dict)
    # Where the store of keys is; None: there is none.
    _data_dir: Path | None = PrivateAttr(None)
    _stored: tuple[Key, ...] | None = PrivateAttr(None)

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _keys_fit_a_header(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        # The message must not contain the key, as it goes into a log.
        if not all(_KEY.fullmatch(key.get_secret_value()) for key in keys):
            raise ValueError("a key must be printable ASCII without spaces, and not empty")
        return keys

    @field_validator("allowed_media_hosts", "private_media_hosts")
    @classmethod
    def _hosts_are_lower_case(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(host.lower() for host in hosts)

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # Browsers send an origin in lower case and without a slash at its end.
        origins = tuple(origin.lower().removesuffix("/") for origin in origins)
        for origin in origins:
            if origin != ANY and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin: write SCHEME://HOST or SCHEME://HOST:PORT"
                    f" without a path, or {ANY} for every page"
                )
        return origins

    @field_validator("public_url")
    @classmethod
    def _public_url_is_a_base(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError("it begins with http:// or https:// and a host")
        if parts.query or parts.fragment:
            raise ValueError("it has no query and no fragment")
        return url.rstrip("/")

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector_is_an_address(cls, url: str | None) -> str | None:
        # The message must not contain the address, as it could hold a password.
        if url is None or not url.strip():
            return None
        try:
            parts = urlsplit(url.strip())
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            fits = False
        if not fits or parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "it is http:// or https:// and a host, as in http://localhost:4318; a key belongs"
                " into OTEL_EXPORTER_OTLP_HEADERS"
            )
        return url.strip()

    @field_validator("root_path")
    @classmethod
    def _root_path_is_a_path(cls, path: str) -> str:
        path = path.rstrip("/")
        if path and not _PATH.fullmatch(path):
            raise ValueError("it begins with a slash, as /ai, and has no empty part")
        if path.startswith(_OWN_PATHS) and f"/{path.split('/')[1]}" in _OWN_PATHS:
            raise ValueError(f"{path} is a path of the server itself; choose another prefix")
        return path

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _proxies_are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            if network != ANY:
                ipaddress.ip_network(network, strict=False)
        return networks

    @property
    def configured_keys(self) -> tuple[ConfiguredKey, ...]:
        """The keys of the configuration, with a name and without the key itself."""
        kinds = (("config", self.api_keys, False), ("config-admin", self.admin_keys, True))
        return tuple(
            ConfiguredKey(
                self._names.get(key.get_secret_value(), f"{kind}-{number}"),
                digest_of(key.get_secret_value()),
                admin,
            )
            for kind, keys, admin in kinds
            for number, key in enumerate(keys, start=1)
        )

    @property
    def has_keys(self) -> bool:
        """Whether there is any key at all, in the configuration or in the store.

        Keys of the store that are revoked or expired count as well. The store is read once, so this
        is what there was at the start. A running server asks its keyring.

        Raises:
            ConfigError: the store cannot be used.

        """
        return bool(self.api_keys or self.admin_keys or self._stored_keys())

    @property
    def has_admin_keys(self) -> bool:
        """Whether any key may give orders to the engine.

        Raises:
            ConfigError: the store cannot be used.

        """
        return bool(self.admin_keys) or any(
            key.admin and key.state(time.time()) == "active" for key in self._stored_keys()
        )

    def _stored_keys(self) -> tuple[Key, ...]:
        """The keys of the store, as they were when somebody first asked."""
        if self._stored is None:
            # SQLite is imported only if somebody asks.
            from server.keys.store import stored_keys

            self._stored = () if self._data_dir is None else stored_keys(self._data_dir)
        return self._stored


def is_loopback(host: str) -> bool:
    """Whether a host name or address always means this machine."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def config_path(path: Path | None, environ: Mapping[str, str]) -> Path:
    """The configuration file: `path`, otherwise `ROUNDHOUSE_CONFIG`, otherwise the starter's."""
    named = environ.get(ENV_CONFIG)
    return path or (Path(named) if named else STARTER_CONFIG)


def load_settings(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> tuple[EngineConfig, ServerSettings]:
    """Read the whole configuration: the file, then the environment, then `overrides`.

    `overrides` are keys of the `server` section from the command line.

    Raises:
        ConfigError: naming every wrong key. Also if the server would listen beyond loopback
            without a key.

    """
    sections = _sections(config_path(path, environ), environ)
    raw = {**sections["server"], **(overrides or {}), VECTOR_STORES: sections[VECTOR_STORES]}
    if raw.get("otlp_endpoint") is None and (collector := _collector(environ)) is not None:
        raw["otlp_endpoint"] = collector
    settings = parse_section(ServerSettings, raw, "server")
    if settings.api_keys_file is not None:
        keys, admin_keys, names = _read_keys(settings.api_keys_file)
        raw["api_keys"] = (*settings.api_keys, *keys)
        raw["admin_keys"] = (*settings.admin_keys, *admin_keys)
        settings = parse_section(ServerSettings, raw, "server")
        settings._names = names
    engine = engine_config(sections, RUNTIMES)
    settings._data_dir = engine.data_dir
    _check_models(settings.vector_stores, engine)
    if not (is_loopback(settings.host) or settings.insecure or settings.has_keys):
        raise ConfigError(
            f"server.host: {settings.host} can be reached from other machines, and there is no"
            " key. Make one with `roundhouse keys add NAME`, set server.api_keys"
            " (ROUNDHOUSE_API_KEYS) or server.api_keys_file, or allow it with server.insecure"
            " (--insecure)"
        )
    return engine, settings


def read_engine_config(path: Path, environ: Mapping[str, str]) -> EngineConfig:
    """The engine's part of a configuration, whatever its `server` section lacks.

    Raises:
        ConfigError: naming every wrong key.

    """
    return engine_config(_sections(path, environ), RUNTIMES)


def _sections(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    fields = {
        "engine": engine_fields(),
        "server": [name for name in ServerSettings.model_fields if name != VECTOR_STORES],
        "costs": [name for name in CostConfig.model_fields if name != "compare"],
        # Of its keys only the one that may hold a password, under a longer name.
        VECTOR_STORES: [VECTOR_STORES_URL],
    }
    sections = read_sections(path, environ, fields)
    own = sections[VECTOR_STORES]
    if VECTOR_STORES_URL in own:
        own["url"] = own.pop(VECTOR_STORES_URL)
    return sections


def _check_models(config: VectorStoreConfig, engine: EngineConfig) -> None:
    """Return if the models that vector stores use exist.

    Raises:
        ConfigError: naming the key.

    """
    for key in ("embedding_model", "rerank_model"):
        name = getattr(config, key)
        if name is not None:
            try:
                engine.find(name)
            except ModelNotFound as error:
                raise ConfigError(f"vector_stores.{key}: {error.message}") from None


def _collector(environ: Mapping[str, str]) -> str | None:
    """The collector of OpenTelemetry's own variables, unless they turn traces off."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return None
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((environ[name] for name in names if environ.get(name)), None)


def _read_keys(path: Path) -> tuple[list[str], list[str], dict[str, str]]:
    """The keys of the file, its admin keys, and the names of all of them."""
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_keys_file: {path}: {error}") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        # Only a warning: mounted secrets are often 0644 and cannot be changed.
        logger.warning("%s can be read by other users; chmod 600 it", path)
    keys: list[str] = []
    admin_keys: list[str] = []
    names: dict[str, str] = {}
    for line, each in enumerate(text.splitlines(), start=1):
        key = each.partition("#")[0].strip()
        admin = key.startswith(ADMIN_MARK)
        if admin:
            key = key.removeprefix(ADMIN_MARK).strip()
        elif not key:
            continue
        name = f"file-{len(names) + 1}"
        named = _NAMED_KEY.fullmatch(key)
        if named is not None:
            try:
                name, key = check_name(named["name"]), named["key"]
            except ConfigError as error:
                # The message must not contain what may be a key.
                raise ConfigError(
                    f"server.api_keys_file: {path}: line {line}: what is before = is not a name"
                ) from error
            if key.startswith(ADMIN_MARK):
                raise ConfigError(
                    f"server.api_keys_file: {path}: line {line}: {ADMIN_MARK} comes before the name"
                )
        names.setdefault(key, name)
        (admin_keys if admin else keys).append(key)
    if not keys and not admin_keys:
        raise ConfigError(f"server.api_keys_file: {path} holds no key")
    return keys, admin_keys, names
