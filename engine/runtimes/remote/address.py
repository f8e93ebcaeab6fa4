"""The address of a provider, and the hosts that may be reached for it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

QUERY = frozenset({"api-version"})
"""What a base URL may say in its query. It is shown in `/v1/engine`, so it must hold no key."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Address:
    """The base URL of a provider."""

    scheme: str
    host: str
    netloc: str
    path: str
    query: str

    @classmethod
    def of(cls, source: str) -> Address:
        """The address that `source` names.

        Raises:
            ValueError: it is no base URL, in words.

        """
        if not source.isprintable() or " " in source or "\\" in source:
            raise ValueError("it is a URL without spaces and backslashes")
        parts = urlsplit(source)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is the provider's base URL, as https://api.example.com/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it has no user and no password, the key is options.api_key")
        if parts.fragment:
            raise ValueError("it has no fragment")
        names = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        if names - QUERY:
            raise ValueError("its query may hold api-version only, the key is options.api_key")
        _ = parts.port  # a wrong one is a ValueError
        return cls(parts.scheme, parts.hostname, parts.netloc, parts.path.rstrip("/"), parts.query)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{self.netloc}"

    def join(self, path: str) -> str:
        """The URL of an endpoint, such as `/chat/completions`."""
        return urlunsplit((self.scheme, self.netloc, self.path + path, self.query, ""))


def is_private(address: str) -> bool:
    """Whether an address is of this machine or a network near it, not of the public internet."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    return not ip.is_global or ip.is_multicast


def is_named_literally(host: str) -> bool:
    """Whether a host is an address itself, or a name that always means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
