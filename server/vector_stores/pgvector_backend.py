"""Vectors in a PostgreSQL with pgvector."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import ConfigError, Conflict, Overloaded
from server.vector_stores.backend import Loaded, Near, Passage

if TYPE_CHECKING:
    from server.vector_stores.backend import Vectors

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10
MAX_IDLE = 4
"""Connections that are kept open."""
RETRY_AFTER_S = 5.0

_LOCK = 7_231_114
"""An advisory lock: several servers may begin at once."""

_TABLES = """
CREATE TABLE IF NOT EXISTS roundhouse_passages (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    store      text NOT NULL,
    attachment bigint NOT NULL,
    ordinal    integer NOT NULL,
    text       text NOT NULL,
    vector     vector NOT NULL
);
CREATE INDEX IF NOT EXISTS roundhouse_passages_attachment
    ON roundhouse_passages (store, attachment, ordinal);
"""

ResultT = TypeVar("ResultT")


class PgvectorBackend:
    """See `Backend`. Each call has a connection of its own, and some stay open between calls."""

    def __init__(self, url: str) -> None:
        """Connect, and make the table if need be.

        Raises:
            ConfigError: there is no such database, or no pgvector. The message has no password.

        """
        self._url = url
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        try:
            import psycopg
        except ImportError as error:
            raise ConfigError(
                f"vector_stores.url: PostgreSQL needs the package psycopg[binary]: {error}"
            ) from error
        self._error: type[Exception] = psycopg.Error
        self._lost: type[Exception] = psycopg.OperationalError
        try:
            with self._connect() as connection, connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
                connection.execute(_TABLES)
        except psycopg.Error as error:
            raise ConfigError(
                f"vector_stores.url: the PostgreSQL cannot be used: {_reason(error)}"
            ) from None

    def close(self) -> None:
        """Close the open connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def add(
        self, store: str, attachment: int, texts: Sequence[str], vectors: Vectors
    ) -> Sequence[int]:
        """Keep the passages of a file; their ids. See `Backend.add`."""

        def insert(connection: Any) -> list[int]:
            _check_dimensions(connection, store, vectors.shape[1])
            rows = [
                (store, attachment, ordinal, text.replace("\0", ""), _written(vector))
                for ordinal, (text, vector) in enumerate(zip(texts, vectors, strict=True))
            ]
            with connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO roundhouse_passages (store, attachment, ordinal, text, vector)"
                    " VALUES (%s, %s, %s, %s, %s) RETURNING id",
                    rows,
                    returning=True,
                )
                return [result.fetchone()[0] for result in cursor.results()]

        return self._run(insert)

    def remove(self, store: str, attachment: int) -> None:
        """Forget the passages of a file, if there are any."""
        self._run(
            lambda connection: connection.execute(
                "DELETE FROM roundhouse_passages WHERE store = %s AND attachment = %s",
                (store, attachment),
            )
        )

    def drop(self, store: str) -> None:
        """Forget a store, if it is there."""
        self._run(
            lambda connection: connection.execute(
                "DELETE FROM roundhouse_passages WHERE store = %s", (store,)
            )
        )

    def size(self, store: str) -> tuple[int, int]:
        """The vectors of a store and their dimensions; zeros if there are none."""
        query = (
            "SELECT count(*), coalesce(max(vector_dims(vector)), 0) FROM roundhouse_passages"
            " WHERE store = %s"
        )
        count, dimensions = self._rows(query, store)[0]
        return int(count), int(dimensions)

    def load(self, store: str) -> Loaded:
        """All vectors of a store, by the ids of their passages."""
        import numpy as np

        def copy(connection: Any) -> tuple[list[int], list[int], list[bytes]]:
            passages, attachments, vectors = [], [], []
            with connection.cursor(binary=True) as cursor:
                cursor.execute(
                    "SELECT id, attachment, vector_send(vector) FROM roundhouse_passages"
                    " WHERE store = %s ORDER BY id",
                    (store,),
                )
                for passage, attachment, vector in cursor:
                    passages.append(passage)
                    attachments.append(attachment)
                    vectors.append(vector[4:])  # behind the number of dimensions
            return passages, attachments, vectors

        passages, attachments, vectors = self._run(copy)
        numbers = np.frombuffer(b"".join(vectors), ">f4").astype(np.float32)
        return Loaded(
            np.array(passages, np.int64),
            np.array(attachments, np.int64),
            numbers.reshape(len(passages), -1) if passages else np.zeros((0, 0), np.float32),
        )

    def nearest(
        self, store: str, vector: Vectors, most: int, among: Collection[int] | None
    ) -> list[Near]:
        """The passages nearest to a vector, exactly. See `Backend.nearest`."""

        def search(connection: Any) -> list[Near]:
            _check_dimensions(connection, store, len(vector))
            query = (
                # Of vectors of length 1 this is the cosine. There is no index of vectors, so that
                # the result is exact.
                "SELECT id, attachment, -(vector <#> %s::vector) AS score FROM roundhouse_passages"
                f" WHERE store = %s{'' if among is None else ' AND attachment = ANY(%s)'}"
                " ORDER BY score DESC, id LIMIT %s"
            )
            chosen = () if among is None else (list(among),)
            values = (_written(vector), store, *chosen, most)
            return [Near(*row) for row in connection.execute(query, values).fetchall()]

        return self._run(search)

    def read(self, passages: Collection[int]) -> Mapping[int, Passage]:
        """Passages by their ids. One that is gone is missing."""
        query = "SELECT id, attachment, ordinal, text FROM roundhouse_passages WHERE id = ANY(%s)"
        return {row[0]: Passage(*row[1:]) for row in self._rows(query, list(passages))}

    def texts(self, store: str, attachment: int) -> list[str]:
        """The passages of a file, in order."""
        query = (
            "SELECT text FROM roundhouse_passages WHERE store = %s AND attachment = %s"
            " ORDER BY ordinal"
        )
        return [row[0] for row in self._rows(query, store, attachment)]

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._run(lambda connection: connection.execute(query, values).fetchall())

    def _run(self, work: Callable[[Any], ResultT]) -> ResultT:
        """What `work` returns, in a transaction.

        A connection that was lost while it was idle is replaced once.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        with self._named():
            if connection is not None:
                try:
                    return self._run_with(connection, work)
                except self._lost:
                    log.info("a connection to the PostgreSQL of vector stores was lost")
            return self._run_with(self._connect(), work)

    def _run_with(self, connection: Any, work: Callable[[Any], ResultT]) -> ResultT:
        try:
            with connection.transaction():
                result = work(connection)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
                return result
        connection.close()
        return result

    def _connect(self) -> Any:
        import psycopg

        return psycopg.connect(self._url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)

    @contextlib.contextmanager
    def _named(self) -> Generator[None, None, None]:
        try:
            yield
        except self._error as error:
            log.error("the PostgreSQL of vector stores: %s", _reason(error))
            raise Overloaded(
                "The database of vector stores cannot be used at this moment.",
                retry_after_s=RETRY_AFTER_S,
            ) from None


def _check_dimensions(connection: Any, store: str, dimensions: int) -> None:
    row = connection.execute(
        "SELECT vector_dims(vector) FROM roundhouse_passages WHERE store = %s LIMIT 1", (store,)
    ).fetchone()
    if row is not None and row[0] != dimensions:
        raise Conflict(
            f"The vector store {store} has vectors of {row[0]} dimensions, and its embedding model"
            f" gives {dimensions} now. Make a new vector store."
        )


def _written(vector: Vectors) -> str:
    """The vector in pgvector's form. Nine digits keep a float32 as it is."""
    return f"[{','.join(f'{number:.9g}' for number in vector.tolist())}]"


def _reason(error: BaseException) -> str:
    """The first line of an error. Those of libpq have no password."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
