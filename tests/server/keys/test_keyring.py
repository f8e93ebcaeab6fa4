"""Scopes, limits and budgets of the keys of a running server."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from engine.caller import Caller
from engine.config import EngineConfig
from engine.cost_config import BudgetConfig
from engine.requests import SchedulingOptions
from engine.usage import Usage
from server.keys.access import Access
from server.keys.keyring import Budgets, ConfiguredKey, Keyring
from server.keys.record import Key, digest_of

CONFIG = EngineConfig.model_validate(
    {
        "models": [
            {"id": "small", "aliases": ["gpt-4o", "org/small"], "source": "none"},
            {"id": "other", "source": "none"},
            {"id": "qwen-a", "source": "none"},
            {"id": "qwen-b", "source": "none"},
        ],
        "routes": [{"id": "auto", "choose": ["small"]}],
    }
)


def key(name: str = "alice", **fields: Any) -> Key:
    return Key(**{"name": name, "digest": digest_of(name), "created_at": 1, **fields})


def keyring(*keys: Key, configured: tuple[ConfiguredKey, ...] = ()) -> Keyring:
    ring = Keyring(configured, CONFIG, lambda: 0.0)
    ring.replace(keys)
    return ring


def found(ring: Keyring, secret: str = "alice") -> Access:
    access = ring.find(secret)
    assert access is not None
    return access


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (("*",), None),
        (("small",), {"small", "gpt-4o", "org/small"}),
        (("gpt-4o",), {"small", "gpt-4o", "org/small"}),
        (("auto",), {"auto", "auto:cheap", "auto:best", "auto:fast"}),
        (("qwen*",), {"qwen*", "qwen-a", "qwen-b"}),
        (("org/*", "other"), {"org/*", "other", "small", "gpt-4o", "org/small"}),
        (("gone",), {"gone"}),
        (("s.all",), {"s.all"}),
    ],
)
def test_models(models: tuple[str, ...], names: set[str] | None) -> None:
    assert found(keyring(key(models=models))).models == names


def test_a_key_is_found_by_itself_alone() -> None:
    ring = keyring(key())
    assert ring.find("alice") is not None
    for other in ("", "alic", "alicea", "Alice", digest_of("alice").hex()):
        assert ring.find(other) is None


def test_a_configured_key_that_is_both_gives_orders() -> None:
    digest = digest_of("both")
    both = (ConfiguredKey("first", digest, True), ConfiguredKey("second", digest, False))
    for configured in (both, both[::-1]):
        assert found(keyring(configured=configured), "both").caller == Caller("first")
        assert found(keyring(configured=configured), "both").admin


def test_there_are_keys_as_long_as_one_is_known() -> None:
    ring = keyring()
    assert not ring
    ring.replace((key(revoked_at=1),))
    assert ring
    assert keyring(configured=(ConfiguredKey("config-1", b"", False),))


def test_a_key_ends() -> None:
    ring = keyring(key("a", expires_at=10), key("b", revoked_at=1))
    assert found(ring, "a").ended(9.9) is None
    assert found(ring, "a").ended(10) == "This API key has expired."
    assert found(ring, "b").ended(0) == "This API key was revoked."


def test_limits_outlive_changes_and_a_new_secret() -> None:
    ring = keyring(key(concurrent=1, tokens_per_minute=10))
    limiter = found(ring).limiter
    assert limiter is not None
    limiter.enter()
    ring.replace((key(concurrent=2, digest=digest_of("new secret")),))
    assert ring.find("alice") is None
    assert found(ring, "new secret").limiter is limiter
    assert limiter.enter() is None
    assert limiter.enter() is not None
    ring.replace(())
    ring.replace((key(created_at=2),))
    assert found(ring).limiter is not limiter


def test_tokens_are_charged_to_the_key() -> None:
    ring = keyring(key(tier="gold", tokens_per_minute=10))
    caller, limiter = found(ring).caller, found(ring).limiter
    assert limiter is not None
    caller.count(Usage(input_tokens=3, cached_tokens=2, output_tokens=4))
    assert limiter.headers()["x-ratelimit-remaining-tokens"] == "3"
    # Records of jobs have a caller's name and tier, and nothing else of it.
    assert asdict(SchedulingOptions(caller=caller))["caller"] == {"name": "alice", "tier": "gold"}
    Caller("bob").count(Usage(input_tokens=3))


def test_budgets_are_handed_on_when_they_change() -> None:
    got: list[Budgets] = []
    ring = keyring(key(month=5.0), key("bob"))
    ring.hand_budgets(got.append)
    alice = BudgetConfig(key="alice", month=5.0)
    assert got == [(alice,)]
    ring.replace((key(month=5.0, tier="gold"), key("bob")))
    assert got == [(alice,)]
    ring.replace((key(month=5.0), key("bob", day=1.0, when_spent="free")))
    assert got[1:] == [(alice, BudgetConfig(key="bob", day=1.0, when_spent="free"))]


def test_uses_are_noted_once() -> None:
    ring = keyring(key(), key("bob"))
    found(ring).used_at = 12.7
    ring.replace((key(tier="gold"), key("bob")))
    assert ring.take_used() == {digest_of("alice"): 12}
    assert ring.take_used() == {}
