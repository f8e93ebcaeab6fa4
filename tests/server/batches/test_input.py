"""The lines of an input file: where they are, and which of them are refused."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.caller import Caller
from engine.errors import NotFound
from server.batches import input as batch_input
from server.batches.body import encode_body
from server.batches.input import Checks, read_input, read_line
from server.keys.access import EVERYTHING, Access
from tests.server.fake import FakeRuntime, fake_engine

CHAT = "/v1/chat/completions"


def checks(tmp_path: Path, endpoint: str = CHAT, **more: Any) -> Checks:
    models = [
        {"id": "small", "runtime": "fake", "source": "none", "aliases": ["gpt-4o"]},
        {"id": "judge", "runtime": "fake", "source": "none", "task": "classify"},
    ]
    engine = fake_engine(FakeRuntime(), tmp_path, models=models)
    given: dict[str, Any] = {
        "access": EVERYTHING, "max_line_bytes": 2000, "find_file": lambda _: None,
    }  # fmt: skip
    return Checks(engine=engine, endpoint=endpoint, **{**given, **more})


def line(custom_id: Any = "a", url: str = CHAT, **body: Any) -> bytes:
    document = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(document).encode() + b"\n"


def errors_of(data: bytes, checks: Checks) -> list[tuple[str, str | None, int | None]]:
    _, errors = read_input(io.BytesIO(data), 1, checks)
    return [(error.code, error.param, error.line) for error in errors]


def test_lines_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + line("a", model="small", n=1) + b" \n" + line("b", model="gpt-4o", n=2)
    )
    with path.open("rb") as stream:
        lines, errors = read_input(stream, 7, checks(tmp_path))
        assert not errors
        assert [(each.number, each.group, each.batch) for each in lines] == [
            (1, "small", 7), (3, "small", 7),
        ]  # fmt: skip
        assert [read_line(stream, each)["n"] for each in lines] == [1, 2]


def test_a_line_that_is_too_long_hides_no_other(tmp_path: Path) -> None:
    long = b"x" * 7000 + b"\n"
    data = long + line("a", model="small") + long + line("a", model="small") + long[:-1]
    too_long = [("line_too_long", None, number) for number in (1, 3, 5)]
    expected = [*too_long[:2], ("duplicate_custom_id", "custom_id", 4), too_long[2]]
    assert errors_of(data, checks(tmp_path)) == expected


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        (line("a" * 513, model="small"), "missing_required_parameter", "custom_id"),
        (line(5, model="small"), "missing_required_parameter", "custom_id"),
        (line(model="small", top_p=float("nan")), "invalid_json_line", None),
        (line(model="judge"), "model_forbidden", "body.model"),
        (line(model=5), "invalid_request", "body.model"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, data: bytes, code: str, param: str | None) -> None:
    access = Access(Caller("a"), admin=False, models=frozenset({"small"}))
    assert errors_of(data, checks(tmp_path, access=access)) == [(code, param, 1)]


def test_the_longest_custom_id_is_taken(tmp_path: Path) -> None:
    assert errors_of(line("a" * 512, model="small"), checks(tmp_path)) == []


def test_so_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "MAX_LINES", 2)
    data = [line(name, model="small") for name in "abc"]
    assert errors_of(b"".join(data[:2]), checks(tmp_path)) == []
    assert errors_of(b"".join(data), checks(tmp_path)) == [("too_many_tasks", None, None)]


def test_moderations_need_no_model(tmp_path: Path) -> None:
    path = "/v1/moderations"
    lines, errors = read_input(io.BytesIO(line(url=path)), 1, checks(tmp_path, path))
    assert not errors and lines[0].group == "judge"


def test_pictures_are_files(tmp_path: Path) -> None:
    def find(known: str, file_id: str) -> bytes:
        if file_id != known:
            raise NotFound("There is no such file.")
        return b"a picture"

    path, known = "/v1/images/edits", "file-1"
    seen = checks(tmp_path, path, find_file=partial(find, known))
    for image in (known, {"file_id": known}, [known, "data:,x"]):
        assert errors_of(line(url=path, model="small", image=image), seen) == []
    for field, value in (("image", ["file-2"]), ("mask", {"file_id": "file-2"})):
        data = line(url=path, model="small", **{field: value})
        assert errors_of(data, seen) == [("not_found", f"body.{field}", 1)]
    body = {"image": [known, "data:,x"], "mask": {"file_id": known}, "n": 1}
    document, content_type = encode_body(path, body, partial(find, known))
    picture = "YSBwaWN0dXJl"
    assert json.loads(document) == {"image": [picture, "data:,x"], "mask": picture, "n": 1}
    assert content_type == "application/json"
    listed = {"file": "data:a;base64,YQ==", "timestamp_granularities": ["word", "segment"]}
    form, _ = encode_body("/v1/audio/transcriptions", listed, partial(find, known))
    assert form.count(b'name="timestamp_granularities[]"') == 2
