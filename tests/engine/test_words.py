"""Words of others in a message to a client."""

from __future__ import annotations

import pytest

from engine.words import MOST_ECHOED, echoed, shortened, without_folders


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("cannot read /srv/models/llama/config.json", "cannot read config.json"),
        ("no route /v1/videos/x", "no route /v1/videos/x"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("#/$defs/a/b is no reference", "#/$defs/a/b is no reference"),
        ("in /home/me@host/a+b/c~d", "in c~d"),
    ],
)
def test_folders_of_this_machine_are_not_told(message: str, told: str) -> None:
    assert without_folders(message) == told


def test_what_a_client_sent_is_quoted_and_cut() -> None:
    assert echoed("small") == "'small'"
    assert echoed("x" * 100_000) == f"'{'x' * MOST_ECHOED}'…"
    assert len(echoed(["x"] * 100_000)) < 3 * MOST_ECHOED
    assert shortened("x" * 9, 8) == "xxxxxxxx…" and shortened("x" * 8, 8) == "x" * 8
