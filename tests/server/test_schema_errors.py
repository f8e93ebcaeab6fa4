"""What is wrong with a field is told by its name and its rule."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.errors import InvalidRequest
from server.forms import Fields
from server.schemas.audio import SpeechBody, TranscriptionBody
from server.schemas.engine import EventsQuery, PlanBody
from server.schemas.fields import Body
from server.schemas.images import EditBody, GenerationBody
from server.schemas.scheduling_options import SchedulingBody
from server.schemas.videos import VideoBody
from tests.test_docs import BODIES

GIVEN: dict[str, Any] = {
    "model": "m",
    "prompt": "p",
    "input": "hi",
    "file": [b"x"],
    "purpose": "batch",
    "filename": "f",
    "bytes": 1,
    "mime_type": "text/plain",
    "data": [b""],
    "part_ids": [],
    "input_file_id": "file-1",
    "endpoint": "/v1/embeddings",
    "completion_window": "24h",
    "image": [b"x"],
    "audio_sample": [b"x"],
    "name": "n",
    "body": {"model": "m"},
    "items": [{"role": "user", "content": "hi"}],
    "metadata": {"a": "b"},
    "attributes": {"a": "b"},
    "query": "where",
    "text": "hi",
    "file_id": "file-1",
}
WRONG: list[Any] = [
    5, -1, 1.5, "zz", [], ["a"] * 40, [1], {}, {"x": 1}, True, "x" * 600_000,
    [{"name": ""}], [{"name": "a", "weight": "x"}], [{"nam": 1}], [[]],
]  # fmt: skip
FOREIGN = re.compile(
    r"[Ii]nput should|instance of|after validation|pydantic|line 1|Error\b|[A-Z]\w+Body"
)


def told(body: type[Body], fields: dict[str, Any], *, typed: bool = True) -> InvalidRequest:
    given = {name: GIVEN[name] for name in body.model_fields if name in GIVEN}
    with pytest.raises(InvalidRequest) as raised:
        body.of(Fields({**given, **fields}, typed))
    return raised.value


EVERY = {each for bodies in BODIES.values() for each in bodies if issubclass(each, Body)}
"""Without the parts of bodies, which have tables of their own."""


@pytest.mark.parametrize("body", sorted(EVERY, key=repr))
def test_every_field_is_named_in_words_of_ours(body: type[Body]) -> None:
    needed = {n: GIVEN[n] for n, f in body.model_fields.items() if f.is_required()}
    refused = 0
    for name in body.model_fields:
        for value in WRONG:
            for typed in (True, False) if isinstance(value, str) else (True,):
                try:
                    body.of(Fields({**needed, name: value}, typed))
                except InvalidRequest as error:
                    refused += 1
                    assert error.param is not None
                    assert re.split(r"[.\[]", error.param)[0] == name
                    assert not FOREIGN.search(error.message), error.message
                    assert len(error.message) < 300
                    assert name in error.message
    assert refused >= 4


@pytest.mark.parametrize(
    ("body", "fields", "param", "rule"),
    [
        (GenerationBody, {"n": 11}, "n", "it must be at most 10"),
        (GenerationBody, {"n": "2"}, "n", "it must be a whole number"),
        (GenerationBody, {"stream": "yes"}, "stream", "it must be true or false"),
        (GenerationBody, {"strength": 0}, "strength", "it must be above 0"),
        (GenerationBody, {"loras": ["a"]}, "loras[0]", "it must be an object"),
        (GenerationBody, {"loras": [{"name": "a"}] * 17}, "loras", "it must have at most 16 items"),
        (GenerationBody, {"response_format": "png"}, "response_format",
         "it must be 'b64_json' or 'url'"),
        (EditBody, {"image": []}, "image", "it must have at least 1 item"),
        (SpeechBody, {"voice": "x" * 257}, "voice", "it must have at most 256 characters"),
        (SpeechBody, {"voice": {"id": ""}}, "voice", "it must not be empty"),
        (SpeechBody, {"voice": {"name": "a"}}, "voice", "it must be a string"),
        (TranscriptionBody, {"timestamp_granularities": ["words"]}, "timestamp_granularities[0]",
         "it must be 'word' or 'segment'"),
        (VideoBody, {"motion": 256}, "motion", "slow, medium, fast, or a number from 0 to 255"),
        (VideoBody, {"motion": -1}, "motion", "slow, medium, fast, or a number from 0 to 255"),
        (PlanBody, {"working_bytes": "2 goats"}, "working_bytes", "'2 goats' is not a size"),
        (EventsQuery, {"limit": 0}, "limit", "it must be at least 1"),
        (SchedulingBody, {"priority": "soon"}, "priority", "interactive, normal, batch"),
    ],
)  # fmt: skip
def test_the_rule_is_the_one_that_is_broken(
    body: type[Body], fields: dict[str, Any], param: str, rule: str
) -> None:
    error = told(body, fields)
    assert error.param == param
    assert rule in error.message


def test_a_list_in_a_form_is_json() -> None:
    error = told(GenerationBody, {"loras": "a, b"}, typed=False)
    assert (error.param, "written as JSON" in error.message) == ("loras", True)
