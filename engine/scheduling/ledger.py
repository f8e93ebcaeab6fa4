"""The ledger: the one place that counts device bytes.

Every byte that the engine may use is an entry, keyed by its owner (a model id) and a name.
Capacity is the smaller of two: the budget, and the device's total less the measured external
bytes. Other programs can push capacity below what is granted; a grant never can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from engine.status import LedgerEntry, LedgerStatus

HISTORY_LENGTH = 1024


class EntryKind(StrEnum):
    """What granted bytes are for."""

    BLOCK = "block"
    RESERVATION = "reservation"
    LEASE = "lease"


class LedgerOverflow(Exception):
    """A grant would exceed capacity. Nothing was changed."""

    def __init__(self, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{wanted_bytes} more bytes wanted, {free_bytes} free")
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class Change(StrEnum):
    """What changed the ledger."""

    GROW = "grow"
    SHRINK = "shrink"
    OBSERVE = "observe"


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """One past change, and the ledger's bytes after it."""

    change: Change
    granted_bytes: int
    capacity_bytes: int


class Ledger:
    """Grants bytes, never above capacity. Not thread-safe: it has one owner."""

    def __init__(self, budget_bytes: int, total_bytes: int) -> None:
        """Start empty, with no external bytes.

        Raises:
            ValueError: a negative size.

        """
        if budget_bytes < 0 or total_bytes < 0:
            raise ValueError("a ledger cannot count from a negative size")
        self._budget_bytes = budget_bytes
        self._total_bytes = total_bytes
        self._external_bytes = 0
        self._granted_bytes = 0
        self._peak_granted_bytes = 0
        self._entries: dict[str, dict[str, LedgerEntry]] = {}
        self._history: deque[LedgerRecord] = deque(maxlen=HISTORY_LENGTH)

    @property
    def budget_bytes(self) -> int:
        """The highest capacity there can be."""
        return self._budget_bytes

    @property
    def capacity_bytes(self) -> int:
        """What may be granted now, by the last measurement of external bytes."""
        return max(0, min(self._budget_bytes, self._total_bytes - self._external_bytes))

    @property
    def granted_bytes(self) -> int:
        """The sum of all entries."""
        return self._granted_bytes

    @property
    def free_bytes(self) -> int:
        """Capacity less granted; negative while other programs use what was granted here."""
        return self.capacity_bytes - self._granted_bytes

    @property
    def peak_granted_bytes(self) -> int:
        """The highest `granted_bytes` so far."""
        return self._peak_granted_bytes

    @property
    def history(self) -> tuple[LedgerRecord, ...]:
        """The last changes, oldest first."""
        return tuple(self._history)

    def set_device(self, budget_bytes: int, total_bytes: int) -> None:
        """Set the sizes once the device is open; until then a ledger of size 0 grants nothing.

        Raises:
            ValueError: a negative size, or bytes are granted already.

        """
        if budget_bytes < 0 or total_bytes < 0 or self._granted_bytes:
            raise ValueError("the device of a ledger cannot change under its entries")
        self._budget_bytes = budget_bytes
        self._total_bytes = total_bytes

    def observe(self, external_bytes: int) -> None:
        """Take a measurement of external bytes: those in use that no entry accounts for.

        Raises:
            ValueError: a negative size.

        """
        if external_bytes < 0:
            raise ValueError("external bytes cannot be negative")
        self._external_bytes = external_bytes
        self._record(Change.OBSERVE)

    def grant(self, owner: str, kind: EntryKind, name: str, nbytes: int) -> None:
        """Enter `nbytes` for `owner` under `name`.

        Raises:
            LedgerOverflow: beyond capacity.
            ValueError: the name is taken, or the size is negative.

        """
        if name in self._entries.get(owner, {}):
            raise ValueError(f"{owner!r} holds {name!r} already")
        self._replace(owner, (), (_entry(owner, kind, name, nbytes),))

    def resize(self, owner: str, name: str, nbytes: int) -> None:
        """Change the size of an entry; it may always shrink.

        Raises:
            LedgerOverflow: growing beyond capacity.
            KeyError: no such entry.
            ValueError: the size is negative.

        """
        old = self._entries[owner][name]
        self._replace(owner, (old,), (_entry(owner, EntryKind(old.kind), name, nbytes),))

    def convert(self, owner: str, name: str, blocks: Iterable[tuple[str, int]]) -> None:
        """Replace a reservation by measured blocks `(name, bytes)`, all or nothing.

        Raises:
            LedgerOverflow: the blocks need more than the reservation and the free bytes.
            KeyError: no such entry.
            ValueError: it is not a reservation, a block's name is taken, or a size is negative.

        """
        old = self._entries[owner][name]
        if old.kind != EntryKind.RESERVATION:
            raise ValueError(f"{name!r} of {owner!r} is a {old.kind}, not a reservation")
        new = tuple(_entry(owner, EntryKind.BLOCK, block, nbytes) for block, nbytes in blocks)
        names = [entry.name for entry in new]
        taken = self._entries[owner].keys() - {name}
        if len(set(names)) < len(names) or not taken.isdisjoint(names):
            raise ValueError(f"{owner!r} cannot hold two entries of one name")
        self._replace(owner, (old,), new)

    def release(self, owner: str, name: str) -> None:
        """Remove an entry.

        Raises:
            KeyError: no such entry.

        """
        self._replace(owner, (self._entries[owner][name],), ())

    def release_all(self, owner: str, kind: EntryKind | None = None) -> int:
        """Remove all entries of an owner, or those of one kind; returns their bytes."""
        held = self._entries.get(owner, {}).values()
        gone = tuple(entry for entry in held if kind is None or entry.kind == kind)
        if gone:
            self._replace(owner, gone, ())
        return sum(entry.nbytes for entry in gone)

    def status(self) -> LedgerStatus:
        """The whole ledger at this moment."""
        return LedgerStatus(
            total_bytes=self._total_bytes,
            budget_bytes=self._budget_bytes,
            external_bytes=self._external_bytes,
            capacity_bytes=self.capacity_bytes,
            granted_bytes=self._granted_bytes,
            free_bytes=self.free_bytes,
            peak_granted_bytes=self._peak_granted_bytes,
            entries=tuple(entry for held in self._entries.values() for entry in held.values()),
        )

    def _replace(
        self, owner: str, old: tuple[LedgerEntry, ...], new: tuple[LedgerEntry, ...]
    ) -> None:
        growth_bytes = sum(e.nbytes for e in new) - sum(e.nbytes for e in old)
        # Growth by nothing is always allowed. When other programs take the device, a resident
        # model must still serve requests that cost no further byte.
        if growth_bytes > 0 and growth_bytes > self.free_bytes:
            raise LedgerOverflow(growth_bytes, self.free_bytes)
        held = self._entries.setdefault(owner, {})
        for entry in old:
            del held[entry.name]
        for entry in new:
            held[entry.name] = entry
        self._granted_bytes += growth_bytes
        self._peak_granted_bytes = max(self._peak_granted_bytes, self._granted_bytes)
        self._record(Change.GROW if growth_bytes > 0 else Change.SHRINK)

    def _record(self, change: Change) -> None:
        self._history.append(LedgerRecord(change, self._granted_bytes, self.capacity_bytes))


def _entry(owner: str, kind: EntryKind, name: str, nbytes: int) -> LedgerEntry:
    if nbytes < 0:
        raise ValueError(f"{name!r} of {owner!r} cannot have a negative size")
    return LedgerEntry(owner, kind, name, nbytes)
