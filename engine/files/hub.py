"""The model hub: what a repository holds, and fetching it so that nothing is fetched twice.

huggingface_hub lists, authenticates, and keeps the cache in which every tool on this machine finds
the files. Fetching the bytes is done here, since the client keeps no part of a file whose download
was interrupted: a part lies beside its blob as `ETAG.roundhouse.incomplete` and is gone on with,
and what arrived is checked against the hash that names it. Only when every file is there does the
client make the snapshot of them: until then no program takes the repository for present.

Nothing here imports the client before it is needed; it takes a third of a second.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from engine.errors import LoadFailed, NotFound
from engine.units import format_size

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile, RepoFolder

MAIN = "main"
"""The revision where none is named."""

WORKERS = 4
"""Files fetched at once: one connection rarely fills a line, and eight starve other programs."""

ATTEMPTS = 5
"""How often in a row a file may break off without a new byte."""

RETRY_S = 1.0

LOCK_POLL_S = 1.0
"""How often to look whether the fetch was cancelled while another program has the file."""

CHUNK_BYTES = 2**20

MAX_JSON_BYTES = 16 * 2**20
"""Of a file that is read to learn what a repository is; `tokenizer.json` is not among them."""

PARTIAL = ".roundhouse.incomplete"
"""Ends the name of a part; the client counts `*.incomplete` as unfinished and passes over it."""

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".gguf", ".onnx")
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
"""What is fetched instead of safetensors, and only where that was allowed."""

_VARIANT = re.compile(
    r"(?P<base>.+?)\.(?:fp16|fp32|bf16|fp8\w*|int8|ema|non_ema)(?P<shard>-\d+-of-\d+)?\.safetensors"
)
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository, and which of its files are wanted."""

    repo: str
    """`owner/name`."""
    patterns: tuple[str, ...]
    """As the shell's, but `*` matches a slash."""
    revision: str | None = None
    allow_pickle: bool = False
    """Take pickled weights where there are no others."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    path: str
    nbytes: int
    etag: str
    """SHA-256 of a large file, git's SHA-1 of a small one; the name of its blob in the cache."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Every file of a repository at one commit."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    def choose(self, source: HubSource) -> tuple[RemoteFile, ...]:
        """The files that `source` wants, each set of weights once.

        Raises:
            LoadFailed: no weights among them.

        """
        by_path = {file.path: file for file in self.files}
        chosen = choose(by_path, source.patterns)
        if not any(path.endswith(WEIGHTS) for path in chosen) and source.allow_pickle:
            chosen = choose(by_path, (*source.patterns, *PICKLES))
        if not any(path.endswith(WEIGHTS) for path in chosen):
            pickled = any(fnmatchcase(path, each) for path in by_path for each in PICKLES)
            raise LoadFailed(
                f"{self.repo} has no weights that could be used here"
                f" ({', '.join(source.patterns)}); "
                + (
                    "its own are pickled, and a pickle can hold code"
                    if pickled
                    else "is it another kind of model?"
                )
            )
        return tuple(by_path[path] for path in chosen)


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
    """The caller wanted no more. What has arrived is kept and gone on with next time."""


OnProgress = Callable[[FetchProgress], None]


