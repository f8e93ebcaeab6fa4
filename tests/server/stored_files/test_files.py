"""The Files and Uploads APIs, with the official client over real sockets and a real disk."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from engine.engine import Engine
from engine.errors import Conflict, InvalidRequest, NoSpaceLeft, NotFound
from engine.files.atomic import remove_leftovers
from server.app import create_app
from server.settings import ServerSettings
from server.stored_files.record import FileLimits, Purpose, Viewer
from server.stored_files.store import FILE_NAME, FOLDER, FileStore
from server.stored_files.unfinished import Unfinished
from server.stored_files.uploads import UPLOAD_AGE_S, Uploads, UploadState
from tests.contract.openai import conforms
from tests.server.fake import listening

SETTINGS = ServerSettings(
    api_keys=(SecretStr("one"), SecretStr("two")),
    admin_keys=(SecretStr("admin"),),
    max_file_bytes=4 * 2**20,
    file_storage=6 * 2**20,
    file_storage_per_key=5 * 2**20,
)
ME = Viewer("me")


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[str]:
    async with listening(create_app(engine, SETTINGS)) as url:
        yield url


@pytest.fixture
async def url(engine: Engine) -> AsyncIterator[str]:
    async with served(engine) as url:
        yield url


def client_of(url: str, key: str = "one") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(url) as client:
        yield client


def kept(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "data" / FOLDER))


async def upload(sdk: openai.AsyncOpenAI, data: bytes = b"{}\n", name: str = "in.jsonl") -> str:
    return (await sdk.files.create(file=(name, data), purpose="batch")).id


async def test_a_file_comes_and_goes(sdk: openai.AsyncOpenAI, tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20)
    file = await sdk.files.create(
        file=("naïve name.jsonl", data),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert conforms(file.to_dict(mode="json"), "OpenAIFile")
    assert (file.bytes, file.filename, file.purpose) == (len(data), "naïve name.jsonl", "batch")
    assert file.expires_at == file.created_at + 3600
    assert kept(tmp_path) == [file.id]
    assert (tmp_path / "data" / FOLDER / file.id).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "data" / FILE_NAME).stat().st_mode & 0o777 == 0o600

    assert await sdk.files.retrieve(file.id) == file
    content = await sdk.files.content(file.id)
    assert content.content == data
    assert content.response.headers["content-type"] == "application/jsonl"
    assert content.response.headers["content-disposition"].startswith("attachment")

    deleted = await sdk.files.delete(file.id)
    assert conforms(deleted.to_dict(mode="json"), "DeleteFileResponse") and deleted.deleted
    with pytest.raises(openai.NotFoundError):
        await sdk.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.files.delete(file.id)
    assert kept(tmp_path) == []


async def test_a_page_that_was_uploaded_is_no_page(sdk: openai.AsyncOpenAI) -> None:
    file = await sdk.files.create(file=("x.html", b"<script>"), purpose="user_data")
    headers = (await sdk.files.content(file.id)).response.headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-content-type-options"] == "nosniff"


async def test_lists(sdk: openai.AsyncOpenAI) -> None:
    ids = [await upload(sdk, name=f"{number}.jsonl") for number in range(5)]
    other = (await sdk.files.create(file=("a.txt", b"a"), purpose="user_data")).id
    page = await sdk.files.list(limit=2, order="asc", purpose="batch")
    assert conforms(page.to_dict(mode="json"), "ListFilesResponse")
    assert ([file.id for file in page.data], page.has_more) == (ids[:2], True)
    assert [f.id async for f in sdk.files.list(limit=2, order="asc", purpose="batch")] == ids
    assert [f.id async for f in sdk.files.list(limit=2)] == [other, *reversed(ids)]
    with pytest.raises(openai.NotFoundError) as raised:
        await sdk.files.list(after="file-none")
    assert raised.value.param == "after"
    empty = await sdk.files.list(purpose="vision")
    assert conforms(empty.to_dict(mode="json"), "ListFilesResponse") and not empty.data


async def test_a_key_sees_its_own(url: str, sdk: openai.AsyncOpenAI) -> None:
    file_id = await upload(sdk)
    async with client_of(url, "two") as other, client_of(url, "admin") as admin:
        assert (await other.files.list()).data == []
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(file_id)
        with pytest.raises(openai.NotFoundError):
            await other.files.list(after=file_id)
        assert [file.id for file in (await admin.files.list()).data] == [file_id]
        assert (await admin.files.content(file_id)).content == b"{}\n"


@pytest.mark.parametrize(
    ("form", "file", "param"),
    [
        ({"purpose": "fun"}, True, "purpose"),
        ({}, True, "purpose"),
        ({"purpose": "batch"}, False, "file"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, True, "expires_after"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at",
             "expires_after[seconds]": "60"},
            True,
            "expires_after",
        ),
        ({"purpose": "batch", "more": "x"}, True, "more"),
    ],
)  # fmt: skip
async def test_wrong_forms(
    url: str, tmp_path: Path, form: dict[str, str], file: bool, param: str
) -> None:
    async with httpx.AsyncClient(base_url=url, headers={"x-api-key": "one"}) as plain:
        files: Any = {"file": ("a", b"x")} if file else {"fil": (None, b"x")}
        answer = await plain.post("/v1/files", data=form, files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert kept(tmp_path) == []
        answer = await plain.post("/v1/files", json={"purpose": "batch"})
        assert answer.status_code == 415


async def test_the_bounds(url: str, sdk: openai.AsyncOpenAI, tmp_path: Path) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        await upload(sdk, bytes(4 * 2**20 + 1))
    assert (raised.value.status_code, raised.value.param) == (413, "file")
    first = await upload(sdk, bytes(4 * 2**20))
    with pytest.raises(openai.APIStatusError, match=r"of your 5\.0 MiB") as raised:
        await upload(sdk, bytes(2**20 + 1))
    assert raised.value.status_code == 507
    async with client_of(url, "two") as other:
        with pytest.raises(openai.APIStatusError, match="The server has no room") as raised:
            await upload(other, bytes(3 * 2**20))
        assert raised.value.status_code == 507
    await sdk.files.delete(first)
    await upload(sdk, bytes(2**20 + 1))
    assert len(kept(tmp_path)) == 1


async def test_a_client_that_leaves_leaves_nothing(url: str, tmp_path: Path) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield bytes(2**20)
        raise OSError("the client is gone")

    async with httpx.AsyncClient(base_url=url, headers={"x-api-key": "one"}) as plain:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        with pytest.raises(OSError, match="gone"):
            await plain.post("/v1/files", content=half(), headers=headers)
        while kept(tmp_path):
            await plain.get("/health")


async def test_an_upload_in_parts(url: str, sdk: openai.AsyncOpenAI, tmp_path: Path) -> None:
    data = os.urandom(2**20 + 5)
    file = await sdk.uploads.upload_file_chunked(
        file=data,
        filename="big.jsonl",
        bytes=len(data),
        mime_type="application/jsonl",
        purpose="batch",
        part_size=2**19,
        md5=hashlib.md5(data).hexdigest(),
    )
    assert file.status == "completed" and file.file is not None
    assert conforms(file.file.to_dict(mode="json"), "OpenAIFile")
    assert (await sdk.files.content(file.file.id)).content == data
    assert kept(tmp_path) == [file.file.id]


async def test_uploads_that_go_wrong(url: str, sdk: openai.AsyncOpenAI, tmp_path: Path) -> None:
    upload = await sdk.uploads.create(
        filename="a.txt", purpose="user_data", bytes=4, mime_type="text/plain"
    )
    second = await sdk.uploads.parts.create(upload.id, data=b"cd")
    first = await sdk.uploads.parts.create(upload.id, data=b"ab")
    with pytest.raises(openai.BadRequestError, match="were announced"):
        await sdk.uploads.parts.create(upload.id, data=b"e")
    for ids, md5, param in (
        ([first.id], None, "part_ids"),
        ([first.id, first.id], None, "part_ids[1]"),
        ([first.id, "part_x"], None, "part_ids[1]"),
        ([first.id, second.id], "0" * 32, "md5"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            await sdk.uploads.complete(upload.id, part_ids=ids, md5=md5 or openai.omit)
        assert raised.value.param == param
    async with client_of(url, "two") as other:
        with pytest.raises(openai.NotFoundError):
            await other.uploads.complete(upload.id, part_ids=[first.id, second.id])
        with pytest.raises(openai.NotFoundError):
            await other.uploads.parts.create(upload.id, data=b"x")
    done = await sdk.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.file is not None
    assert (await sdk.files.content(done.file.id)).content == b"abcd"
    for call in (sdk.uploads.cancel(upload.id), sdk.uploads.parts.create(upload.id, data=b"e")):
        with pytest.raises(openai.ConflictError):
            await call

    other_upload = await sdk.uploads.create(
        filename="b.txt", purpose="user_data", bytes=4, mime_type="text/plain"
    )
    await sdk.uploads.parts.create(other_upload.id, data=b"ab")
    assert (await sdk.uploads.cancel(other_upload.id)).status == "cancelled"
    assert kept(tmp_path) == [done.file.id]
    with pytest.raises(openai.APIStatusError) as refused:
        await sdk.uploads.create(
            filename="c", purpose="user_data", bytes=2**30, mime_type="text/plain"
        )
    assert refused.value.status_code == 413


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def store_of(folder: Path, clock: Clock | None = None, **limits: Any) -> FileStore:
    store = FileStore(folder, FileLimits(**limits), clock=clock or Clock())
    store.open()
    return store


def test_files_expire_unless_something_holds_them(tmp_path: Path) -> None:
    clock = Clock()
    store = store_of(tmp_path, clock, max_age_s=100.0)
    held, left = (store.create("me", Purpose.BATCH, "a", [b"x"]) for _ in range(2))
    short = store.create("me", Purpose.BATCH, "a", [b"x"], expires_after_s=10)
    store.hold(held.id, "batch_1")
    clock.now += 10
    assert [file.id for file in store.list(ME)[0]] == [left.id, held.id]
    with pytest.raises(NotFound):
        store.get(ME, short.id)
    clock.now += 90
    store.close()
    store = store_of(tmp_path, clock, max_age_s=100.0)
    assert os.listdir(store.folder) == [held.id]
    assert store.holders() == {"batch_1"}
    store.release("batch_1")
    store.prune()
    assert os.listdir(store.folder) == []
    store.close()


def test_what_is_too_large_is_refused_and_gone(tmp_path: Path) -> None:
    store = store_of(tmp_path, max_file_bytes=10, storage_bytes_per_key=15)
    store.create("me", Purpose.BATCH_OUTPUT, "a", [b"x" * 5, b"y" * 5])
    with pytest.raises(NoSpaceLeft):
        store.create("me", Purpose.BATCH_OUTPUT, "a", [b"x" * 10])
    with pytest.raises(InvalidRequest):
        store.create("you", Purpose.BATCH_OUTPUT, "a", [b"x" * 11])
    store.create("you", Purpose.BATCH_OUTPUT, "a", [b"x" * 10])
    assert len(os.listdir(store.folder)) == 2
    store.close()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from server.stored_files.record import FileLimits, Purpose
    from server.stored_files.store import FileStore
    store = FileStore(Path(sys.argv[1]), FileLimits())
    store.open()
    whole = store.create("me", Purpose.BATCH, "a", [b"whole"])
    print(whole.id, flush=True)
    (store.folder / ("file-" + "0" * 32)).write_bytes(b"renamed, and killed before the record")
    def torn():
        yield b"half"
        os.kill(os.getpid(), signal.SIGKILL)
    store.create("me", Purpose.BATCH, "a", torn())
"""


