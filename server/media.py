"""Checks the URLs in a request: nothing is fetched unless its host is allowed.

A server that fetches any URL of a client can be made to read its own network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from engine.errors import InvalidRequest

PORTS = {"http": 80, "https": 443}

_ROOTS = ("messages", "input", "items", "system", "prompt")
_URL_KEYS = frozenset({"image_url", "audio_url", "video_url", "file_url", "source"})
"""Keys whose value is a URL, or an object with a `url` (`source` is Anthropic's)."""


def check_media_urls(body: Mapping[str, Any], allowed_hosts: Sequence[str]) -> None:
    """Check every media URL in a request body: `data:`, or http(s) to an allowed host.

    Raises:
        InvalidRequest: naming the first field with another URL.

    """
    for root in _ROOTS:
        _walk(body.get(root), root, allowed_hosts)


def _walk(node: Any, param: str, allowed_hosts: Sequence[str]) -> None:
    # The JSON parser limits the depth.
    if isinstance(node, list):
        for index, item in enumerate(node):
            if isinstance(item, dict | list):
                _walk(item, f"{param}[{index}]", allowed_hosts)
    elif isinstance(node, dict):
        for key, value in node.items():
            # A model made up the arguments of a tool call. They are shown to it, never fetched.
            if key == "input" and node.get("type") == "tool_use":
                continue
            if key in _URL_KEYS:
                _check(value, f"{param}.{key}", allowed_hosts)
            if isinstance(value, dict | list):
                _walk(value, f"{param}.{key}", allowed_hosts)


def _check(value: Any, param: str, allowed_hosts: Sequence[str]) -> None:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or url.startswith("data:") or is_allowed(url, allowed_hosts):
        return
    raise InvalidRequest(
        "Media must be given as a data: URL; this server does not fetch other URLs"
        " (server.allowed_media_hosts names the hosts it may fetch from).",
        param=param,
    )


def is_allowed(url: str, allowed_hosts: Sequence[str]) -> bool:
    """Whether a URL leads to an allowed host, on the usual port or on the one that is named."""
    # URL parsers disagree about these, so the URL checked here might not be the URL fetched.
    if "\\" in url or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    host, usual = parts.hostname, PORTS.get(parts.scheme)
    if usual is None or host is None or "@" in parts.netloc:
        return False
    named = f"[{host}]" if ":" in host else host
    return (host in allowed_hosts and port in (None, usual)) or (
        f"{named}:{port or usual}" in allowed_hosts
    )
