"""The vector stores of a server: what clients do with them, and the work behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.caller import Caller
from engine.errors import (
    ConfigError,
    Conflict,
    EngineError,
    InvalidRequest,
    NoSpaceLeft,
    NotFound,
    Overloaded,
    ShuttingDown,
)
from engine.requests import Priority
from engine.words import without_folders
from server.keys.access import Access
from server.stored_files.record import Viewer
from server.stored_files.store import FileStore
from server.vector_store_config import SQLITE, VectorStoreConfig
from server.vector_stores.chunking import Chunking, passages
from server.vector_stores.document_text import UnreadableFile, document_text
from server.vector_stores.embedder import Embedder
from server.vector_stores.fair_queue import FairQueue
from server.vector_stores.filters import Attributes, Filter
from server.vector_stores.held_vectors import HeldVectors
from server.vector_stores.record_store import RecordStore, new_batch_id, new_store_id
from server.vector_stores.records import (
    Attachment,
    AttachmentStatus,
    Counts,
    FileBatch,
    VectorStore,
    Wanted,
)

if TYPE_CHECKING:
    from server.vector_stores.backend import Backend, Near, Passage, Vectors

log = logging.getLogger(__name__)

INDEXERS = 2
"""Files that are read and embedded at the same time."""

SWEEP_S = 600.0
"""The interval of looking for stores that have expired."""

TOUCH_S = 60
"""How exact the time of the last use is: each change of it is a write."""

RANKED = 50
"""A search has so many passages ranked, or as many as it wants."""

CACHED_ATTRIBUTES = 64
"""Stores whose attributes are kept, parsed."""

EVERYBODY = Viewer("", sees_all=True)

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Found:
    """A result of a search."""

    attachment: Attachment
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched for."""

    queries: Sequence[str]
    most: int
    filter: Filter | None = None
    ranks: bool = True
    """Whether the configured model may rank what was found."""
    least_score: float = 0.0


