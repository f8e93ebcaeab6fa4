"""Fetching a repository of the hub, so that no byte is fetched twice.

huggingface_hub lists, authenticates, and keeps the cache in which every tool on this machine finds
the files. Its client keeps no part of a file whose download broke off, so this module fetches
the bytes. A part lies beside its blob as `ETAG.roundhouse.incomplete`, and the next fetch goes on
with it. A complete file is checked against the hash that names it. The client makes the snapshot
only when every file is there. Until then no program takes the repository for present.

Importing this module does not import the client, which takes a third of a second.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import IO, Any

from engine.errors import LoadFailed
from engine.files.hub.cache import PARTIAL, cache_dir, check_room, repo_dir
from engine.files.hub.client import headers
from engine.files.hub.digest import Digest
from engine.files.hub.errors import is_passing, plain_errors
from engine.files.hub.listing import RemoteFile, list_repo
from engine.files.hub.selection import HubSource

WORKERS = 4
"""Files fetched at once: one connection rarely fills a line, and eight starve other programs."""

ATTEMPTS = 5
"""How often in a row a file may break off without a new byte."""

RETRY_S = 1.0

LOCK_POLL_S = 1.0
"""How often to look whether the fetch was cancelled while another program has the file."""

CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is, over all files of a repository."""

    repo: str
    done_bytes: int
    """Of `total_bytes`, with what was there before."""
    total_bytes: int
    files_done: int
    files: int


class FetchCancelledError(Exception):
    """The caller stopped the fetch. What has arrived is kept; the next fetch goes on with it."""


OnProgress = Callable[[FetchProgress], None]


def fetch(
    source: HubSource,
    on_progress: OnProgress = lambda _: None,
    cancelled: threading.Event | None = None,
) -> Path:
    """Bring the wanted files of a repository into the cache; returns the folder of its snapshot.

    A caller that needs the sizes first uses `Fetch`.

    Raises:
        NotFound: there is no such repository or revision.
        LoadFailed: the hub does not answer or refuses, the disk lacks the room, or a file
            arrived damaged. Nothing was registered.
        FetchCancelledError: `cancelled` was set.

    """
    one = Fetch(source)
    check_room(one.missing_bytes, source.repo)
    return one.run(on_progress, cancelled or threading.Event())


