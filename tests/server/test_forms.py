"""Forms as clients send them: names with structure, files, and bounds."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from typing import Any, NoReturn

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from engine.errors import InvalidRequest
from server.body import read_object
from server.forms import MAX_FIELDS, MAX_FILES, Fields, read_fields

MAX_BYTES = 4 * 2**20
Parts = list[tuple[str, Any]]


def request_of(content: bytes, content_type: str) -> Request:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        assert not sent, "it reads on after the end"
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    headers = [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def read(parts: Parts, max_bytes: int = MAX_BYTES) -> Fields:
    """A form of text (str) and files (bytes), read as the server does."""
    files = [
        (name, ("upload", value) if isinstance(value, bytes) else (None, value))
        for name, value in parts
    ]
    made = httpx.Request("POST", "http://here/", files=files)
    return await read_fields(request_of(made.read(), made.headers["content-type"]), max_bytes)


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        ([("prompt", "a cat"), ("n", "2")], {"prompt": "a cat", "n": "2"}),
        ([("prompt", "ein Kätzchen 猫")], {"prompt": "ein Kätzchen 猫"}),
        ([("image", b"1")], {"image": [b"1"]}),
        ([("image", b"1"), ("image", b"2")], {"image": [b"1", b"2"]}),
        ([("image[]", b"1"), ("image[]", b"2")], {"image": [b"1", b"2"]}),
        ([("image", b"")], {"image": [b""]}),
        ([("tags[]", "a"), ("tags[]", "b")], {"tags": ["a", "b"]}),
        ([("ref[image_url]", "data:")], {"ref": {"image_url": "data:"}}),
        (
            [("l[][n]", "a"), ("l[][n]", "b"), ("l[][w]", "1"), ("l[][w]", "2")],
            {"l": [{"n": "a", "w": "1"}, {"n": "b", "w": "2"}]},
        ),
    ],
)
async def test_structure(parts: Parts, values: dict[str, Any]) -> None:
    assert await read(parts) == Fields(values, typed=False)


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("prompt", "a"), ("prompt", "b")], "prompt"),
        ([("image", "text"), ("image", b"1")], "image"),
        ([("r[a]", "1"), ("r[a]", "2")], "r[a]"),
        ([("r", "1"), ("r[a]", "2")], "r"),
        ([("r[a]", "1"), ("r[]", "2")], "r"),
        ([("l", "1"), ("l[][a]", "2")], "l"),
        ([("l[][n]", "a"), ("l[][n]", "b"), ("l[][w]", "1")], "l"),
        ([("a[b][c]", "1")], "a[b][c]"),
        ([("[]", "1")], "[]"),
        ([("", "1")], ""),
    ],
)
async def test_what_means_nothing_is_refused(parts: Parts, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await read(parts)
    assert caught.value.param == param


async def test_json_keeps_its_types() -> None:
    request = request_of(b'{"n": 2}', "application/json")
    assert await read_fields(request, MAX_BYTES) == Fields({"n": 2}, typed=True)


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"garbage", "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\nno name\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\n" + b"a" * 100_000, "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: " + b"a" * 100_000, "multipart/form-data; boundary=x"),
    ],
)
async def test_malformed_form(content: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequest, match="The form cannot be read") as caught:
        await read_fields(request_of(content, content_type), MAX_BYTES)
    assert caught.value.status == 400


async def test_too_many_parts() -> None:
    await read([("image[]", b"1")] * MAX_FILES)
    with pytest.raises(InvalidRequest, match="Too many files"):
        await read([("image[]", b"1")] * (MAX_FILES + 1))
    await read([("tags[]", "1")] * MAX_FIELDS)
    with pytest.raises(InvalidRequest, match="Too many fields"):
        await read([("tags[]", "1")] * (MAX_FIELDS + 1))


@pytest.mark.parametrize("value", [b"x" * MAX_BYTES, "x" * MAX_BYTES])
async def test_too_long(value: bytes | str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await read([("image", value)])
    assert caught.value.status == 413


async def test_nothing_is_written_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    large = b"x" * (MAX_BYTES - 2**16)
    assert (await read([("image", large)])).values == {"image": [large]}


async def test_an_empty_field_stands_for_the_default() -> None:
    fields = await read([("language", ""), ("prompt", "a"), ("file", b"")])
    assert fields.values == {"prompt": "a", "file": [b""]}


def encoded_request(content: bytes, encoding: str) -> Request:
    made = request_of(content, "application/json")
    made.scope["headers"].append((b"content-encoding", encoding.encode()))
    return made


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "identity"])
async def test_an_encoded_body_is_decoded_within_the_limit(encoding: str) -> None:
    text = b'\xef\xbb\xbf{"a": "' + b"x" * 3_000_000 + b'"}'
    packed = {"gzip": gzip.compress(text), "deflate": zlib.compress(text)}
    sent = packed.get(encoding.lower(), text)
    found = await read_object(encoded_request(sent, encoding), MAX_BYTES)
    assert len(found["a"]) == 3_000_000
    with pytest.raises(InvalidRequest) as caught:
        await read_object(encoded_request(sent, encoding), 2_999_999)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [(b"{}", "br", 415), (b"{}", "gzip", 400), (gzip.compress(b"{}", mtime=0)[:-3], "gzip", 400)],
    ids=["unknown", "plain", "cut"],
)
async def test_an_encoding_that_cannot_be_read(content: bytes, encoding: str, status: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await read_object(encoded_request(content, encoding), MAX_BYTES)
    assert caught.value.status == status