class VectorStores:
    """Lives on the event loop. What blocks is done on threads."""

    def __init__(
        self,
        data_dir: Path,
        config: VectorStoreConfig,
        files: FileStore,
        embedder: Embedder,
        find_caller: Callable[[str], Caller | None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Touches no disk. `find_caller` gives the caller of a key's name; None: it is gone."""
        self._data_dir = data_dir
        self._config = config
        self._files = files
        self._embedder = embedder
        self._find_caller = find_caller
        self._clock = clock
        self._records_: RecordStore | None = None
        self._held: HeldVectors | None = None
        self._opening = threading.Lock()
        self._queue = FairQueue()
        self._tasks: list[asyncio.Task[None]] = []
        self._attributes: OrderedDict[str, Mapping[int, Attributes]] = OrderedDict()
        self._attributes_lock = threading.Lock()

    async def start(self) -> None:
        """Go on with the files that were in progress. The stored files must be open.

        Raises:
            ConfigError: the records cannot be used.

        """
        self._records_ = await asyncio.to_thread(RecordStore, self._data_dir)
        for number, caller in await asyncio.to_thread(self._records.pending):
            self._queue.put(caller, number)
        self._tasks = [asyncio.create_task(self._index_all()) for _ in range(INDEXERS)]
        self._tasks.append(asyncio.create_task(self._sweep()))
        self._files.on_deleted.append(self.on_file_deleted)

    async def stop(self) -> None:
        """Stop, and keep what is in progress for the next start."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []
        with contextlib.suppress(ValueError):
            self._files.on_deleted.remove(self.on_file_deleted)
        records, self._records_ = self._records_, None
        held, self._held = self._held, None
        if held is not None:
            await asyncio.to_thread(held.close)
        if records is not None:
            await asyncio.to_thread(records.close)

    # Stores.

    async def create(
        self,
        viewer: Viewer,
        access: Access,
        *,
        name: str,
        description: str | None,
        metadata: Mapping[str, str] | None,
        expires_days: int | None,
        files: Sequence[str],
        chunking: Chunking | None,
    ) -> VectorStore:
        """Make a store, and attach files to it. `chunking` None is automatic.

        Raises:
            EngineError: naming the field at fault. Nothing is made then.

        """
        model = self._embedder.default_model()
        access.check_model(model)
        wanted = await self._wanted(
            viewer, model, [(file, chunking, {}) for file in files], "file_ids"
        )
        now = int(self._clock())
        store = VectorStore(
            id=new_store_id(),
            owner=viewer.name,
            name=name,
            description=description,
            model=model,
            created_at=now,
            last_active_at=now,
            expires_days=expires_days,
            metadata=metadata,
        )
        self._check_number(wanted)
        await self._do(self._records.add_store, store, self._config.max_stores)
        if wanted:
            await self._attach(store, wanted, access.caller.name)
        return store

    async def get(self, viewer: Viewer, store: str) -> tuple[VectorStore, Counts]:
        """A store, and its files."""
        found = await self._do(self._records.store, viewer, store)
        return found, (await self._do(self._records.counts, [found.id]))[found.id]

    async def page(
        self, viewer: Viewer, **page: Any
    ) -> tuple[list[tuple[VectorStore, Counts]], bool]:
        """A page of the stores with their files. See `RecordStore.stores`."""

        def read() -> tuple[list[tuple[VectorStore, Counts]], bool]:
            found, more = self._records.stores(viewer, **page)
            counts = self._records.counts([store.id for store in found])
            return [(store, counts[store.id]) for store in found], more

        return await asyncio.to_thread(read)

    async def update(
        self, viewer: Viewer, store: str, changes: Mapping[str, Any]
    ) -> tuple[VectorStore, Counts]:
        """Change fields of a store, which counts as a use of it."""
        found = await self._do(self._records.store, viewer, store)
        self._check_alive(found)
        changed = replace(found, **changes, last_active_at=int(self._clock()))
        await self._do(self._records.change_store, changed)
        return await self.get(viewer, store)

    async def delete(self, viewer: Viewer, store: str) -> None:
        """Delete a store with its files and vectors. The stored files stay."""
        found = await self._do(self._records.store, viewer, store)
        await self._do(self._records.delete_store, found.id)
        await asyncio.to_thread(self._remove_all)

    def is_expired(self, store: VectorStore) -> bool:
        """Whether a store has expired."""
        return store.expires_at is not None and store.expires_at <= self._clock()

    # Files.

    async def attach(
        self,
        viewer: Viewer,
        access: Access,
        store: str,
        files: Sequence[tuple[str, Chunking | None, Attributes]],
        param: str,
        *,
        batched: bool = False,
    ) -> tuple[list[Attachment], str | None]:
        """Attach files: id, chunking (None: automatic) and attributes. `param` names the field.

        Returns:
            The files, and the id of their batch if they are `batched`.

        Raises:
            EngineError: naming the field at fault. Nothing is attached then.

        """
        found = await self._do(self._records.store, viewer, store)
        self._check_alive(found)
        access.check_model(self._embedder.find(found.model).id)
        wanted = await self._wanted(viewer, found.model, files, param)
        self._check_number(wanted)
        batch = new_batch_id() if batched else None
        return await self._attach(found, wanted, access.caller.name, batch), batch

    async def attachment(self, viewer: Viewer, store: str, file: str) -> Attachment:
        """A file of a store."""
        found = await self._do(self._records.store, viewer, store)
        return await self._do(self._records.attachment, found.id, file)

    async def attachments(
        self, viewer: Viewer, store: str, *, batch: str | None = None, **page: Any
    ) -> tuple[Sequence[Attachment], bool]:
        """A page of the files of a store or a batch. See `RecordStore.attachments`."""
        found = await self._do(self._records.store, viewer, store)
        if batch is not None:
            await self._do(self._records.batch, found.id, batch)

        def read() -> tuple[Sequence[Attachment], bool]:
            return self._records.attachments(found.id, batch=batch, **page)

        return await asyncio.to_thread(read)

    async def set_attributes(
        self, viewer: Viewer, store: str, file: str, attributes: Attributes
    ) -> Attachment:
        """Replace the attributes of a file."""
        attachment = await self.attachment(viewer, store, file)
        await self._do(self._records.set_attributes, attachment.number, attributes)
        self._forget_attributes(store)
        return replace(attachment, attributes=attributes)

    async def content(self, viewer: Viewer, store: str, file: str) -> list[str]:
        """The passages of a file, in order.

        Raises:
            Conflict: it is not completed.

        """
        attachment = await self.attachment(viewer, store, file)
        if attachment.status is not AttachmentStatus.COMPLETED:
            raise Conflict(f"The file is {attachment.status.value}, so it has no content here.")
        return await asyncio.to_thread(
            lambda: self._vectors().texts(attachment.store, attachment.number)
        )

    async def detach(self, viewer: Viewer, store: str, file: str) -> None:
        """Take a file out of a store. The stored file stays."""
        attachment = await self.attachment(viewer, store, file)
        await self._do(self._records.detach, attachment.store, attachment.file)
        self._forget_attributes(store)
        await asyncio.to_thread(self._remove_all)

    def on_file_deleted(self, file: str) -> None:
        """Take a deleted file out of all stores. For the thread that deleted it."""
        self._records.detach_everywhere(file)
        self._remove_all()

    # Batches.

    async def batch(self, viewer: Viewer, store: str, batch: str) -> tuple[FileBatch, Counts]:
        """A batch and its files."""
        found = await self._do(self._records.store, viewer, store)
        return await self._do(self._records.batch, found.id, batch)

    async def cancel_batch(
        self, viewer: Viewer, store: str, batch: str
    ) -> tuple[FileBatch, Counts]:
        """Cancel the files of a batch that are still in progress."""
        await self.batch(viewer, store, batch)
        await self._do(self._records.cancel_batch, batch)
        return await self.batch(viewer, store, batch)

    # Search.

    async def search(
        self,
        viewer: Viewer,
        access: Access,
        store: str,
        search: Search,
        *,
        param: str | None = None,
    ) -> list[Found]:
        """The best passages of a store, best first.

        Raises:
            EngineError: there is no such store, or its models cannot be used.

        """
        found, model, ranker = await self._searchable(
            viewer, access, store, ranks=search.ranks, param=param
        )
        vectors = await self._embedder.queries(model, search.queries, access.caller)
        most = search.most if ranker is None else max(RANKED, search.most)
        results = await asyncio.to_thread(self._nearest, found, vectors, most, search.filter)
        if ranker is not None and results:
            results = await self._ranked(results, search.queries, access.caller)
        kept = [each for each in results if each.score >= search.least_score]
        return kept[: search.most]

    async def check(
        self, viewer: Viewer, access: Access, store: str, *, ranks: bool, param: str
    ) -> None:
        """Return if the caller may search a store. `param` names it. No model is asked.

        Raises:
            EngineError: there is no such store, it has expired, or its models cannot be used.

        """
        await self._searchable(viewer, access, store, ranks=ranks, param=param)

    async def _searchable(
        self, viewer: Viewer, access: Access, store: str, *, ranks: bool, param: str | None
    ) -> tuple[VectorStore, str, str | None]:
        """A store with the ids of the models that embed and rank for it."""
        found = await self._do(lambda: self._records.store(viewer, store, param=param))
        self._check_alive(found)
        model = self._embedder.find(found.model).id
        access.check_model(model)
        ranker = self._embedder.rerank_model if ranks else None
        if ranker is not None:
            access.check_model(ranker)
        return found, model, ranker

    async def _ranked(
        self, results: Sequence[Found], queries: Sequence[str], caller: Caller
    ) -> list[Found]:
        """The results by the scores of the model that ranks; of several queries the best counts."""
        texts = [result.text for result in results]
        scores = [await self._embedder.rank(query, texts, caller) for query in queries]
        ranked = [
            replace(result, score=max(of_query[index] for of_query in scores))
            for index, result in enumerate(results)
        ]
        return sorted(ranked, key=lambda result: -result.score)

    def _nearest(
        self, store: VectorStore, vectors: Vectors, most: int, wanted: Filter | None
    ) -> list[Found]:
        now = int(self._clock())
        if now - store.last_active_at >= TOUCH_S:
            self._records.touch(store.id, now)
        among: Collection[int] | None = None
        if wanted is not None:
            among = [
                number for number, each in self._attributes_of(store.id).items() if wanted(each)
            ]
            if not among:
                return []
        held = self._vectors()
        best: dict[int, Near] = {}
        for vector in vectors:
            for near in held.nearest(store.id, vector, most, among):
                known = best.get(near.passage)
                if known is None or known.score < near.score:
                    best[near.passage] = near
        chosen = sorted(best.values(), key=lambda near: (-near.score, near.passage))[:most]
        texts: Mapping[int, Passage] = held.read([near.passage for near in chosen])
        owners = self._records.by_numbers({near.attachment for near in chosen})
        return [
            Found(
                owners[near.attachment],
                texts[near.passage].text,
                # OpenAI's contract has no scores below 0.
                min(1.0, max(0.0, near.score)),
            )
            for near in chosen
            # A file may have been detached or cancelled a moment ago.
            if near.passage in texts
            and near.attachment in owners
            and owners[near.attachment].status is AttachmentStatus.COMPLETED
        ]

    def _attributes_of(self, store: str) -> Mapping[int, Attributes]:
        with self._attributes_lock:
            known = self._attributes.get(store)
            if known is None:
                known = self._attributes[store] = dict(self._records.completed(store))
                while len(self._attributes) > CACHED_ATTRIBUTES:
                    self._attributes.popitem(last=False)
            self._attributes.move_to_end(store)
            return known

    def _forget_attributes(self, store: str) -> None:
        with self._attributes_lock:
            self._attributes.pop(store, None)

    # The work behind.

    async def _wanted(
        self,
        viewer: Viewer,
        model: str,
        files: Sequence[tuple[str, Chunking | None, Attributes]],
        param: str,
    ) -> list[Wanted]:
        """Check files that are to be attached."""
        limit = await self._embedder.known_limit(model) if files else None

        def check() -> list[Wanted]:
            found: dict[str, Wanted] = {}
            for file, chunking, attributes in files:
                stored = self._files.get(viewer, file, param=param)
                if chunking is not None and limit is not None and chunking.max_tokens > limit:
                    field = "chunking_strategy.static.max_chunk_size_tokens"
                    raise InvalidRequest(
                        f"{field}: the embedding model {model!r} reads {limit} tokens at most.",
                        param=field,
                    )
                chosen = chunking or Chunking.auto(limit)
                found[file] = Wanted(file, stored.filename, chosen, attributes)
            return list(found.values())

        return await asyncio.to_thread(check)

    def _check_number(self, wanted: Sequence[Wanted]) -> None:
        most = self._config.max_files
        if len(wanted) > most:
            raise NoSpaceLeft(f"A vector store has at most {most} files (vector_stores.max_files).")

    def _check_alive(self, store: VectorStore) -> None:
        if self.is_expired(store):
            raise Conflict(f"The vector store {store.id} has expired.")

    async def _attach(
        self, store: VectorStore, wanted: Sequence[Wanted], caller: str, batch: str | None = None
    ) -> list[Attachment]:
        def attach() -> list[Attachment]:
            attached = self._records.attach(
                store, wanted, caller, int(self._clock()), self._config.max_files, batch=batch
            )
            self._remove_all()
            return attached

        attached = await asyncio.to_thread(attach)
        self._forget_attributes(store.id)
        for each in attached:
            self._queue.put(caller, each.number)
        return attached

    async def _index_all(self) -> None:
        while True:
            number = await self._queue.get()
            try:
                await self._index(number)
            except ShuttingDown:
                return  # the next start goes on
            except UnreadableFile as error:
                await self._fail(number, error.code, error.message)
            except NotFound:
                await self._fail(number, "invalid_file", "The file is not stored any more.")
            except EngineError as error:
                log.warning("a file cannot be added to a vector store: %s", error)
                await self._fail(number, "server_error", without_folders(error.message))
            except Exception:
                log.exception("a file cannot be added to a vector store")
                await self._fail(number, "server_error", "The server failed.")

    async def _fail(self, number: int, code: str, message: str) -> None:
        try:
            await self._do(self._records.fail, number, code, message)
        except Exception as error:  # such as a full disk: the next start tries the file again
            log.error("cannot note the failure of a file of a vector store: %s", error)

    async def _index(self, number: int) -> None:
        """Read a file, and keep its passages and their vectors."""
        attachment = (await self._do(self._records.by_numbers, [number])).get(number)
        if attachment is None or attachment.status is not AttachmentStatus.IN_PROGRESS:
            return
        store = await self._do(self._records.store, EVERYBODY, attachment.store)
        caller = self._find_caller(attachment.caller)
        if caller is None:
            raise Conflict(f"The key {attachment.caller!r}, which attached the file, is gone.")
        tokens = await self._embedder.tokens(store.model, caller, Priority.BATCH)

        def read() -> list[str]:
            file, stream = self._files.open_file(EVERYBODY, attachment.file)
            stream.close()
            if file.nbytes > self._config.max_file_bytes:
                most = self._config.max_file_bytes
                message = f"The file is larger than {most} bytes (vector_stores.max_file_bytes)."
                raise UnreadableFile("invalid_file", message)
            text = document_text(self._files.path(file), attachment.filename)
            return passages(text, tokens.spans(text), attachment.chunking)

        texts = await asyncio.to_thread(read)
        vectors = await self._embedder.passages(store.model, texts, caller)
        nbytes = vectors.nbytes + sum(len(text.encode()) for text in texts)

        def keep() -> None:
            if self._records.nbytes() + nbytes > self._config.max_bytes:
                raise NoSpaceLeft("The server has no room for further passages.")
            held = self._vectors()
            # What a killed process has added, without that its record says so.
            held.remove(store.id, number)
            held.add(store.id, number, texts, vectors)
            if not self._records.complete(number, nbytes):
                held.remove(store.id, number)
                with contextlib.suppress(NotFound):
                    self._records.store(EVERYBODY, store.id)
                    return
                held.drop(store.id)  # it was deleted just now

        await asyncio.to_thread(keep)
        self._forget_attributes(store.id)

    async def _sweep(self) -> None:
        """Remove what is left to remove, and empty the stores that have expired."""
        while True:
            try:
                await self._do(self._records.expire, int(self._clock()))
                await asyncio.to_thread(self._remove_all)
            except Exception as error:
                log.error("cannot sweep the vector stores: %s", error)
            await asyncio.sleep(SWEEP_S)

    def _remove_all(self) -> None:
        """Remove the vectors of which a removal is noted. What fails is tried again later."""
        for sequence, store, attachment in self._records.removals():
            try:
                held = self._vectors()
                if attachment is None:
                    held.drop(store)
                else:
                    held.remove(store, attachment)
                self._records.removed(sequence)
            except Exception as error:
                log.error("vectors of a deleted file cannot be removed now: %s", error)
                return

    @property
    def _records(self) -> RecordStore:
        if self._records_ is None:
            raise Overloaded("Vector stores are not served at this moment.", retry_after_s=5.0)
        return self._records_

    def _vectors(self) -> HeldVectors:
        """The vectors, whose database is opened for the first use."""
        with self._opening:
            if self._held is None:
                try:
                    self._held = HeldVectors(self._open_backend(), self._config.memory)
                except ConfigError as error:
                    log.error("%s", error)
                    raise Overloaded(
                        "The database of vector stores cannot be used at this moment.",
                        retry_after_s=5.0,
                    ) from None
            return self._held

    def _open_backend(self) -> Backend:
        # Each brings a library that only its users need.
        if self._config.url == SQLITE:
            from server.vector_stores.sqlite_backend import SqliteBackend

            return SqliteBackend(self._data_dir)
        from server.vector_stores.pgvector_backend import PgvectorBackend

        return PgvectorBackend(self._config.url)

    @staticmethod
    async def _do(work: Callable[..., ResultT], *arguments: Any) -> ResultT:
        return await asyncio.to_thread(work, *arguments)