def test_a_kill_leaves_whole_files_only(tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = done.stdout.strip()
    assert len(os.listdir(tmp_path / FOLDER)) == 3
    store = store_of(tmp_path)
    assert os.listdir(store.folder) == [whole]
    file, stream = store.open_file(ME, whole)
    with stream:
        assert (file.nbytes, stream.read()) == (5, b"whole")
    store.close()


def test_a_stream_is_read_after_its_file_was_deleted(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    made = store.create("me", Purpose.BATCH, "a", [b"whole"])
    _, stream = store.open_file(ME, made.id)
    store.delete(ME, made.id)
    with stream:
        assert isinstance(stream, io.BufferedReader) and stream.read() == b"whole"
    store.close()


def part_of(store: FileStore, data: bytes) -> Unfinished:
    part = store.begin()
    part.write(data)
    return part


def test_an_upload_that_is_left_ends(tmp_path: Path) -> None:
    clock = Clock()
    store = store_of(tmp_path, clock)
    uploads = Uploads(store)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    upload = uploads.create("me", Purpose.USER_DATA, "a", "text/plain", 4, 10)
    uploads.add_part(ME, upload.id, part_of(store, b"ab"))
    clock.now += UPLOAD_AGE_S
    assert uploads.get(ME, upload.id).state is UploadState.EXPIRED
    late = part_of(store, b"cd")
    with pytest.raises(Conflict, match="expired"):
        uploads.add_part(ME, upload.id, late)
    late.discard()
    assert len(os.listdir(store.folder)) == 1
    store.prune()
    assert os.listdir(store.folder) == [] and store.database.rows("SELECT id FROM parts") == []
    assert uploads.get(ME, upload.id).state is UploadState.EXPIRED
    clock.now += 86_400
    store.prune()
    with pytest.raises(NotFound):
        uploads.get(ME, upload.id)
    store.close()


def test_parts_count_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, storage_bytes_per_key=10)
    uploads = Uploads(store)
    with pytest.raises(NoSpaceLeft):
        uploads.create("me", Purpose.USER_DATA, "a", "text/plain", 11)
    first, second = (uploads.create("me", Purpose.USER_DATA, "a", "text/plain", 8) for _ in "ab")
    part = uploads.add_part(ME, first.id, part_of(store, b"x" * 7))
    for attempt in (
        lambda: uploads.add_part(ME, second.id, part_of(store, b"x" * 4)),
        lambda: store.create("me", Purpose.BATCH, "a", [b"x" * 4]),
    ):
        with pytest.raises(NoSpaceLeft, match="7 B of your 10 B"):
            attempt()
        assert os.listdir(store.folder) == [part.id]
    monkeypatch.setattr("server.stored_files.uploads.MAX_PARTS", 1)
    with pytest.raises(InvalidRequest, match="1 parts at most"):
        uploads.add_part(ME, first.id, part_of(store, b"x"))
    assert os.listdir(store.folder) == [part.id]
    store.close()


def test_an_upload_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path)
    uploads = Uploads(store)
    kept, cut = (uploads.create("me", Purpose.BATCH, "a", "text/plain", 2, 10) for _ in "ab")
    parts = [uploads.add_part(ME, each.id, part_of(store, b"ab")).id for each in (kept, cut)]
    _, file = uploads.complete(ME, kept.id, parts[:1], None)
    assert file.expires_at == file.created_at + 10
    adopt = store.adopt

    def cancelled_meanwhile(*args: Any, **more: Any) -> Any:
        uploads.cancel(ME, cut.id)
        return adopt(*args, **more)

    monkeypatch.setattr(store, "adopt", cancelled_meanwhile)
    with pytest.raises(Conflict, match="cancelled"):
        uploads.complete(ME, cut.id, parts[1:], None)
    assert os.listdir(store.folder) == [file.id]
    assert store.database.rows("SELECT id FROM parts") == []
    assert [each.id for each in store.list(ME)[0]] == [file.id]
    store.close()


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    written = part_of(store, b"a")
    remove_leftovers(store.folder)
    assert written.path.exists()
    written.file.close()
    remove_leftovers(store.folder)
    assert not written.path.exists()
    full = store.begin()
    path = full.path
    full.file.close()
    opened = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115 - the file closes it
    full.file = opened  # type: ignore[assignment]
    with pytest.raises(NoSpaceLeft):
        full.write(b"a")
    full.file.close()
    path.unlink()
    store.close()