def is_repo(source: str) -> bool:
    """Whether a model's source is a repository of a hub, and no folder or starter model."""
    if source.startswith(("/", ".", "~", "starter:")) or Path(source).is_dir():
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def choose(paths: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The paths that match, without the weights that a repository holds once more.

    Left out are: a variant (`*.fp16.safetensors`) where the plain file is wanted too; Mistral's
    `consolidated` beside `model`; copies in folders for other programs (`original/`, `metal/`)
    where the weights are at the root. Folders that begin with a digit are layers of a sentence
    embedder, and stay.
    """
    matching = [path for path in paths if any(fnmatchcase(path, each) for each in patterns)]
    weights = {path for path in matching if path.endswith(".safetensors")}
    plain = {
        (str(PurePosixPath(path).parent), _SHARD.sub("", PurePosixPath(path).stem))
        for path in weights
    }
    at_root = (".", "model") in plain

    def is_copy(path: str) -> bool:
        parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        variant = _VARIANT.fullmatch(name)
        if variant is not None and (parent, variant["base"]) in plain:
            return True
        if name.startswith("consolidated") and (parent, "model") in plain:
            return True
        return at_root and parent != "." and not parent[0].isdigit()

    return [path for path in matching if path not in weights or not is_copy(path)]


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, else huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def cache_dir() -> Path:
    """Where the client keeps repositories: `HF_HUB_CACHE`, or `hub` in `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_dir(repo: str) -> Path:
    """The folder of a repository in the cache, whether it is there or not."""
    return cache_dir() / f"models--{repo.replace('/', '--')}"


def list_repo(repo: str, revision: str | None = None) -> Listing:
    """Ask the hub what a repository holds.

    Raises:
        NotFound: there is no such repository or revision.
        LoadFailed: the hub does not answer, or refuses.

    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    with _told_plainly(repo):
        commit = api.model_info(repo, revision=revision or MAIN, timeout=10).sha
        if commit is None:
            raise LoadFailed(f"the hub names no commit of {repo}")
        tree: Iterable[RepoFile | RepoFolder] = api.list_repo_tree(
            repo, recursive=True, revision=commit
        )
        files = tuple(
            RemoteFile(
                each.path,
                each.lfs.size if each.lfs else each.size,
                each.lfs.sha256 if each.lfs else each.blob_id,
            )
            for each in tree
            if isinstance(each, RepoFile)
        )
    return Listing(repo, revision or MAIN, commit, files)


def read_json(listing: Listing, path: str) -> Any:
    """A JSON document of the repository, read without keeping it.

    Raises:
        LoadFailed: it is too long, no JSON, or the hub does not give it.

    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

    size = next((file.nbytes for file in listing.files if file.path == path), None)
    if size is None or size > MAX_JSON_BYTES:
        raise LoadFailed(f"{listing.repo}: {path} is missing or too long to be read")
    with _told_plainly(listing.repo):
        answer = get_session().get(
            hf_hub_url(listing.repo, path, revision=listing.commit), headers=_headers()
        )
        hf_raise_for_status(answer)
    try:
        return json.loads(answer.content)
    except ValueError as error:
        raise LoadFailed(f"{listing.repo}: {path} is no JSON: {error}") from error


def snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of what is here of a repository, whoever fetched it. Asks no hub."""
    folder = repo_dir(repo)
    commit = revision or MAIN
    try:
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{40}", commit) is None:
            return None
    path = folder / "snapshots" / commit
    return path if path.is_dir() else None


def present(source: HubSource) -> Path | None:
    """The folder of a repository if all that is wanted of it is here. Asks no hub.

    What was pickled counts: that it is here means that it was allowed.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = snapshot(source.repo, source.revision)
    if folder is None:
        return None
    try:
        tree = get_cached_repo_tree(source.repo, revision=folder.name, cache_dir=cache_dir())
        files = tuple(RemoteFile(file.path, file.size, file.blob_id) for file in tree)
        listing = Listing(source.repo, source.revision or MAIN, folder.name, files)
        wanted = listing.choose(replace(source, allow_pickle=True))
    except (CachedRepoTreeNotFoundError, LoadFailed):
        return None
    return folder if all((folder / file.path).is_file() for file in wanted) else None


def fetch(
    source: HubSource,
    on_progress: OnProgress = lambda _: None,
    cancelled: threading.Event | None = None,
) -> Path:
    """Bring the wanted files of a repository into the cache; returns the folder of its snapshot.

    See `Fetch`, which tells the sizes first.

    Raises:
        NotFound: there is no such repository or revision.
        LoadFailed: the hub does not answer or refuses, the disk has not the room, or what came
            is damaged. Nothing was registered.
        FetchCancelledError: `cancelled` was set.

    """
    one = Fetch(source)
    check_room(one.missing_bytes, source.repo)
    return one.run(on_progress, cancelled or threading.Event())


def check_room(missing_bytes: int, what: str) -> None:
    """Refuse before the first byte what the disk of the cache cannot hold.

    Raises:
        LoadFailed: telling how much is missing.

    """
    free_bytes = free_disk_bytes(cache_dir())
    if missing_bytes > free_bytes:
        raise LoadFailed(
            f"{what} needs {format_size(missing_bytes)} more on the disk of {cache_dir()}, where"
            f" {format_size(free_bytes)} are free: make room (`roundhouse prune`), or let HF_HOME"
            " name a folder on a larger disk"
        )


class Fetch:
    """One fetch of the files that are wanted of a repository, several at a time."""

    def __init__(self, source: HubSource) -> None:
        """Ask the hub what there is.

        Raises:
            NotFound: there is no such repository or revision.
            LoadFailed: the hub does not answer or refuses, or there is nothing to be used here.

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
        """What is still to come, and to be written."""
        return self.total_bytes - sum(self._done_bytes.values())

    @property
    def files(self) -> int:
        """How many there are."""
        return len(self._files)

    def run(self, on_progress: OnProgress, cancelled: threading.Event) -> Path:
        """Fetch what is missing; returns the folder of the snapshot. May take hours.

        `on_progress` is called from several threads, one at a time. Setting `cancelled` ends the
        fetch at the next piece.

        Raises:
            LoadFailed: the hub does not answer or refuses, the disk is full, or what came is
                damaged. Nothing was registered.
            FetchCancelledError: `cancelled` was set.

        """
        self._on_progress, self._cancelled = on_progress, cancelled
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoadFailed(f"cannot write to {cache_dir()}: {error}") from error
        self._tell()
        # Small files first: a repository that is refused fails before its weights are fetched.
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
                    with _told_plainly(self._listing.repo):
                        self._fetch_partial(file)
                except OSError as error:
                    raise self._disk_error(file, error) from error
                self._partial(file.etag).replace(blob)
            self._done_bytes[file.etag] = file.nbytes
            self._whole.add(file.etag)
        self._tell()

    @contextmanager
    def _locked(self, etag: str) -> Iterator[None]:
        """Hold the client's own lock of a blob: another process then fetches it only once too."""
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
        # Other programs write to this disk too; the part is worth less than they.
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

        # Unbuffered: what arrived is in the file, whatever becomes of this process.
        with self._partial(file.etag).open("a+b", buffering=0) as partial:
            if partial.tell() > file.nbytes:
                _empty(partial)
            digest = _digest_of(partial, file)
            attempts = 0
            while (offset := partial.tell()) < file.nbytes:
                try:
                    self._stream(file, partial, digest, offset)
                except (httpx2.TransportError, HfHubHTTPError) as error:
                    if isinstance(error, HfHubHTTPError) and not _is_passing(error):
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

    def _stream(self, file: RemoteFile, partial: IO[bytes], digest: _Digest, offset: int) -> None:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status

        headers = {**_headers(), "accept-encoding": "identity"}
        if offset:
            headers["range"] = f"bytes={offset}-"
        with get_session().stream(
            "GET",
            hf_hub_url(self._listing.repo, file.path, revision=self._listing.commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as answer:
            hf_raise_for_status(answer)
            if offset and answer.status_code != 206:  # sent from the beginning after all
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


class _Digest:
    """The hash that a file's etag must be; of another kind of etag none."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        self._hash = None
        if re.fullmatch("[0-9a-f]{64}", self._file.etag):
            self._hash = hashlib.sha256()
        elif re.fullmatch("[0-9a-f]{40}", self._file.etag):  # as git names a blob
            self._hash = hashlib.sha1(usedforsecurity=False)
            self._hash.update(b"blob %d\0" % self._file.nbytes)

    def update(self, data: bytes) -> None:
        if self._hash is not None:
            self._hash.update(data)

    def is_wrong(self) -> bool:
        return self._hash is not None and self._hash.hexdigest() != self._file.etag


def _digest_of(partial: IO[bytes], file: RemoteFile) -> _Digest:
    """The hash of what is there already; leaves the file at its end."""
    digest = _Digest(file)
    partial.seek(0)
    while chunk := partial.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _write_all(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # an unbuffered write may take less, on a disk that is nearly full
        rest = rest[file.write(rest) :]


def _register(source: HubSource, files: Sequence[RemoteFile]) -> Path:
    """Have the client make the snapshot of blobs that are all here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    silent: Any = partial(tqdm, disable=True)
    names = [escape(file.path) for file in files]
    with _told_plainly(source.repo):
        return Path(
            snapshot_download(
                source.repo, revision=source.revision, allow_patterns=names, tqdm_class=silent
            )
        )


def free_disk_bytes(path: Path) -> int:
    """What a program of this user may still write where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def _told_plainly(repo: str) -> Iterator[None]:
    """Say what the client's errors mean, and what to do."""
    import httpx2
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise LoadFailed(_gated(repo)) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no repository {repo} at {endpoint()}, or it is private: check the name,"
            " or set HF_TOKEN to a token that may read it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise LoadFailed(
                f"the hub refuses {repo} ({status}): the token in HF_TOKEN, or that of"
                " `hf auth login`, is not valid or may not read it"
            ) from error
        raise LoadFailed(f"the hub failed to give {repo}: {_first_line(error)}") from error
    except HFValidationError as error:
        raise NotFound(f"{repo!r} is no name of a repository (owner/name)") from error
    except OfflineModeIsEnabled as error:
        raise LoadFailed(f"{repo} cannot be fetched: HF_HUB_OFFLINE is set") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError, FileMetadataError) as error:
        raise LoadFailed(
            f"{repo} cannot be fetched from {endpoint()}: {_first_line(error)}"
        ) from error


def _headers() -> dict[str, str]:
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def _is_passing(error: HfHubHTTPError) -> bool:
    """Whether the hub may well answer another time."""
    return error.response.status_code in (408, 429) or error.response.status_code >= 500


def _gated(repo: str) -> str:
    from huggingface_hub import get_token

    accept = f"accept its conditions at {endpoint()}/{repo}"
    if get_token() is None:
        return (
            f"{repo} is gated: {accept}, then set HF_TOKEN to a token of that account"
            " (or run `hf auth login`)"
        )
    return f"{repo} is gated and your token may not read it: {accept} with its account"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