class Fetch:
    """One fetch of the wanted files of a repository, several at a time."""

    def __init__(self, source: HubSource) -> None:
        """Ask the hub for the listing.

        Raises:
            NotFound: there is no such repository or revision.
            LoadFailed: the hub does not answer or refuses, or no weights there can be used here.

        """
        self.source = source
        self._listing = list_repo(source.repo, source.revision)
        self._chosen = self._listing.choose(source)
        self._blobs = repo_dir(source.repo) / "blobs"
        self._locks = cache_dir() / ".locks" / self._blobs.parent.name
        self._files = {file.etag: file for file in self._chosen}  # equal files are one blob
        self._on_progress: OnProgress = lambda _: None
        self._cancelled = threading.Event()
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._whole: set[str] = set()
        self._done_bytes = {
            etag: min(file.nbytes, self._held_bytes(etag)) for etag, file in self._files.items()
        }

    @property
    def total_bytes(self) -> int:
        """Of all wanted files."""
        return sum(file.nbytes for file in self._files.values())

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched and written."""
        return self.total_bytes - sum(self._done_bytes.values())

    @property
    def files(self) -> int:
        """How many files are wanted; equal ones count once."""
        return len(self._files)

    def run(self, on_progress: OnProgress, cancelled: threading.Event) -> Path:
        """Fetch what is missing; returns the folder of the snapshot. May take hours.

        Several threads call `on_progress`, one at a time. Setting `cancelled` ends the fetch at
        the next chunk.

        Raises:
            LoadFailed: the hub does not answer or refuses, the disk is full, or a file arrived
                damaged. Nothing was registered.
            FetchCancelledError: `cancelled` was set.

        """
        self._on_progress, self._cancelled = on_progress, cancelled
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoadFailed(f"cannot write to {cache_dir()}: {error.strerror or error}") from error
        self._tell()
        # Small files first: a refused repository fails before its weights are fetched.
        queue = sorted(self._files.values(), key=lambda file: file.nbytes)
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="hub-fetch") as pool:
            futures = [pool.submit(self._fetch_blob, file) for file in queue]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._failed.set()
                for future in futures:
                    future.cancel()
                raise
        return _register(self.source, self._chosen)

    def _held_bytes(self, etag: str) -> int:
        for path in (self._blobs / etag, self._partial(etag)):
            if path.exists():
                return path.stat().st_size
        return 0

    def _partial(self, etag: str) -> Path:
        return self._blobs / (etag + PARTIAL)

    def _tell(self) -> None:
        with self._lock:
            self._on_progress(
                FetchProgress(
                    self.source.repo,
                    sum(self._done_bytes.values()),
                    self.total_bytes,
                    len(self._whole),
                    self.files,
                )
            )

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set() or self._failed.is_set():
            raise FetchCancelledError

    def _fetch_blob(self, file: RemoteFile) -> None:
        blob = self._blobs / file.etag
        with self._locked(file.etag):
            if not blob.exists():
                try:
                    with plain_errors(self._listing.repo):
                        self._fetch_partial(file)
                except OSError as error:
                    raise self._disk_error(file, error) from error
                self._partial(file.etag).replace(blob)
            self._done_bytes[file.etag] = file.nbytes
            self._whole.add(file.etag)
        self._tell()

    @contextmanager
    def _locked(self, etag: str) -> Iterator[None]:
        """Hold the client's own lock of a blob, so that no other process fetches it as well."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._locks / f"{etag}.lock", timeout=LOCK_POLL_S, mode=0o664)
        while True:
            self._check_cancelled()
            try:
                lock.acquire()
                break
            except Timeout:
                continue
        try:
            yield
        finally:
            lock.release()

    def _disk_error(self, file: RemoteFile, error: OSError) -> LoadFailed:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return LoadFailed(f"cannot keep {file.path} of {self._listing.repo}: {error}")
        # Other programs write to this disk too; their bytes are worth more than this part.
        self._partial(file.etag).unlink(missing_ok=True)
        return LoadFailed(
            f"the disk of {cache_dir()} is full: {file.path} of {self._listing.repo} was not"
            " fetched, and its model is not there; make room (`roundhouse prune`) and pull again,"
            " which goes on with the files that are whole"
        )

    def _fetch_partial(self, file: RemoteFile) -> None:
        """Complete the part of a file, and check it."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        # Unbuffered: if this process dies, the file holds all that arrived.
        with self._partial(file.etag).open("a+b", buffering=0) as partial:
            if partial.tell() > file.nbytes:
                _empty(partial)
            digest = _digest_of(partial, file)
            attempts = 0
            while (offset := partial.tell()) < file.nbytes:
                try:
                    self._stream(file, partial, digest, offset)
                except (httpx2.TransportError, HfHubHTTPError) as error:
                    if isinstance(error, HfHubHTTPError) and not is_passing(error):
                        raise
                    attempts = attempts + 1 if partial.tell() == offset else 1
                    if attempts >= ATTEMPTS:
                        raise
                    self._cancelled.wait(RETRY_S)
                    self._check_cancelled()
        if digest.is_wrong():
            self._partial(file.etag).unlink()
            raise LoadFailed(
                f"{file.path} of {self._listing.repo} is not what the hub says it is; it was"
                " thrown away: pull again"
            )

    def _stream(self, file: RemoteFile, partial: IO[bytes], digest: Digest, offset: int) -> None:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status

        asked = {**headers(), "accept-encoding": "identity"}
        if offset:
            asked["range"] = f"bytes={offset}-"
        with get_session().stream(
            "GET",
            hf_hub_url(self._listing.repo, file.path, revision=self._listing.commit),
            headers=asked,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as answer:
            hf_raise_for_status(answer)
            if offset and answer.status_code != 206:  # the hub sends from the beginning
                _empty(partial)
                digest.restart()
            for chunk in answer.iter_bytes():
                self._check_cancelled()
                _write_all(partial, chunk)
                digest.update(chunk)
                self._done_bytes[file.etag] = partial.tell()
                self._tell()
                if partial.tell() > file.nbytes:
                    raise LoadFailed(f"{file.path} of {self._listing.repo} is longer than listed")


def _digest_of(partial: IO[bytes], file: RemoteFile) -> Digest:
    """The hash of the bytes that are in the file already; leaves the file at its end."""
    digest = Digest(file)
    partial.seek(0)
    while chunk := partial.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _write_all(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # an unbuffered write may take less on a disk that is nearly full
        rest = rest[file.write(rest) :]


def _register(source: HubSource, files: Sequence[RemoteFile]) -> Path:
    """Let the client make the snapshot from the blobs, which are all here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    silent: Any = partial(tqdm, disable=True)
    names = [escape(file.path) for file in files]
    with plain_errors(source.repo):
        return Path(
            snapshot_download(
                source.repo, revision=source.revision, allow_patterns=names, tqdm_class=silent
            )
        )
