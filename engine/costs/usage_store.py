"""What was used and spent, by key, model, provider and day: one SQLite file.

Requests add to counts in memory. A thread of its own writes them, several times a second, so at
most a second is lost when the process is killed. A full disk or a damaged file is a warning: then
the counts stay in memory, and no request fails.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

log = logging.getLogger(__name__)

FILE_NAME = "usage.db"
SCHEMA_VERSION = 1
"""`PRAGMA user_version` of the file."""

KEPT_DAYS = 400
"""Older days are folded into their months."""

MOST = 10**12
"""Of a count of one request. SQLite refuses sums beyond 2**63."""

WRITE_EVERY_S = 0.4
RETRY_S = 5.0
"""After a write that failed."""
CLOSE_S = 5.0
_BUSY_TIMEOUT_S = 5.0

WHOSE = ("key", "model", "provider")
GROUPS = (*WHOSE, "day", "month")
"""What counts can be grouped by."""

COUNTS = (
    "requests",
    "failures",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "images",
    "characters",
    "seconds",
    "device_s",
    "cost",
    "saved",
)
_WHOLE = COUNTS[:7]

Counts = tuple[float, ...]
"""A number for each of `COUNTS`."""

Spending = Mapping[tuple[str, str], tuple[float, float]]
"""Dollars of a day and of its month, by key and provider."""

_TABLE = f"""
BEGIN;
CREATE TABLE usage (
    day      TEXT NOT NULL,
    key      TEXT NOT NULL,
    model    TEXT NOT NULL,
    provider TEXT NOT NULL,
    {", ".join(f"{name} {'INTEGER' if name in _WHOLE else 'REAL'} NOT NULL" for name in COUNTS)},
    PRIMARY KEY (day, key, model, provider)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
_ADD = (
    f"INSERT INTO usage (day, key, model, provider, {', '.join(COUNTS)})"
    f" VALUES ({', '.join('?' * (4 + len(COUNTS)))})"
    " ON CONFLICT DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
)
_FOLD = (
    f"INSERT INTO usage (day, key, model, provider, {', '.join(COUNTS)})"
    f" SELECT substr(day, 1, 7), key, model, provider, {', '.join(f'sum({n})' for n in COUNTS)}"
    " FROM usage WHERE length(day) = 10 AND day < ? GROUP BY 1, 2, 3, 4"
    " ON CONFLICT DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
)

_FOLDED = "DELETE FROM usage WHERE length(day) = 10 AND day < ?"


@dataclass(frozen=True, slots=True)
class Row:
    """To what a count belongs."""

    day: str
    """`2026-03-05`; of days that were folded the month."""
    key: str
    """The name of a key, never the key itself."""
    model: str
    provider: str


@dataclass(frozen=True, slots=True)
class Means:
    """What a request to a model took lately, on average."""

    output_tokens: float
    device_s: float


class UsageStore:
    """The counts of all time. `add` may be called from any thread; the others block on the disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._connection: sqlite3.Connection | None = None
        self._pending: dict[Row, Counts] = {}
        self._counting = threading.Lock()
        """Held for moments: the event loop takes it as well."""
        self._writing = threading.Lock()
        self._added = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._folded = ""
        self._failing = False

    def open(self) -> None:
        """Open or create the file. If that fails, everything is kept in memory."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = _connect(self._path)
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "%s cannot be used: %s. It is left as it is. Until the next start, usage and what"
                " budgets have spent are kept in memory only",
                self._path,
                error,
            )
            self._connection = _connect(None)
        self._thread = threading.Thread(target=self._write_on, name="usage", daemon=True)
        self._thread.start()

    def add(self, row: Row, counts: Counts) -> None:
        """Count. It is on disk within a second."""
        counts = tuple(map(_bounded, counts))
        with self._counting:
            known = self._pending.get(row)
            self._pending[row] = counts if known is None else _sum(known, counts)
        self._added.set()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._closing.set()
        self._added.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        with self._writing:
            if self._connection is not None:
                self._write()
                self._connection.close()
                self._connection = None

    def spending(self, day: str) -> Spending:
        """The dollars of a day and of its month."""
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for (key, provider, each), counts in self._grouped(
            ("key", "provider", "day"), f"{day[:7]}-01", day
        ).items():
            cost = counts[COUNTS.index("cost")]
            of_day, of_month = found.get((key, provider), (0.0, 0.0))
            found[key, provider] = (of_day + cost * (each == day), of_month + cost)
        return found

    def means(self, since: str, until: str) -> Mapping[str, Means]:
        """The means of each model in these days."""
        found = {}
        for (model,), counts in self._grouped(("model",), since, until).items():
            named = dict(zip(COUNTS, counts, strict=True))
            answered = named["requests"] - named["failures"]
            if answered > 0:
                tokens, device_s = named["output_tokens"], named["device_s"]
                found[model] = Means(tokens / answered, device_s / answered)
        return found

    def report(
        self, by: Sequence[str], since: str | None, until: str | None, key: str | None
    ) -> list[tuple[tuple[str, ...], Counts]]:
        """The counts from the day `since` to `until`, grouped by `by`, of one key or of all."""
        return sorted(self._grouped(by, since or "", until or "9999-12-31", key).items())

    def _grouped(
        self, by: Sequence[str], since: str, until: str, key: str | None = None
    ) -> dict[tuple[str, ...], Counts]:
        columns = ["substr(day, 1, 7)" if name == "month" else name for name in by]
        query = (
            f"SELECT {', '.join([*columns, *(f'sum({name})' for name in COUNTS)])} FROM usage"
            # Of a month that was folded nobody knows the days.
            " WHERE day >= substr(?, 1, length(day)) AND day <= substr(?, 1, length(day))"
            + (" AND key = ?" if key is not None else "")
            + (f" GROUP BY {', '.join(columns)}" if by else "")
        )
        values = (since, until) if key is None else (since, until, key)
        found: dict[tuple[str, ...], Counts] = {}
        with self._writing:
            self._write()
            if self._connection is not None:
                try:
                    rows = self._connection.execute(query, values).fetchall()
                except sqlite3.Error as error:
                    log.warning("%s cannot be read: %s", self._path, error)
                    rows = []
                found = {row[: len(by)]: row[len(by) :] for row in rows if row[-1] is not None}
            with self._counting:
                waiting = list(self._pending.items())  # what could not be written
        for row, counts in waiting:
            if since <= row.day <= until and key in (None, row.key):
                group = tuple(row.day[:7] if name == "month" else getattr(row, name) for name in by)
                found[group] = _sum(found[group], counts) if group in found else counts
        return found

    def _write_on(self) -> None:
        while not self._closing.is_set():
            self._added.wait()
            # Requests that end in this time share a transaction.
            self._closing.wait(RETRY_S if self._failing else WRITE_EVERY_S)
            self._added.clear()
            with self._writing:
                if self._connection is not None:
                    self._write()
            if self._failing:
                self._added.set()

    def _write(self) -> None:
        """Write the counts. What cannot be written waits for the next time."""
        with self._counting:
            batch, self._pending = self._pending, {}
        if not batch or self._connection is None:
            self._put_back(batch)
            return
        try:
            self._write_batch(self._connection, batch)
        except (OSError, sqlite3.Error) as error:
            self._put_back(batch)
            if not self._failing:
                log.warning(
                    "usage cannot be written to %s: %s. It is kept in memory until it can be",
                    self._path,
                    error,
                )
            self._failing = True
            return
        if self._failing:
            log.warning("usage is written to %s again", self._path)
        self._failing = False

    def _write_batch(self, connection: sqlite3.Connection, batch: Mapping[Row, Counts]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany(_ADD, _values(batch))
            newest = max(row.day for row in batch)
            if newest > self._folded:
                oldest = (date.fromisoformat(newest) - timedelta(days=KEPT_DAYS)).isoformat()
                connection.execute(_FOLD, (oldest,))
                connection.execute(_FOLDED, (oldest,))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._folded = max(self._folded, newest)

    def _put_back(self, batch: Mapping[Row, Counts]) -> None:
        with self._counting:
            for row, counts in batch.items():
                known = self._pending.get(row)
                self._pending[row] = counts if known is None else _sum(known, counts)


def _connect(path: Path | None) -> sqlite3.Connection:
    if path is not None:  # SQLite's other files take the mode of this one
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        path or ":memory:",
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,  # one thread at a time: `UsageStore._writing`
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        problems = [row[0] for row in connection.execute("PRAGMA quick_check(1)").fetchall()]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError(problems[0].splitlines()[-1])
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"a newer version of this program wrote it ({version})")
        if version == 0:
            connection.executescript(_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection


def _values(batch: Mapping[Row, Counts]) -> Iterable[tuple[object, ...]]:
    for row, counts in batch.items():
        whole = tuple(round(count) for count in counts[: len(_WHOLE)])
        yield (row.day, row.key, row.model, row.provider, *whole, *counts[len(_WHOLE) :])


def _bounded(count: float) -> float:
    """A number that the file can add up. One that it refuses would stop all later ones as well."""
    return 0.0 if math.isnan(count) else min(max(count, -MOST), MOST)


def _sum(one: Counts, other: Counts) -> Counts:
    return tuple(a + b for a, b in zip(one, other, strict=True))
