"""Responses and conversations in one SQLite file, within a size and an age.

Those that belong together are a thread: a conversation with its responses, or a response and all
that followed it. A thread leaves as a whole, the least recently used first, so no turn that is kept
lacks what came before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from engine.errors import ConfigError
from server.responses.errors import no_conversation, no_item, no_response
from server.responses.items import Item
from server.responses.records import UNFINISHED, Conversation, Kept, Page

FILE_NAME = "responses.db"

SCHEMA_VERSION = 1
"""`PRAGMA user_version` of the file. A new version adds its step to `_migrate`."""

ROW_BYTES = 256
"""What a row takes beside its texts."""

Order: TypeAlias = Literal["asc", "desc"]

_BUSY_TIMEOUT_S = 5.0
_MODE = 0o600
_INPUT, _OUTPUT, _MEMBER = range(3)
"""What an item is of its response, and one that is of a conversation."""

_TABLES = f"""
BEGIN;
CREATE TABLE threads (
    id      TEXT PRIMARY KEY,
    owner   TEXT NOT NULL,
    used_at REAL NOT NULL,
    nbytes  INTEGER NOT NULL
) STRICT;
CREATE INDEX threads_used ON threads (used_at, nbytes);
CREATE TABLE responses (
    id           TEXT PRIMARY KEY,
    thread       TEXT NOT NULL REFERENCES threads ON DELETE CASCADE,
    previous     TEXT,
    conversation TEXT,
    seen         INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    status       TEXT NOT NULL,
    document     TEXT NOT NULL,
    background   INTEGER NOT NULL,
    job          TEXT,
    attempts     INTEGER NOT NULL,
    events       TEXT,
    deleted      INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX responses_thread ON responses (thread);
CREATE INDEX responses_previous ON responses (previous);
CREATE INDEX responses_unfinished ON responses (created_at) WHERE job IS NOT NULL;
CREATE TABLE conversations (
    id         TEXT PRIMARY KEY REFERENCES threads ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    metadata   TEXT NOT NULL,
    deleted    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE items (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id       TEXT NOT NULL,
    thread   TEXT NOT NULL REFERENCES threads ON DELETE CASCADE,
    holder   TEXT NOT NULL,
    part     INTEGER NOT NULL,
    item     TEXT NOT NULL
) STRICT;
CREATE INDEX items_holder ON items (holder, sequence);
CREATE INDEX items_thread ON items (thread);
CREATE INDEX items_id ON items (id);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_CHAIN = """
WITH RECURSIVE chain (id, depth) AS (
    SELECT ?, 0
    UNION ALL
    SELECT responses.previous, depth + 1 FROM chain JOIN responses USING (id)
    WHERE responses.previous IS NOT NULL
)
"""
"""A response and all before it."""

_KEPT = (
    "SELECT responses.id, owner, thread, document, responses.created_at, previous, conversation,"
    " seen, background, job, attempts FROM responses JOIN threads ON threads.id = thread"
)
_READABLE = (
    "(SELECT 1 FROM responses WHERE responses.id = holder AND NOT deleted"
    " UNION ALL SELECT 1 FROM conversations WHERE conversations.id = holder AND NOT deleted)"
)


class ResponseStore:
    """Every method blocks on the disk. What one writes is written whole or not at all.

    Writing methods may be called from one thread at a time, and reading ones from one other. An
    `owner` of None sees everybody's.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        max_age_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the file. `clock` gives Unix seconds.

        Raises:
            ConfigError: it was written by a newer version.
            sqlite3.Error, OSError: it cannot be used.

        """
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        path = folder / FILE_NAME
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # SQLite's other files take its mode
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _MODE))
        connections: list[sqlite3.Connection] = []
        try:
            self._writer = _connect(path, connections)
            _migrate(self._writer, path)
            self._reader = _connect(path, connections)
            with self._writing():
                self._leave("")
        except BaseException:
            for connection in connections:
                connection.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._writer.close()

    # Writing.

    def save(
        self, kept: Kept, inputs: Sequence[Item], outputs: Sequence[Item], *, spoken: bool
    ) -> None:
        """Add a response with its items, also to its conversation if it is `spoken`."""
        with self._writing():
            nbytes = self._add_items(kept.thread, kept.id, _INPUT, inputs, kept.owner)
            document, job = _dumped(kept.document), kept.job and _dumped(kept.job)
            self._writer.execute(
                "INSERT INTO responses (id, thread, previous, conversation, seen, created_at,"
                " status, document, background, job, attempts)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    kept.id,
                    kept.thread,
                    kept.previous,
                    kept.conversation,
                    kept.seen,
                    kept.created_at,
                    kept.status,
                    document,
                    kept.background,
                    job,
                    kept.attempts,
                ),
            )
            nbytes += len(document) + len(job or "") + ROW_BYTES
            nbytes += self._add_items(kept.thread, kept.id, _OUTPUT, outputs, kept.owner)
            if spoken and kept.conversation is not None:
                nbytes += self._extend(kept.conversation, [*inputs, *outputs], kept.owner)
            self._used(kept.thread, nbytes)

    def extend(self, conversation_id: str, owner: str, items: Sequence[Item]) -> None:
        """Add the items of a turn to its conversation, if it is still there."""
        with self._writing():
            nbytes = self._extend(conversation_id, items, owner)
            self._used(conversation_id, nbytes)

    def begin_run(self, response_id: str, document: dict[str, Any], attempts: int) -> bool:
        """Note that a job begins, or waits again; whether there still is one to run."""
        with self._writing():
            done = self._writer.execute(
                "UPDATE responses SET status = ?, document = ?, attempts = ?"
                " WHERE id = ? AND job IS NOT NULL AND NOT deleted",
                (document["status"], _dumped(document), attempts, response_id),
            )
        return done.rowcount > 0

    def end_run(
        self,
        response_id: str,
        document: dict[str, Any],
        outputs: Sequence[Item],
        events: Sequence[str] | None,
        members: Sequence[Item],
    ) -> bool:
        """Note how a job ended, once; whether it was not over before.

        `members` become items of its conversation.
        """
        with self._writing():
            row = self._writer.execute(
                "UPDATE responses SET status = ?, document = ?, job = NULL, events = ?"
                " WHERE id = ? AND job IS NOT NULL AND NOT deleted"
                " RETURNING thread, conversation,"
                " (SELECT owner FROM threads WHERE threads.id = thread)",
                (
                    document["status"],
                    _dumped(document),
                    None if events is None else json.dumps(events),
                    response_id,
                ),
            ).fetchone()
            if row is None:
                return False
            thread, conversation, owner = row
            self._add_items(thread, response_id, _OUTPUT, outputs, owner)
            if conversation is not None:
                self._extend(conversation, members, owner)
            self._recount(thread)
            self._used(thread, 0)
        return True

    def delete_response(self, response_id: str, owner: str | None) -> None:
        """Delete a response. Turns that followed it keep what it said as their context.

        Raises:
            NotFound: there is none.

        """
        with self._writing():
            kept = self._kept(self._writer, response_id, owner)
            self._writer.execute(
                "UPDATE responses SET deleted = 1, job = NULL, events = NULL WHERE id = ?",
                (response_id,),
            )
            self._purge(kept.thread)

    def add_conversation(self, conversation: Conversation, items: Sequence[Item]) -> None:
        """Add a conversation, and its first items."""
        with self._writing():
            nbytes = self._add_items(
                conversation.id, conversation.id, _MEMBER, items, conversation.owner
            )
            metadata = _dumped(conversation.metadata)
            self._writer.execute(
                "INSERT INTO conversations (id, created_at, metadata) VALUES (?, ?, ?)",
                (conversation.id, conversation.created_at, metadata),
            )
            self._used(conversation.id, nbytes + len(metadata) + ROW_BYTES)

    def change_conversation(
        self, conversation_id: str, owner: str | None, metadata: dict[str, str]
    ) -> Conversation:
        """Replace the metadata.

        Raises:
            NotFound: there is no such conversation.

        """
        with self._writing():
            found = self._conversation(self._writer, conversation_id, owner)
            self._writer.execute(
                "UPDATE conversations SET metadata = ? WHERE id = ?",
                (_dumped(metadata), conversation_id),
            )
            self._recount(conversation_id)
            self._used(conversation_id, 0)
        return Conversation(found.id, found.owner, found.created_at, metadata)

    def add_items(self, conversation_id: str, owner: str | None, items: Sequence[Item]) -> None:
        """Add items to a conversation.

        Raises:
            NotFound: there is no such conversation.

        """
        with self._writing():
            found = self._conversation(self._writer, conversation_id, owner)
            nbytes = self._add_items(conversation_id, conversation_id, _MEMBER, items, found.owner)
            self._used(conversation_id, nbytes)

    def delete_item(self, conversation_id: str, item_id: str, owner: str | None) -> Conversation:
        """Delete an item of a conversation.

        Raises:
            NotFound: there is no such item or conversation.

        """
        with self._writing():
            found = self._conversation(self._writer, conversation_id, owner)
            done = self._writer.execute(
                "DELETE FROM items WHERE holder = ? AND id = ?", (conversation_id, item_id)
            )
            if not done.rowcount:
                raise no_item(item_id)
            self._recount(conversation_id)
        return found

    def delete_conversation(self, conversation_id: str, owner: str | None) -> None:
        """Delete a conversation. Its items stay as the context of its responses, if there are any.

        Raises:
            NotFound: there is no such conversation.

        """
        with self._writing():
            self._conversation(self._writer, conversation_id, owner)
            self._writer.execute(
                "UPDATE conversations SET deleted = 1 WHERE id = ?", (conversation_id,)
            )
            self._purge(conversation_id)

    # Reading.

    def response(self, response_id: str, owner: str | None) -> Kept:
        """One response.

        Raises:
            NotFound: there is none.

        """
        return self._kept(self._reader, response_id, owner)

    def document(self, response_id: str, owner: str | None) -> dict[str, Any]:
        """One response as OpenAI's document.

        Raises:
            NotFound: there is none.

        """
        kept = self._kept(self._reader, response_id, owner)
        rows = self._reader.execute(
            "SELECT item FROM items WHERE holder = ? AND part = ? ORDER BY sequence",
            (response_id, _OUTPUT),
        )
        return {**kept.document, "output": [json.loads(item) for (item,) in rows]}

    def events(self, response_id: str, owner: str | None) -> list[str] | None:
        """The events of a job that was streamed; None if there are none.

        Raises:
            NotFound: there is no such response.

        """
        self._kept(self._reader, response_id, owner)
        (events,) = self._reader.execute(
            "SELECT events FROM responses WHERE id = ?", (response_id,)
        ).fetchone()
        return None if events is None else list(json.loads(events))

    def context(self, response_id: str) -> list[Item]:
        """The items of a response and of all turns before it, oldest first."""
        return self._context(response_id, _OUTPUT)

    def input_page(
        self, response_id: str, owner: str | None, limit: int, after: str | None, order: Order
    ) -> Page:
        """A page of the items that a response was made from, with those of earlier turns.

        Raises:
            NotFound: there is no such response, or no item `after`.

        """
        self._kept(self._reader, response_id, owner)
        items = self._context(response_id, _INPUT)
        if order == "desc":
            items.reverse()
        begin = 0
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise no_item(after, "after")
            begin = places[0] + 1
        return Page(items[begin : begin + limit], len(items) > begin + limit)

    def conversation(self, conversation_id: str, owner: str | None) -> Conversation:
        """One conversation.

        Raises:
            NotFound: there is none.

        """
        return self._conversation(self._reader, conversation_id, owner)

    def members(
        self, conversation_id: str, owner: str | None
    ) -> tuple[Conversation, list[Item], int]:
        """A conversation, all its items, and the place of the last.

        Raises:
            NotFound: there is no such conversation.

        """
        found = self._conversation(self._reader, conversation_id, owner)
        rows = self._reader.execute(
            "SELECT sequence, item FROM items WHERE holder = ? ORDER BY sequence",
            (conversation_id,),
        ).fetchall()
        return found, [json.loads(item) for _, item in rows], rows[-1][0] if rows else 0

    def member_page(
        self, conversation_id: str, owner: str | None, limit: int, after: str | None, order: Order
    ) -> Page:
        """A page of the items of a conversation.

        Raises:
            NotFound: there is no such conversation, or no item `after`.

        """
        self._conversation(self._reader, conversation_id, owner)
        way, beyond = ("ASC", ">") if order == "asc" else ("DESC", "<")
        where, values = "holder = ?", [conversation_id]
        if after is not None:
            edge = self._reader.execute(
                "SELECT sequence FROM items WHERE holder = ? AND id = ?", (conversation_id, after)
            ).fetchone()
            if edge is None:
                raise no_item(after, "after")
            where, values = f"{where} AND sequence {beyond} ?", [*values, edge[0]]
        rows = self._reader.execute(
            f"SELECT item FROM items WHERE {where} ORDER BY sequence {way} LIMIT ?",
            (*values, limit + 1),
        ).fetchall()
        return Page([json.loads(item) for (item,) in rows[:limit]], len(rows) > limit)

    def member(self, conversation_id: str, item_id: str, owner: str | None) -> Item:
        """One item of a conversation.

        Raises:
            NotFound: there is no such item or conversation.

        """
        self._conversation(self._reader, conversation_id, owner)
        row = self._reader.execute(
            "SELECT item FROM items WHERE holder = ? AND id = ?", (conversation_id, item_id)
        ).fetchone()
        if row is None:
            raise no_item(item_id)
        item: Item = json.loads(row[0])
        return item

    def find_items(self, item_ids: Sequence[str], owner: str | None) -> dict[str, Item]:
        """The items of these ids that the owner may read, wherever they are."""
        found: dict[str, Item] = {}
        for item_id in item_ids:
            row = self._reader.execute(
                "SELECT item FROM items JOIN threads ON threads.id = thread"
                f" WHERE items.id = ? AND (? IS NULL OR owner = ?) AND EXISTS {_READABLE} LIMIT 1",
                (item_id, owner, owner),
            ).fetchone()
            if row is not None:
                found[item_id] = json.loads(row[0])
        return found

    def unfinished(self) -> list[Kept]:
        """The jobs that have not ended, oldest first. For the writing thread."""
        rows = self._writer.execute(
            f"{_KEPT} WHERE job IS NOT NULL AND NOT deleted ORDER BY responses.created_at"
        ).fetchall()
        return [_kept_of(row) for row in rows]

    def held(self) -> tuple[int, int]:
        """How many threads there are, and their bytes. For the writing thread."""
        count, nbytes = self._writer.execute(
            "SELECT count(*), coalesce(sum(nbytes), 0) FROM threads"
        ).fetchone()
        return count, nbytes

    # Inside.

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:  # a full disk may have ended it
                self._writer.execute("ROLLBACK")
            raise

    def _oldest(self) -> float:
        return self._clock() - self._max_age_s

    def _kept(self, connection: sqlite3.Connection, response_id: str, owner: str | None) -> Kept:
        row = connection.execute(
            f"{_KEPT} WHERE responses.id = ? AND NOT deleted AND used_at > ?"
            " AND (? IS NULL OR owner = ?)",
            (response_id, self._oldest(), owner, owner),
        ).fetchone()
        if row is None:
            raise no_response(response_id)
        return _kept_of(row)

    def _conversation(
        self, connection: sqlite3.Connection, conversation_id: str, owner: str | None
    ) -> Conversation:
        row = connection.execute(
            "SELECT owner, created_at, metadata FROM conversations JOIN threads USING (id)"
            " WHERE id = ? AND NOT deleted AND used_at > ? AND (? IS NULL OR owner = ?)",
            (conversation_id, self._oldest(), owner, owner),
        ).fetchone()
        if row is None:
            raise no_conversation(conversation_id)
        return Conversation(conversation_id, row[0], row[1], json.loads(row[2]))

    def _context(self, response_id: str, last_part: int) -> list[Item]:
        """The items of the chain. Of the response itself the parts up to `last_part`."""
        chain = self._reader.execute(
            f"{_CHAIN} SELECT conversation, seen FROM chain JOIN responses USING (id)"
            " ORDER BY depth DESC LIMIT 1",
            (response_id,),
        ).fetchone()
        rows: list[tuple[str]] = []
        if chain is not None and chain[0] is not None:
            rows += self._reader.execute(
                "SELECT item FROM items WHERE holder = ? AND sequence <= ? ORDER BY sequence", chain
            ).fetchall()
        rows += self._reader.execute(
            # The sequence is that of time: a turn begins once the one before it has ended.
            f"{_CHAIN} SELECT item FROM chain JOIN items ON holder = chain.id"
            " WHERE depth > 0 OR part <= ? ORDER BY depth DESC, sequence",
            (response_id, last_part),
        ).fetchall()
        return [json.loads(item) for (item,) in rows]

    def _add_items(
        self, thread: str, holder: str, part: int, items: Sequence[Item], owner: str
    ) -> int:
        """Add items, and the thread where there is none; the bytes that they take."""
        self._writer.execute(
            "INSERT INTO threads (id, owner, used_at, nbytes) VALUES (?, ?, ?, 0)"
            " ON CONFLICT DO NOTHING",
            (thread, owner, self._clock()),
        )
        rows = [(item["id"], thread, holder, part, _dumped(item)) for item in items]
        self._writer.executemany(
            "INSERT INTO items (id, thread, holder, part, item) VALUES (?, ?, ?, ?, ?)", rows
        )
        return sum(len(row[-1]) + ROW_BYTES for row in rows)

    def _extend(self, conversation_id: str, items: Sequence[Item], owner: str) -> int:
        found = self._writer.execute(
            "SELECT 1 FROM conversations WHERE id = ? AND NOT deleted", (conversation_id,)
        ).fetchone()
        if found is None:
            return 0
        return self._add_items(conversation_id, conversation_id, _MEMBER, items, owner)

    def _used(self, thread: str, nbytes: int) -> None:
        self._writer.execute(
            "UPDATE threads SET used_at = ?, nbytes = nbytes + ? WHERE id = ?",
            (self._clock(), nbytes, thread),
        )
        self._leave(thread)

    def _leave(self, staying: str) -> None:
        """Delete the threads that are too old, and the oldest while all are too large."""
        idle = (
            "id != ? AND NOT EXISTS (SELECT 1 FROM responses"
            " WHERE thread = threads.id AND job IS NOT NULL)"
        )
        self._writer.execute(
            f"DELETE FROM threads WHERE used_at <= ? AND {idle}", (self._oldest(), staying)
        )
        _, nbytes = self.held()
        while nbytes > self._max_bytes:
            row = self._writer.execute(
                f"SELECT id, nbytes FROM threads WHERE {idle} ORDER BY used_at LIMIT 1", (staying,)
            ).fetchone()
            if row is None:
                return
            self._writer.execute("DELETE FROM threads WHERE id = ?", row[:1])
            nbytes -= row[1]

    def _purge(self, thread: str) -> None:
        """Delete of a thread what is deleted and no other turn needs."""
        while True:
            gone = self._writer.execute(
                "DELETE FROM responses WHERE thread = ? AND deleted AND NOT EXISTS"
                " (SELECT 1 FROM responses AS next WHERE next.previous = responses.id)"
                " RETURNING id",
                (thread,),
            ).fetchall()
            if not gone:
                break
            self._writer.executemany("DELETE FROM items WHERE holder = ?", gone)
        left = self._writer.execute(
            "SELECT (SELECT count(*) FROM responses WHERE thread = ?)"
            " + (SELECT count(*) FROM conversations WHERE id = ? AND NOT deleted)",
            (thread, thread),
        ).fetchone()
        if left == (0,):
            self._writer.execute("DELETE FROM threads WHERE id = ?", (thread,))
        else:
            self._recount(thread)

    def _recount(self, thread: str) -> None:
        self._writer.execute(
            f"""
            UPDATE threads SET nbytes =
                (SELECT coalesce(sum(length(item) + {ROW_BYTES}), 0) FROM items WHERE thread = ?1)
                + (SELECT coalesce(sum(length(document) + coalesce(length(job), 0)
                    + coalesce(length(events), 0) + {ROW_BYTES}), 0)
                    FROM responses WHERE thread = ?1)
                + (SELECT coalesce(sum(length(metadata) + {ROW_BYTES}), 0)
                    FROM conversations WHERE id = ?1)
            WHERE id = ?1
            """,
            (thread,),
        )


