"""The records of vector stores: one SQLite file.

Passages and vectors are in a database of their own. A removal is noted here in the transaction that
ends the record, and forgotten once it is done there, so that a kill between the two leaves nothing.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engine.errors import NoSpaceLeft, NotFound
from engine.words import echoed
from server.database import Database
from server.stored_files.record import Viewer
from server.vector_stores.chunking import Chunking
from server.vector_stores.records import (
    Attachment,
    AttachmentStatus,
    Counts,
    FileBatch,
    VectorStore,
    Wanted,
)

FILE_NAME = "vector_stores.sqlite3"

Order = Literal["asc", "desc"]

_TABLES = """
CREATE TABLE stores (
    sequence       INTEGER PRIMARY KEY AUTOINCREMENT,
    id             TEXT NOT NULL UNIQUE,
    owner          TEXT NOT NULL,
    name           TEXT NOT NULL,
    description    TEXT,
    model          TEXT NOT NULL,
    created_at     INTEGER NOT NULL,
    last_active_at INTEGER NOT NULL,
    expires_days   INTEGER,
    metadata       TEXT NOT NULL
) STRICT;
CREATE INDEX stores_owner ON stores (owner, sequence);
CREATE TABLE attachments (
    number        INTEGER PRIMARY KEY AUTOINCREMENT,
    store         TEXT NOT NULL,
    file          TEXT NOT NULL,
    filename      TEXT NOT NULL,
    batch         TEXT,
    caller        TEXT NOT NULL,
    status        TEXT NOT NULL,
    error_code    TEXT,
    error_message TEXT,
    max_tokens    INTEGER NOT NULL,
    overlap       INTEGER NOT NULL,
    attributes    TEXT NOT NULL,
    nbytes        INTEGER NOT NULL,
    created_at    INTEGER NOT NULL,
    UNIQUE (store, file)
) STRICT;
CREATE INDEX attachments_file ON attachments (file);
CREATE INDEX attachments_batch ON attachments (batch) WHERE batch IS NOT NULL;
CREATE INDEX attachments_pending ON attachments (number) WHERE status = 'in_progress';
CREATE TABLE batches (
    id         TEXT PRIMARY KEY,
    store      TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    cancelled  INTEGER NOT NULL
) STRICT;
CREATE TABLE removals (
    sequence   INTEGER PRIMARY KEY AUTOINCREMENT,
    store      TEXT NOT NULL,
    attachment INTEGER
) STRICT;
"""

_STORE = "id, owner, name, description, model, created_at, last_active_at, expires_days, metadata"
_ATTACHMENT = (
    "number, store, file, filename, batch, caller, status, error_code, error_message, max_tokens,"
    " overlap, attributes, nbytes, created_at"
)

Removal = tuple[int, str, int | None]
"""Its number, a store, and an attachment; None: the whole store."""


class RecordStore:
    """The records. Threads may share it, and every method blocks on the disk.

    What a method writes is on disk when it returns.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the file in `folder`.

        Raises:
            ConfigError: it is damaged, newer than this program, or cannot be used. It is left as
                it is.

        """
        self._database = Database(folder / FILE_NAME, (_TABLES,), "the vector store")

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # Stores.

    def add_store(self, store: VectorStore, most: int) -> None:
        """Add a record.

        Raises:
            NoSpaceLeft: the owner has `most` stores.

        """
        with self._database.writing() as connection:
            ((count,),) = connection.execute(
                "SELECT count(*) FROM stores WHERE owner = ?", (store.owner,)
            ).fetchall()
            if count >= most:
                raise NoSpaceLeft(
                    f"There are {count} vector stores already (vector_stores.max_stores)."
                    " Delete some."
                )
            connection.execute(
                f"INSERT INTO stores ({_STORE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                _store_row(store),
            )

    def change_store(self, store: VectorStore) -> None:
        """Replace the record of a store, if it still has one."""
        with self._database.writing() as connection:
            connection.execute(
                f"UPDATE stores SET ({_STORE}) = (?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE id = ?",
                (*_store_row(store), store.id),
            )

    def touch(self, store: str, now: int) -> None:
        """Note that a store was used."""
        with self._database.writing() as connection:
            connection.execute("UPDATE stores SET last_active_at = ? WHERE id = ?", (now, store))

    def store(self, viewer: Viewer, store: str, *, param: str | None = None) -> VectorStore:
        """One store.

        Raises:
            NotFound: there is none that the viewer sees.

        """
        rows = self._database.rows(f"SELECT {_STORE} FROM stores WHERE id = ?", store)
        found = _store(rows[0]) if rows else None
        if found is None or not viewer.sees(found.owner):
            raise NotFound(f"There is no vector store {echoed(store)}.", param=param)
        return found

    def stores(
        self,
        viewer: Viewer,
        *,
        limit: int,
        after: str | None,
        before: str | None,
        order: Order,
    ) -> tuple[list[VectorStore], bool]:
        """Up to `limit` stores by age, and whether there are more.

        Raises:
            NotFound: the viewer sees no store `after` or `before`.

        """
        where, values = ["1"], []  # type: list[str], list[Any]
        if not viewer.sees_all:
            where.append("owner = ?")
            values.append(viewer.name)
        for name, edge in (("after", after), ("before", before)):
            if edge is not None:
                self.store(viewer, edge, param=name)
                sign = ">" if (order == "asc") == (name == "after") else "<"
                where.append(f"sequence {sign} (SELECT sequence FROM stores WHERE id = ?)")
                values.append(edge)
        rows, more = self._page(
            f"SELECT {_STORE} FROM stores WHERE {' AND '.join(where)}",
            values, "sequence", limit, order, backwards=before is not None and after is None,
        )  # fmt: skip
        return [_store(row) for row in rows], more

    def delete_store(self, store: str) -> None:
        """Forget a store with its files and batches, and note that its vectors must go."""
        with self._database.writing() as connection:
            for table in ("attachments", "batches"):
                connection.execute(f"DELETE FROM {table} WHERE store = ?", (store,))
            connection.execute("DELETE FROM stores WHERE id = ?", (store,))
            connection.execute("INSERT INTO removals (store) VALUES (?)", (store,))

    def expire(self, now: int) -> None:
        """Detach the files of the stores that have expired."""
        with self._database.writing() as connection:
            expired = connection.execute(
                "SELECT id FROM stores WHERE last_active_at + expires_days * 86400 <= ?"
                " AND EXISTS (SELECT 1 FROM attachments WHERE store = stores.id)",
                (now,),
            ).fetchall()
            for (store,) in expired:
                for table in ("attachments", "batches"):
                    connection.execute(f"DELETE FROM {table} WHERE store = ?", (store,))
                connection.execute("INSERT INTO removals (store) VALUES (?)", (store,))

    def counts(self, stores: Collection[str]) -> Mapping[str, Counts]:
        """The files of these stores."""
        marks = ", ".join("?" * len(stores))
        rows = self._database.rows(
            "SELECT store, status, count(*), sum(nbytes) FROM attachments"
            f" WHERE store IN ({marks}) GROUP BY store, status",
            *stores,
        )
        return {
            store: _counts([row[1:] for row in rows if row[0] == store]) for store in set(stores)
        }

    def nbytes(self) -> int:
        """The bytes of all stores."""
        ((nbytes,),) = self._database.rows("SELECT coalesce(sum(nbytes), 0) FROM attachments")
        return int(nbytes)

    # Files.

    def attach(
        self,
        store: VectorStore,
        wanted: Sequence[Wanted],
        caller: str,
        now: int,
        most: int,
        *,
        batch: str | None = None,
    ) -> list[Attachment]:
        """Attach files, which are in progress from then on. One that is there begins anew.

        Raises:
            NoSpaceLeft: the store would have more than `most` files.
            NotFound: the store was deleted just now.

        """
        numbers: list[int] = []
        with self._database.writing() as connection:
            if not connection.execute("SELECT 1 FROM stores WHERE id = ?", (store.id,)).fetchall():
                raise NotFound(f"There is no vector store {echoed(store.id)}.")
            if batch is not None:
                connection.execute(
                    "INSERT INTO batches VALUES (?, ?, ?, 0)", (batch, store.id, now)
                )
            for each in wanted:
                self._detach(connection, "store = ? AND file = ?", (store.id, each.file))
                cursor = connection.execute(
                    "INSERT INTO attachments (store, file, filename, batch, caller, status,"
                    " max_tokens, overlap, attributes, nbytes, created_at)"
                    " VALUES (?, ?, ?, ?, ?, 'in_progress', ?, ?, ?, 0, ?)",
                    (
                        store.id,
                        each.file,
                        each.filename,
                        batch,
                        caller,
                        each.chunking.max_tokens,
                        each.chunking.overlap,
                        json.dumps(each.attributes),
                        now,
                    ),
                )
                assert cursor.lastrowid is not None
                numbers.append(cursor.lastrowid)
            ((count,),) = connection.execute(
                "SELECT count(*) FROM attachments WHERE store = ?", (store.id,)
            ).fetchall()
            if count > most:
                raise NoSpaceLeft(
                    f"A vector store has at most {most} files (vector_stores.max_files)."
                )
            connection.execute("UPDATE stores SET last_active_at = ? WHERE id = ?", (now, store.id))
            found = self._by_numbers(connection, numbers)
        return [found[number] for number in numbers if number in found]

    def attachment(self, store: str, file: str) -> Attachment:
        """A file of a store.

        Raises:
            NotFound: it has no such file.

        """
        rows = self._database.rows(
            f"SELECT {_ATTACHMENT} FROM attachments WHERE store = ? AND file = ?", store, file
        )
        if not rows:
            raise NotFound(f"The vector store has no file {echoed(file)}.")
        return _attachment(rows[0])

    def by_numbers(self, numbers: Collection[int]) -> Mapping[int, Attachment]:
        """Attachments by their numbers. One that is gone is missing."""
        with self._database.reading() as connection:
            return self._by_numbers(connection, numbers)

    def completed(self, store: str) -> list[tuple[int, Mapping[str, Any]]]:
        """The numbers and attributes of the files that a search may find."""
        rows = self._database.rows(
            "SELECT number, attributes FROM attachments WHERE store = ? AND status = 'completed'",
            store,
        )
        return [(number, json.loads(attributes)) for number, attributes in rows]

    def attachments(
        self,
        store: str,
        *,
        limit: int,
        after: str | None,
        before: str | None,
        order: Order,
        status: str | None = None,
        batch: str | None = None,
    ) -> tuple[list[Attachment], bool]:
        """Up to `limit` files of a store or batch by age, and whether there are more.

        Raises:
            NotFound: the store has no file `after` or `before`.

        """
        where, values = ["store = ?"], [store]  # type: list[str], list[Any]
        for column, value in (("status", status), ("batch", batch)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        for name, edge in (("after", after), ("before", before)):
            if edge is not None:
                try:
                    number = self.attachment(store, edge).number
                except NotFound as error:
                    raise NotFound(error.message, param=name) from None
                where.append(f"number {'>' if (order == 'asc') == (name == 'after') else '<'} ?")
                values.append(number)
        rows, more = self._page(
            f"SELECT {_ATTACHMENT} FROM attachments WHERE {' AND '.join(where)}",
            values, "number", limit, order, backwards=before is not None and after is None,
        )  # fmt: skip
        return [_attachment(row) for row in rows], more

    def pending(self) -> list[tuple[int, str]]:
        """The files in progress, oldest first: their numbers, and the keys that attached them."""
        rows = self._database.rows(
            "SELECT number, caller FROM attachments WHERE status = 'in_progress' ORDER BY number"
        )
        return [(row[0], row[1]) for row in rows]

    def complete(self, number: int, nbytes: int) -> bool:
        """Note that the passages of a file are there. False: it is in progress no more."""
        with self._database.writing() as connection:
            cursor = connection.execute(
                "UPDATE attachments SET status = 'completed', nbytes = ?"
                " WHERE number = ? AND status = 'in_progress'",
                (nbytes, number),
            )
            return bool(cursor.rowcount)

    def fail(self, number: int, code: str, message: str) -> None:
        """Note why a file failed, if it is still in progress."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE attachments SET status = 'failed', error_code = ?, error_message = ?"
                " WHERE number = ? AND status = 'in_progress'",
                (code, message, number),
            )

    def set_attributes(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Replace the attributes of a file."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE attachments SET attributes = ? WHERE number = ?",
                (json.dumps(attributes), number),
            )

    def detach(self, store: str, file: str) -> None:
        """Forget a file of a store, and note that its passages must go."""
        with self._database.writing() as connection:
            self._detach(connection, "store = ? AND file = ?", (store, file))

    def detach_everywhere(self, file: str) -> None:
        """Forget a file in all stores, and note that its passages must go."""
        with self._database.writing() as connection:
            self._detach(connection, "file = ?", (file,))

    # Batches.

    def batch(self, store: str, batch: str) -> tuple[FileBatch, Counts]:
        """A batch and its files.

        Raises:
            NotFound: the store has no such batch.

        """
        rows = self._database.rows(
            "SELECT id, store, created_at, cancelled FROM batches WHERE id = ? AND store = ?",
            batch,
            store,
        )
        if not rows:
            raise NotFound(f"The vector store has no file batch {echoed(batch)}.")
        files = self._database.rows(
            "SELECT status, count(*), sum(nbytes) FROM attachments WHERE batch = ? GROUP BY status",
            batch,
        )
        number, owner, created_at, cancelled = rows[0]
        return FileBatch(number, owner, created_at, bool(cancelled)), _counts(files)

    def cancel_batch(self, batch: str) -> None:
        """Cancel what is still in progress."""
        with self._database.writing() as connection:
            cursor = connection.execute(
                "UPDATE attachments SET status = 'cancelled'"
                " WHERE batch = ? AND status = 'in_progress'",
                (batch,),
            )
            if cursor.rowcount:
                connection.execute("UPDATE batches SET cancelled = 1 WHERE id = ?", (batch,))

    # Removals.

    def removals(self) -> list[Removal]:
        """What must go from the database of vectors."""
        return self._database.rows(
            "SELECT sequence, store, attachment FROM removals ORDER BY sequence"
        )

    def removed(self, sequence: int) -> None:
        """Forget a removal that is done."""
        with self._database.writing() as connection:
            connection.execute("DELETE FROM removals WHERE sequence = ?", (sequence,))

    @staticmethod
    def _detach(connection: sqlite3.Connection, where: str, values: tuple[str, ...]) -> None:
        connection.execute(
            "INSERT INTO removals (store, attachment)"
            f" SELECT store, number FROM attachments WHERE {where}",
            values,
        )
        connection.execute(f"DELETE FROM attachments WHERE {where}", values)

    @staticmethod
    def _by_numbers(
        connection: sqlite3.Connection, numbers: Collection[int]
    ) -> dict[int, Attachment]:
        rows = connection.execute(
            f"SELECT {_ATTACHMENT} FROM attachments"
            " WHERE number IN (SELECT value FROM json_each(?))",
            (json.dumps(list(numbers)),),
        ).fetchall()
        return {row[0]: _attachment(row) for row in rows}

    def _page(
        self,
        query: str,
        values: list[Any],
        by: str,
        limit: int,
        order: Order,
        *,
        backwards: bool,
    ) -> tuple[list[tuple[Any, ...]], bool]:
        """A page; `backwards` it is the one just before an edge."""
        descending = (order == "desc") != backwards
        rows = self._database.rows(
            f"{query} ORDER BY {by} {'DESC' if descending else 'ASC'} LIMIT ?", *values, limit + 1
        )
        page = rows[:limit]
        return (page[::-1] if backwards else page), len(rows) > limit


