"""Vector stores by OpenAI's own client, over a fake model that embeds words."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from engine.caller import Caller
from engine.engine import Engine
from engine.errors import ModelForbidden
from engine.events import Document, Event
from engine.requests import Priority, TextOperation, TextRequest
from server.app import create_app
from server.keys.access import Access
from server.settings import ServerSettings
from server.stored_files.record import FileLimits, Purpose, Viewer
from server.stored_files.store import FileStore
from server.vector_store_config import VectorStoreConfig
from server.vector_stores.embedder import Embedder, Models
from server.vector_stores.records import AttachmentStatus
from server.vector_stores.sqlite_backend import SqliteBackend
from server.vector_stores.stores import Search, VectorStores
from tests.contract.openai import conforms
from tests.server.fake import fake_engine, listening
from tests.server.vector_stores.conftest import EmbeddingRuntime, embedding, sdk_of
from tests.server.vector_stores.pdf import pdf

Client = openai.AsyncOpenAI
TRAINS = "Trains stand in the roundhouse. The turntable turns them."
BREAD = "Bread is baked at night. Flour and water make dough."


async def upload(client: Client, text: str | bytes, name: str = "a.txt") -> str:
    data = text.encode() if isinstance(text, str) else text
    return (await client.files.create(file=(name, data), purpose="assistants")).id


async def until(met: Callable[[], Any]) -> None:
    """Wait until it holds; a generous limit, for a busy machine."""
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def plain(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.model_dump(mode="json", exclude_unset=True)
    return found


async def test_a_store_from_creation_to_deletion(client: Client, runtime: EmbeddingRuntime) -> None:
    store = await client.vector_stores.create(name="Yard", metadata={"who": "me"})
    assert conforms(plain(store), "VectorStoreObject")
    assert (store.status, store.file_counts.total, store.usage_bytes) == ("completed", 0, 0)
    attached = await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("trains.md", TRAINS.encode()), poll_interval_ms=10
    )
    assert conforms(plain(attached), "VectorStoreFileObject")
    assert attached.status == "completed"
    assert attached.usage_bytes == len(TRAINS) + 4 * len(embedding(TRAINS))
    bread = await client.vector_stores.files.create_and_poll(
        file_id=await upload(client, BREAD, "bread.txt"),
        vector_store_id=store.id,
        attributes={"about": "bread", "year": 1900, "good": True},
        poll_interval_ms=10,
    )
    found = await client.vector_stores.search(store.id, query="bread and flour")
    assert conforms(plain(found), "VectorStoreSearchResultsPage")
    first, second = found.data
    assert (first.file_id, first.filename) == (bread.id, "bread.txt")
    assert first.attributes == {"about": "bread", "year": 1900, "good": True}
    assert first.content[0].text == BREAD
    assert first.score > second.score >= 0
    text = await client.vector_stores.files.content(bread.id, vector_store_id=store.id)
    assert [part.text for part in text.data] == [BREAD]
    store = await client.vector_stores.retrieve(store.id)
    assert plain(store)["file_counts"] == {
        "in_progress": 0, "completed": 2, "failed": 0, "cancelled": 0, "total": 2,
    }  # fmt: skip
    listed = await client.vector_stores.files.list(store.id, filter="completed", order="asc")
    assert [each.id for each in listed.data] == [attached.id, bread.id]
    gone = await client.vector_stores.files.delete(bread.id, vector_store_id=store.id)
    assert conforms(plain(gone), "DeleteVectorStoreFileResponse")
    found = await client.vector_stores.search(store.id, query="bread and flour")
    assert [each.file_id for each in found.data] == [attached.id]
    assert (await client.files.retrieve(bread.id)).filename == "bread.txt", "the file itself stays"
    deleted = await client.vector_stores.delete(store.id)
    assert conforms(plain(deleted), "DeleteVectorStoreResponse")
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.search(store.id, query="x")
    indexing = [each for each in runtime.requests if each.scheduling.priority is Priority.BATCH]
    asking = [each for each in runtime.requests if each.scheduling.priority is Priority.NORMAL]
    assert len(asking) == 2
    assert len(indexing) == 3, "one to know the model, and one a file"


async def test_a_deleted_file_leaves_every_store(client: Client) -> None:
    file = await upload(client, TRAINS)
    stores = [await client.vector_stores.create(file_ids=[file]) for _ in range(2)]
    for store in stores:
        await client.vector_stores.files.poll(file, vector_store_id=store.id, poll_interval_ms=10)
    await client.files.delete(file)
    for store in stores:
        assert (await client.vector_stores.search(store.id, query="trains")).data == []
        with pytest.raises(openai.NotFoundError):
            await client.vector_stores.files.retrieve(file, vector_store_id=store.id)


async def test_filters_and_ranking(client: Client) -> None:
    store = await client.vector_stores.create()
    for year in range(5):
        await client.vector_stores.files.create_and_poll(
            file_id=await upload(client, f"{TRAINS} Year {year}."),
            vector_store_id=store.id,
            attributes={"year": year, "even": year % 2 == 0, "name": f"y{year}"},
            poll_interval_ms=10,
        )

    async def years(filters: Any, **more: Any) -> list[Any]:
        found = await client.vector_stores.search(store.id, query="trains", filters=filters, **more)
        return sorted(each.attributes["year"] for each in found.data if each.attributes)

    assert await years({"type": "gte", "key": "year", "value": 3}) == [3, 4]
    both = [
        {"type": "eq", "key": "even", "value": True},
        {"type": "nin", "key": "name", "value": ["y0"]},
    ]
    assert await years({"type": "and", "filters": both}) == [2, 4]
    assert await years({"type": "and", "filters": both}, max_num_results=1) in ([2], [4])
    assert await years({"type": "eq", "key": "year", "value": 99}) == []
    listed = (await client.vector_stores.files.list(store.id)).data
    moved = await client.vector_stores.files.update(
        listed[0].id, vector_store_id=store.id, attributes={"year": 99}
    )
    assert conforms(plain(moved), "VectorStoreFileObject")
    assert await years({"type": "eq", "key": "year", "value": 99}) == [99]
    high = await client.vector_stores.search(
        store.id, query="trains", ranking_options={"ranker": "none", "score_threshold": 1.0}
    )
    assert high.data == []


@pytest.mark.parametrize("config", [{"rerank_model": "ranker"}])
async def test_a_configured_model_ranks_what_was_found(
    client: Client, runtime: EmbeddingRuntime
) -> None:
    store = await client.vector_stores.create()
    texts = ["trains trains trains and much besides", "trains", "trains trains"]
    for text in texts:
        await client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=("a.txt", text.encode()), poll_interval_ms=10
        )
    found = await client.vector_stores.search(store.id, query="trains")
    assert [each.content[0].text for each in found.data] == [texts[0], texts[2], texts[1]]
    assert [each.score for each in found.data] == pytest.approx([0.3, 0.2, 0.1])
    found = await client.vector_stores.search(
        store.id, query="trains", ranking_options={"score_threshold": 0.15}, max_num_results=5
    )
    assert len(found.data) == 2
    ranked = len([each for each in runtime.requests if each.operation is TextOperation.RERANK])
    found = await client.vector_stores.search(
        store.id, query="trains", ranking_options={"ranker": "none"}
    )
    assert found.data[0].content[0].text == "trains"
    assert ranked == len(
        [each for each in runtime.requests if each.operation is TextOperation.RERANK]
    )


async def test_several_queries_are_searched_for_together(client: Client) -> None:
    store = await client.vector_stores.create()
    for text in (TRAINS, BREAD, "Nothing of that."):
        await client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=("a.txt", text.encode()), poll_interval_ms=10
        )
    found = await client.vector_stores.search(
        store.id, query=["turntable trains", "flour dough"], max_num_results=2
    )
    assert {each.content[0].text for each in found.data} == {TRAINS, BREAD}


async def test_batches_of_files(client: Client, url: str, runtime: EmbeddingRuntime) -> None:
    store = await client.vector_stores.create()
    good, bad = await upload(client, TRAINS), await upload(client, b"\0\1", "x.docx")
    batch = await client.vector_stores.file_batches.create_and_poll(
        store.id, file_ids=[good, bad], attributes={"of": "both"}, poll_interval_ms=10
    )
    assert conforms(plain(batch), "VectorStoreFileBatchObject")
    assert (batch.status, batch.file_counts.completed, batch.file_counts.failed) == (
        "completed", 1, 1,
    )  # fmt: skip
    files = await client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id)
    assert {each.id: each.status for each in files.data} == {good: "completed", bad: "failed"}
    failed = next(each for each in files.data if each.id == bad)
    assert conforms(plain(failed), "VectorStoreFileObject")
    assert failed.last_error is not None
    assert failed.last_error.code == "unsupported_file"
    runtime.may_embed.clear()
    others = [await upload(client, f"{BREAD} {index}") for index in range(4)]
    wanted = [{"file_id": each, "attributes": {"n": n}} for n, each in enumerate(others)]
    async with httpx.AsyncClient(base_url=url) as http:
        begun = await http.post(
            f"/v1/vector_stores/{store.id}/file_batches", json={"files": wanted}
        )
    assert begun.json()["status"] == "in_progress"
    assert (await client.vector_stores.retrieve(store.id)).status == "in_progress"
    cancelled = await client.vector_stores.file_batches.cancel(
        begun.json()["id"], vector_store_id=store.id
    )
    runtime.may_embed.set()
    assert cancelled.status == "cancelled"
    assert cancelled.file_counts.cancelled == 4
    found = await client.vector_stores.search(store.id, query="flour")
    assert {each.file_id for each in found.data} == {good}


async def test_a_busy_model_is_waited_for_and_a_refusal_is_told(
    client: Client, runtime: EmbeddingRuntime
) -> None:
    store = await client.vector_stores.create()
    runtime.busy = 3
    patient = await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("a.txt", TRAINS.encode()), poll_interval_ms=10
    )
    assert (patient.status, runtime.busy) == ("completed", 0)
    failed = await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("a.txt", b"unembeddable"), poll_interval_ms=10
    )
    assert failed.last_error is not None
    assert failed.last_error.message == "input: the model cannot read it."
    with pytest.raises(openai.ConflictError, match="failed"):
        await client.vector_stores.files.content(failed.id, vector_store_id=store.id)


@pytest.mark.parametrize("config", [{"max_file_bytes": 10, "max_files": 2, "max_stores": 2}])
async def test_the_bounds(client: Client) -> None:
    store = await client.vector_stores.create()
    large = await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("a.txt", b"x" * 11), poll_interval_ms=10
    )
    assert large.last_error is not None
    assert "max_file_bytes" in large.last_error.message
    files = [await upload(client, f"{index}") for index in range(3)]
    with pytest.raises(openai.InternalServerError, match="max_files"):
        await client.vector_stores.create(file_ids=files)
    await client.vector_stores.files.create(store.id, file_id=files[0])
    with pytest.raises(openai.InternalServerError, match="max_files"):
        await client.vector_stores.files.create(store.id, file_id=files[1])
    assert (await client.vector_stores.retrieve(store.id)).file_counts.total == 2
    await client.vector_stores.create()
    with pytest.raises(openai.InternalServerError, match="max_stores"):
        await client.vector_stores.create()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"name": 7}, "name"),
        ("", {"colour": "red"}, "colour"),
        ("", {"expires_after": {"anchor": "created_at", "days": 1}}, "expires_after.anchor"),
        ("", {"file_ids": ["file-none"]}, "file_ids"),
        ("", {"metadata": {"k": 1}}, "metadata.k"),
        ("/ID/files", {}, "file_id"),
        ("/ID/files", {"file_id": "file-none"}, "file_id"),
        ("/ID/files", {"file_id": "f", "attributes": {"k": [1]}}, "attributes.k"),
        (
            "/ID/files",
            {"file_id": "f", "chunking_strategy": {"type": "static"}},
            "chunking_strategy",
        ),
        (
            "/ID/files",
            {
                "file_id": "f",
                "chunking_strategy": {
                    "type": "static",
                    "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51},
                },
            },
            "chunking_strategy.static",
        ),
        ("/ID/file_batches", {}, "file_ids"),
        ("/ID/file_batches", {"files": [{"file_id": "f"}], "attributes": {}}, "attributes"),
        ("/ID/search", {}, "query"),
        ("/ID/search", {"query": []}, "query"),
        ("/ID/search", {"query": "q", "rewrite_query": True}, "rewrite_query"),
        ("/ID/search", {"query": "q", "max_num_results": 51}, "max_num_results"),
        (
            "/ID/search",
            {"query": "q", "ranking_options": {"ranker": "best"}},
            "ranking_options.ranker",
        ),
        ("/ID/search", {"query": "q", "filters": {"type": "near"}}, "filters.type"),
        (
            "/ID/search",
            {"query": "q", "filters": {"type": "and", "filters": [{"type": "eq", "key": "a"}]}},
            "filters.filters[0].value",
        ),
        (
            "/ID/search",
            {"query": "q", "filters": {"type": "gt", "key": "a", "value": True}},
            "filters.value",
        ),
    ],
)
async def test_a_wrong_request_names_its_field(
    client: Client, url: str, path: str, body: dict[str, Any], param: str
) -> None:
    store = await client.vector_stores.create()
    async with httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(f"/v1/vector_stores{path.replace('ID', store.id)}", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert (answer.json()["error"]["param"] or "").startswith(param)
    assert len((await client.vector_stores.list()).data) == 1, "nothing was made"


async def test_lists_are_read_page_by_page(client: Client) -> None:
    made = [(await client.vector_stores.create(name=f"{index}")).id for index in range(5)]
    page = await client.vector_stores.list(limit=2, order="asc")
    assert [each.id for each in page.data] == made[:2]
    assert [each.id async for each in page] == made, "the client follows the pages"
    before = await client.vector_stores.list(limit=2, order="asc", before=made[3])
    assert [each.id for each in before.data] == made[1:3]
    assert [each.id for each in (await client.vector_stores.list()).data] == made[::-1]


async def test_what_is_not_given_stays_in_an_update(client: Client) -> None:
    store = await client.vector_stores.create(
        name="a", metadata={"k": "v"}, expires_after={"anchor": "last_active_at", "days": 3}
    )
    assert store.expires_at == store.last_active_at + 3 * 86_400  # type: ignore[operator]
    store = await client.vector_stores.update(store.id, name="b")
    assert (store.name, store.metadata) == ("b", {"k": "v"})
    assert store.expires_after is not None
    store = await client.vector_stores.update(store.id, expires_after=None)
    assert store.expires_at is None


async def test_an_expired_store_says_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await client.vector_stores.create(expires_after={"anchor": "last_active_at", "days": 1})
    monkeypatch.setattr(
        "server.vector_stores.stores.VectorStores.is_expired", lambda self, store: True
    )
    assert (await client.vector_stores.retrieve(store.id)).status == "expired"
    with pytest.raises(openai.ConflictError, match="expired"):
        await client.vector_stores.search(store.id, query="x")


async def test_what_was_in_progress_goes_on_after_a_restart(
    engine: Engine, runtime: EmbeddingRuntime, settings: ServerSettings, tmp_path: Path
) -> None:
    runtime.may_embed.clear()
    async with listening(create_app(engine, settings)) as url, sdk_of(url) as client:
        store = await client.vector_stores.create()
        file = await upload(client, TRAINS)
        attached = await client.vector_stores.files.create(store.id, file_id=file)
        await until(lambda: len(runtime.requests) >= 2)
        assert attached.status == "in_progress"
        # As after a kill nobody notes an end, be it just before the vectors are kept …
    data_dir = engine.config.data_dir
    backend = SqliteBackend(data_dir)
    backend.add(store.id, 1, ["of the killed process"], embedding(TRAINS).reshape(1, -1))
    backend.close()  # … or just after that.
    again = EmbeddingRuntime()
    models = [model.model_dump() for model in engine.config.models]
    second = fake_engine(again, tmp_path, models=models)
    async with listening(create_app(second, settings)) as url, sdk_of(url) as client:
        async with asyncio.timeout(60):
            done = await client.vector_stores.files.poll(
                file, vector_store_id=store.id, poll_interval_ms=10
            )
        assert done.status == "completed"
        found = await client.vector_stores.search(store.id, query="trains")
        assert [each.content[0].text for each in found.data] == [TRAINS]


async def test_a_model_that_is_gone_is_named(
    engine: Engine, runtime: EmbeddingRuntime, settings: ServerSettings, tmp_path: Path
) -> None:
    async with listening(create_app(engine, settings)) as url, sdk_of(url) as client:
        store = await client.vector_stores.create()
    other = [{"id": "others", "source": "none", "runtime": "fake"}]
    second = fake_engine(EmbeddingRuntime(), tmp_path, models=other)
    changed = ServerSettings(vector_stores=VectorStoreConfig(embedding_model="others"))
    async with listening(create_app(second, changed)) as url, sdk_of(url) as client:
        assert (await client.vector_stores.retrieve(store.id)).id == store.id
        with pytest.raises(openai.ConflictError, match=r"'words'.*not configured any more"):
            await client.vector_stores.search(store.id, query="x")
        file = await upload(client, TRAINS)
        with pytest.raises(openai.ConflictError, match="'words'"):
            await client.vector_stores.files.create(store.id, file_id=file)


async def test_pdf_html_and_text_with_the_sizes_of_the_request(client: Client) -> None:
    store = await client.vector_stores.create()
    long = " ".join(f"w{index}" for index in range(300))
    sizes: Any = {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 10}
    for name, data in (("a.pdf", pdf("A locomotive")), ("b.html", b"<p>A carriage"), ("c", long)):
        done = await client.vector_stores.files.create_and_poll(
            file_id=await upload(client, data, name),
            vector_store_id=store.id,
            chunking_strategy={"type": "static", "static": sizes},
            poll_interval_ms=10,
        )
        assert done.status == "completed", done.last_error
    found = await client.vector_stores.search(store.id, query="locomotive", max_num_results=1)
    assert found.data[0].content[0].text == "A locomotive"
    text = await client.vector_stores.files.content(done.id, vector_store_id=store.id)
    assert len(text.data) > 3
    assert plain(done)["chunking_strategy"] == {"type": "static", "static": sizes}


class TestKeys:
    @pytest.fixture
    def settings(self) -> ServerSettings:
        return ServerSettings(
            api_keys=(SecretStr("one"), SecretStr("two")),
            admin_keys=(SecretStr("boss"),),
            vector_stores=VectorStoreConfig(embedding_model="words"),
        )

    async def test_a_store_is_seen_by_its_key_and_by_admins(self, url: str, engine: Engine) -> None:
        async with (
            sdk_of(url, "one") as one,
            sdk_of(url, "two") as two,
            sdk_of(url, "boss") as boss,
        ):
            store = await one.vector_stores.create()
            done = await one.vector_stores.files.upload_and_poll(
                vector_store_id=store.id, file=("a.txt", TRAINS.encode()), poll_interval_ms=10
            )
            assert done.status == "completed"
            for call in (
                two.vector_stores.retrieve(store.id),
                two.vector_stores.search(store.id, query="x"),
                two.vector_stores.delete(store.id),
                two.vector_stores.files.content(done.id, vector_store_id=store.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call
            assert (await two.vector_stores.list()).data == []
            own = await two.vector_stores.create()
            with pytest.raises(openai.NotFoundError):
                await two.vector_stores.files.create(own.id, file_id=done.id)
            assert len((await boss.vector_stores.list()).data) == 2
            assert len((await boss.vector_stores.search(store.id, query="trains")).data) == 1
        async with httpx.AsyncClient(base_url=url) as http:
            usage = await http.get(
                "/v1/engine/usage?by=key", headers={"authorization": "Bearer boss"}
            )
        tokens = {row["key"]: row["input_tokens"] for row in usage.json()["data"]}
        assert tokens["config-1"] == 14, "to know the model, and the file"
        assert tokens["config-admin-1"] == 7, "the search"


@pytest.fixture
def in_postgres(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"url": request.getfixturevalue("empty_postgres")}


async def test_all_of_it_with_postgres(
    engine: Engine, in_postgres: dict[str, Any], tmp_path: Path
) -> None:
    stores = VectorStoreConfig.model_validate({"embedding_model": "words", **in_postgres})
    settings = ServerSettings(vector_stores=stores)
    async with listening(create_app(engine, settings)) as url, sdk_of(url) as client:
        store = await client.vector_stores.create()
        for text in (TRAINS, BREAD):
            done = await client.vector_stores.files.upload_and_poll(
                vector_store_id=store.id, file=("a.txt", text.encode()), poll_interval_ms=10
            )
            assert done.status == "completed", done.last_error
        found = await client.vector_stores.search(store.id, query="flour and dough")
        assert [each.content[0].text for each in found.data] == [BREAD, TRAINS]
        await client.vector_stores.delete(store.id)


async def test_a_postgres_that_is_down_hides_its_password(engine: Engine) -> None:
    stores = VectorStoreConfig(embedding_model="words", url="postgresql://u:pw@127.0.0.1:1/x")
    assert "pw" not in repr(stores)
    settings = ServerSettings(vector_stores=stores)
    async with listening(create_app(engine, settings)) as url, sdk_of(url) as client:
        store = await client.vector_stores.create()
        done = await client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=("a.txt", TRAINS.encode()), poll_interval_ms=10
        )
        assert done.status == "failed"
        assert done.last_error is not None
        assert "pw" not in done.last_error.message
        with pytest.raises(openai.InternalServerError, match="cannot be used at this moment"):
            await client.vector_stores.search(store.id, query="x")


@pytest.mark.parametrize("config", [{"max_bytes": 700}])
async def test_the_bound_of_all_passages(client: Client) -> None:
    store = await client.vector_stores.create()
    states = []
    for text in (TRAINS, BREAD, TRAINS):
        done = await client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=("a.txt", text.encode()), poll_interval_ms=10
        )
        states.append((done.status, done.last_error and done.last_error.message))
    refused = ("failed", "The server has no room for further passages.")
    assert states == [("completed", None), ("completed", None), refused]
    assert len((await client.vector_stores.search(store.id, query="a")).data) == 2


async def test_embeddings_are_used_as_they_belong(
    client: Client, runtime: EmbeddingRuntime
) -> None:
    async def backwards(request: TextRequest) -> AsyncGenerator[Event, None]:
        vectors = [1000 * embedding(text) for text in request.body["input"]]
        data = [{"index": i, "embedding": each.tolist()} for i, each in enumerate(vectors)]
        yield Document(json.dumps({"data": data[::-1]}).encode())

    async def nothing(request: TextRequest) -> AsyncGenerator[Event, None]:
        data = [{"index": 0, "embedding": [0.0] * len(embedding("a"))}]
        yield Document(json.dumps({"data": data}).encode())

    runtime.answer = backwards
    store = await client.vector_stores.create()
    sizes: Any = {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 0}
    done = await client.vector_stores.files.create_and_poll(
        file_id=await upload(client, "alpha " * 100 + "\n\n" + "omega " * 100),
        vector_store_id=store.id,
        chunking_strategy={"type": "static", "static": sizes},
        poll_interval_ms=10,
    )
    assert done.status == "completed", done.last_error
    word = next(each for each in map(str, range(100)) if embedding(each) @ embedding("alpha") < 0)
    for query in (["alpha"], ["alpha", word], [word, "alpha"]):
        best, *rest = (await client.vector_stores.search(store.id, query=query)).data
        assert best.content[0].text.startswith("alpha")
        assert 0.99 < best.score <= 1, "of several queries the best counts"
        assert all(0 <= each.score <= 1 for each in rest)
    found = await client.vector_stores.search(store.id, query="alpha omega")
    assert all(0.5 < each.score < 0.9 for each in found.data)
    found = await client.vector_stores.search(store.id, query=word)
    assert {each.score for each in found.data if "alpha" in each.content[0].text} == {0}
    runtime.answer = nothing
    failed = await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("a.txt", TRAINS.encode()), poll_interval_ms=10
    )
    assert failed.last_error is not None
    assert "no usable embeddings" in failed.last_error.message


async def test_a_key_uses_its_own_models_only(engine: Engine, tmp_path: Path) -> None:
    files = FileStore(tmp_path, FileLimits())
    files.open()
    file = files.create("me", Purpose.ASSISTANTS, "a.txt", [TRAINS.encode()])
    embedder = Embedder(engine, Models("words", "ranker"))
    stores = VectorStores(tmp_path, VectorStoreConfig(), files, embedder, lambda _name: None)
    await stores.start()
    try:
        viewer = Viewer("me")
        every, none, words = (
            Access(Caller("me"), admin=False, models=models)
            for models in (None, frozenset[str](), frozenset({"words"}))
        )
        new: dict[str, Any] = {"name": "a", "description": None, "metadata": None, "files": []}
        new |= {"expires_days": None, "chunking": None}
        with pytest.raises(ModelForbidden):
            await stores.create(viewer, none, **new)
        store = await stores.create(viewer, every, **new)
        with pytest.raises(ModelForbidden):
            await stores.attach(viewer, none, store.id, [(file.id, None, {})], "file_id")
        for access in (none, words):
            with pytest.raises(ModelForbidden, match="words" if access is none else "ranker"):
                async with asyncio.timeout(30):
                    await stores.search(viewer, access, store.id, Search(["a"], 1))
        await stores.attach(viewer, every, store.id, [(file.id, None, {})], "file_id")
        async with asyncio.timeout(60):
            while True:
                found = await stores.attachment(viewer, store.id, file.id)
                if found.error is not None:
                    break
                await asyncio.sleep(0.01)
        assert found.status is AttachmentStatus.FAILED
        assert "'me', which attached the file, is gone" in found.error[1]
    finally:
        await stores.stop()
        files.close()
