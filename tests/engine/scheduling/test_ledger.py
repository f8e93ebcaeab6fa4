"""The ledger never grants above capacity, and always adds up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduling.ledger import HISTORY_LENGTH, Change, EntryKind, Ledger, LedgerOverflow


def test_a_grant_above_capacity_raises_and_changes_nothing() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=200)
    ledger.grant("a", EntryKind.BLOCK, "weights", 60)
    before = ledger.status()
    with pytest.raises(LedgerOverflow) as raised:
        ledger.grant("b", EntryKind.LEASE, "one", 41)
    assert (raised.value.wanted_bytes, raised.value.free_bytes) == (41, 40)
    assert ledger.status() == before
    ledger.grant("b", EntryKind.LEASE, "one", 40)
    assert ledger.free_bytes == 0


def test_capacity_is_the_budget_or_what_others_leave() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=150)
    assert ledger.capacity_bytes == 100
    ledger.observe(50)
    assert ledger.capacity_bytes == 100
    ledger.observe(80)
    assert ledger.capacity_bytes == 70
    ledger.observe(151)
    assert ledger.capacity_bytes == 0


def test_when_capacity_falls_below_granted_only_shrinking_is_allowed() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.BLOCK, "weights", 90)
    ledger.observe(50)
    assert ledger.free_bytes == -40
    with pytest.raises(LedgerOverflow):
        ledger.grant("a", EntryKind.LEASE, "one", 1)
    with pytest.raises(LedgerOverflow):
        ledger.resize("a", "weights", 91)
    ledger.grant("a", EntryKind.LEASE, "costs nothing", 0)
    ledger.resize("a", "weights", 80)
    assert ledger.granted_bytes == 80
    ledger.release("a", "weights")
    assert ledger.granted_bytes == 0


def test_a_reservation_becomes_blocks_or_stays_what_it_was() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.RESERVATION, "load", 50)
    ledger.grant("b", EntryKind.BLOCK, "weights", 30)
    before = ledger.status()
    with pytest.raises(LedgerOverflow):
        ledger.convert("a", "load", [("weights", 60), ("cache", 11)])
    assert ledger.status() == before
    ledger.convert("a", "load", [("weights", 60), ("cache", 10)])
    assert ledger.granted_bytes == 100
    assert [(e.owner, e.kind, e.name, e.nbytes) for e in ledger.status().entries] == [
        ("a", "block", "weights", 60),
        ("a", "block", "cache", 10),
        ("b", "block", "weights", 30),
    ]


def test_a_smaller_load_than_reserved_converts_even_when_others_took_the_device() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.RESERVATION, "load", 50)
    ledger.observe(100)
    ledger.convert("a", "load", [("weights", 50)])
    assert ledger.granted_bytes == 50


def test_conversions_that_make_no_sense_are_refused() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.RESERVATION, "load", 50)
    ledger.grant("a", EntryKind.LEASE, "one", 10)
    before = ledger.status()
    for name, blocks in (("one", [("x", 1)]), ("load", [("one", 1)]), ("load", [("x", 1)] * 2)):
        with pytest.raises(ValueError, match=r"reservation|one name"):
            ledger.convert("a", name, blocks)
    with pytest.raises(KeyError):
        ledger.convert("a", "nothing", [])
    assert ledger.status() == before


def test_a_name_is_taken_once_and_sizes_are_not_negative() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.LEASE, "one", 1)
    with pytest.raises(ValueError, match="already"):
        ledger.grant("a", EntryKind.LEASE, "one", 1)
    for act in (
        lambda: ledger.grant("a", EntryKind.LEASE, "two", -1),
        lambda: ledger.resize("a", "one", -1),
        lambda: ledger.observe(-1),
        lambda: Ledger(-1, 1),
    ):
        with pytest.raises(ValueError, match="negative"):
            act()
    assert ledger.granted_bytes == 1


def test_release_all_gives_back_one_kind_or_everything() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.BLOCK, "weights", 50)
    ledger.grant("a", EntryKind.LEASE, "one", 5)
    ledger.grant("b", EntryKind.BLOCK, "weights", 7)
    assert ledger.release_all("a", EntryKind.LEASE) == 5
    assert ledger.granted_bytes == 57
    assert ledger.release_all("a") == 50
    assert ledger.release_all("a") == 0
    assert ledger.granted_bytes == 7
    assert ledger.peak_granted_bytes == 62


def test_history_is_bounded_and_says_where_each_change_led() -> None:
    ledger = Ledger(budget_bytes=100, total_bytes=100)
    ledger.grant("a", EntryKind.BLOCK, "weights", 50)
    ledger.observe(70)
    ledger.release("a", "weights")
    assert [(r.change, r.granted_bytes, r.capacity_bytes) for r in ledger.history] == [
        (Change.GROW, 50, 100),
        (Change.OBSERVE, 50, 30),
        (Change.SHRINK, 0, 30),
    ]
    for _ in range(HISTORY_LENGTH + 1):
        ledger.observe(0)
    assert len(ledger.history) == HISTORY_LENGTH


class LedgerMachine(RuleBasedStateMachine):
    """Random use, against a plain dictionary of what should be there."""

    held = Bundle("held")
    sizes = st.integers(0, 80)

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(budget_bytes=100, total_bytes=120)
        self.model: dict[tuple[str, str], int] = {}
        self.serial = 0
        self.peak = 0

    def attempt(self, growth: int) -> bool:
        """Whether the ledger must allow this growth."""
        return growth <= 0 or growth <= self.ledger.capacity_bytes - sum(self.model.values())

    @rule(target=held, owner=st.sampled_from("abc"), kind=st.sampled_from(EntryKind), nbytes=sizes)
    def grant(self, owner: str, kind: EntryKind, nbytes: int) -> tuple[str, str]:
        self.serial += 1
        key = (owner, f"{kind}{self.serial}")
        if self.attempt(nbytes):
            self.ledger.grant(owner, kind, key[1], nbytes)
            self.model[key] = nbytes
        else:
            with pytest.raises(LedgerOverflow):
                self.ledger.grant(owner, kind, key[1], nbytes)
        return key

    @rule(key=held, nbytes=sizes)
    def resize(self, key: tuple[str, str], nbytes: int) -> None:
        if key not in self.model:
            return
        if self.attempt(nbytes - self.model[key]):
            self.ledger.resize(*key, nbytes)
            self.model[key] = nbytes
        else:
            with pytest.raises(LedgerOverflow):
                self.ledger.resize(*key, nbytes)

    @rule(key=held, parts=st.lists(sizes, max_size=3))
    def convert(self, key: tuple[str, str], parts: list[int]) -> None:
        if key not in self.model or not key[1].startswith(EntryKind.RESERVATION):
            return
        self.serial += 1
        blocks = [(f"part{self.serial}-{index}", nbytes) for index, nbytes in enumerate(parts)]
        if self.attempt(sum(parts) - self.model[key]):
            self.ledger.convert(*key, blocks)
            del self.model[key]
            self.model.update({(key[0], name): nbytes for name, nbytes in blocks})
        else:
            with pytest.raises(LedgerOverflow):
                self.ledger.convert(*key, blocks)

    @rule(key=held)
    def release(self, key: tuple[str, str]) -> None:
        if self.model.pop(key, None) is not None:
            self.ledger.release(*key)
        else:
            with pytest.raises(KeyError):
                self.ledger.release(*key)

    @precondition(lambda self: self.model)
    @rule(owner=st.sampled_from("abc"))
    def release_all(self, owner: str) -> None:
        self.ledger.release_all(owner)
        self.model = {key: nbytes for key, nbytes in self.model.items() if key[0] != owner}

    @rule(external_bytes=st.integers(0, 130))
    def observe(self, external_bytes: int) -> None:
        self.ledger.observe(external_bytes)
        assert self.ledger.capacity_bytes == max(0, min(100, 120 - external_bytes))

    @invariant()
    def adds_up(self) -> None:
        status = self.ledger.status()
        granted = sum(self.model.values())
        self.peak = max(self.peak, granted)
        assert {(e.owner, e.name): e.nbytes for e in status.entries} == self.model
        assert status.granted_bytes == sum(e.nbytes for e in status.entries) == granted
        assert status.free_bytes == status.capacity_bytes - granted
        assert status.peak_granted_bytes == self.peak
        for record in self.ledger.history:
            assert record.change is not Change.GROW or (
                record.granted_bytes <= record.capacity_bytes
            )


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