def new_store_id() -> str:
    """The id of a new store. It cannot be guessed."""
    return f"vs_{secrets.token_hex(16)}"


def new_batch_id() -> str:
    """The id of a new batch."""
    return f"vsfb_{secrets.token_hex(16)}"


def _counts(rows: Sequence[tuple[Any, ...]]) -> Counts:
    return Counts(
        {AttachmentStatus(status): count for status, count, _ in rows},
        sum(nbytes for _, _, nbytes in rows),
    )


def _store_row(store: VectorStore) -> tuple[Any, ...]:
    return (
        store.id,
        store.owner,
        store.name,
        store.description,
        store.model,
        store.created_at,
        store.last_active_at,
        store.expires_days,
        json.dumps(store.metadata),
    )


def _store(row: tuple[Any, ...]) -> VectorStore:
    return VectorStore(
        id=row[0],
        owner=row[1],
        name=row[2],
        description=row[3],
        model=row[4],
        created_at=row[5],
        last_active_at=row[6],
        expires_days=row[7],
        metadata=json.loads(row[8]),
    )


def _attachment(row: tuple[Any, ...]) -> Attachment:
    return Attachment(
        number=row[0],
        store=row[1],
        file=row[2],
        filename=row[3],
        batch=row[4],
        caller=row[5],
        status=AttachmentStatus(row[6]),
        error=None if row[7] is None else (row[7], row[8]),
        chunking=Chunking(row[9], row[10]),
        attributes=json.loads(row[11]),
        nbytes=row[12],
        created_at=row[13],
    )