def is_unfinished(kept: Kept) -> bool:
    """Whether a response has not ended."""
    return kept.status in UNFINISHED


def _connect(path: Path, connections: list[sqlite3.Connection]) -> sqlite3.Connection:
    # Each connection is used by one thread at a time, though opened and closed on another.
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connections.append(connection)
    connection.execute("PRAGMA journal_mode = WAL")
    # No kill of the process loses a write. A loss of power may lose the last ones: no answer waits
    # for the disk itself.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what a client deletes is gone
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"engine.data_dir: {path} was written by a newer version of this program"
            f" (schema {version}, this one knows {SCHEMA_VERSION})."
        )
    if version == 0:
        connection.executescript(_TABLES)


def _dumped(document: Any) -> str:
    # In ASCII: half of a pair, which an escape can write, is no UTF-8. Characters are bytes then.
    return json.dumps(document, separators=(",", ":"))


def _kept_of(row: tuple[Any, ...]) -> Kept:
    return Kept(
        id=row[0],
        owner=row[1],
        thread=row[2],
        document=json.loads(row[3]),
        created_at=row[4],
        previous=row[5],
        conversation=row[6],
        seen=row[7],
        background=bool(row[8]),
        job=None if row[9] is None else json.loads(row[9]),
        attempts=row[10],
    )
