"""Every field of a request for media works, is refused by its name, or is known to do nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.errors import InvalidRequest
from engine.requests import SchedulingOptions
from server.forms import Fields
from server.image_io import Picture, decode_pictures
from server.schemas.audio import SpeechBody, TranscriptionBody, TranslationBody, VoiceBody
from server.schemas.fields import Body
from server.schemas.images import EditBody, GenerationBody, VariationBody
from server.schemas.videos import VideoBody
from tests.server.test_images import data_url

ROOT = Path(__file__).parents[2]
OPENAI = json.loads((ROOT / "tests/contract/openai_fields.json").read_text("utf-8"))["fields"]

BODIES: dict[str, type[Body]] = {
    "/v1/images/generations": GenerationBody,
    "/v1/images/edits": EditBody,
    "/v1/images/variations": VariationBody,
    "/v1/videos": VideoBody,
    "/v1/audio/speech": SpeechBody,
    "/v1/audio/transcriptions": TranscriptionBody,
    "/v1/audio/translations": TranslationBody,
    "/v1/audio/voices": VoiceBody,
}

HARMLESS: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {
        "background": "opaque",
        "moderation": "low",
        "style": "natural",
        "user": "a",
    },
    "/v1/images/edits": {
        "background": "opaque",
        "input_fidelity": "high",
        "moderation": "low",
        "user": "a",
    },
    "/v1/images/variations": {"background": "opaque", "moderation": "low", "user": "a"},
    "/v1/audio/speech": {"instructions": "merrily"},
    "/v1/audio/voices": {"consent": "cons_1"},
}
"""Fields that are taken without effect, with a value. `docs/api.md` names each."""

REFUSED: dict[str, dict[str, Any]] = {
    "/v1/audio/transcriptions": {
        "include": ["logprobs"],
        "languages": ["en", "de"],
    },
}
"""Fields of OpenAI's that are refused by their names, with a value."""

PICTURE = data_url(Image.new("RGB", (8, 8), "red"))
OTHER = data_url(Image.new("RGB", (8, 8), "blue"))

IMAGE_FIELDS: dict[str, Any] = {
    "model": "other",
    "prompt": "other",
    "n": 2,
    "size": "64x32",
    "quality": "high",
    "seed": 3,
    "negative_prompt": "dogs",
    "steps": 3,
    "guidance": 2.0,
    "strength": 0.5,
    "loras": [{"name": "a"}],
    "control_image": PICTURE,
    "reference_image": PICTURE,
    "image": OTHER,
}

IN_REQUEST: dict[str, dict[str, Any]] = {
    "/v1/images/generations": IMAGE_FIELDS,
    "/v1/images/edits": {**IMAGE_FIELDS, "mask": PICTURE},
    "/v1/images/variations": IMAGE_FIELDS,
    "/v1/videos": {
        "model": "other",
        "prompt": "other",
        "size": "64x32",
        "seconds": "2",
        "input_reference": OTHER,
        "fps": 9,
        "num_frames": 7,
        "seed": 3,
        "motion": "slow",
        "negative_prompt": "dogs",
        "quality": "high",
        "steps": 3,
        "guidance": 2.0,
        "loras": [{"name": "a"}],
    },
    "/v1/audio/speech": {
        "model": "other",
        "input": "other",
        "voice": "alloy",
        "speed": 2.0,
        "language": "de",
        "seed": 3,
    },
    "/v1/audio/transcriptions": {
        "file": b"other",
        "model": "other",
        "language": "de",
        "prompt": "other",
        "temperature": 0.5,
        "vad": True,
        "hotwords": "river",
        "keywords": ["river"],
        "chunking_strategy": "auto",
    },
    "/v1/audio/translations": {
        "file": b"other",
        "model": "other",
        "prompt": "other",
        "temperature": 0.5,
        "vad": True,
        "hotwords": "river",
    },
}
"""Fields that change the request which the engine gets, with a value."""

ELSEWHERE = {
    "/v1/images/generations": {"stream", "partial_images", "response_format", "output_format",
                               "output_compression"},
    "/v1/images/edits": {"stream", "partial_images", "response_format", "output_format",
                         "output_compression", "images"},
    "/v1/images/variations": {"stream", "partial_images", "response_format", "output_format",
                              "output_compression"},
    "/v1/audio/speech": {"response_format", "stream_format", "word_times"},
    "/v1/audio/transcriptions": {"response_format", "stream", "timestamp_granularities",
                                 "known_speaker_names", "known_speaker_references"},
    "/v1/audio/translations": {"response_format"},
    "/v1/audio/voices": {"name", "audio_sample"},
}  # fmt: skip
"""Fields that change the answer, or act only beside another. The tests of each endpoint have
them."""

LEAST: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {"model": "small", "prompt": "a"},
    "/v1/images/edits": {"model": "small", "prompt": "a", "image": PICTURE},
    "/v1/images/variations": {"model": "small", "image": PICTURE},
    "/v1/videos": {"model": "small", "prompt": "a"},
    "/v1/audio/speech": {"model": "small", "input": "a"},
    "/v1/audio/transcriptions": {"model": "small", "file": b"sound"},
    "/v1/audio/translations": {"model": "small", "file": b"sound"},
    "/v1/audio/voices": {"name": "a", "audio_sample": b"sound"},
}


def asked(path: str, fields: dict[str, Any]) -> Any:
    """The request that the engine gets."""
    body: Any = BODIES[path].of(Fields({**LEAST[path], **fields}, typed=False))
    common: dict[str, Any] = {"request_id": "test", "scheduling": SchedulingOptions()}
    if isinstance(body, SpeechBody):
        return body.to_request(None, **common)
    if isinstance(body, TranscriptionBody | TranslationBody):
        return body.to_request(**common)
    pictures: list[Picture] = decode_pictures(body.uploads(), 10_000)
    return body.to_request(pictures, **common)


@pytest.mark.parametrize("path", BODIES)
def test_every_field_has_its_place(path: str) -> None:
    """A new field of ours, or of OpenAI's document, has to be put into one of the lists."""
    sets = (IN_REQUEST, ELSEWHERE, HARMLESS)
    taken = [name for each in sets for name in each.get(path, ())]
    assert sorted(taken + ["include"] * ("include" in REFUSED.get(path, ()))) == sorted(
        BODIES[path].model_fields
    )
    assert set(OPENAI[path]) <= {*taken, *REFUSED.get(path, ())}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, fields in IN_REQUEST.items() for name in fields]
)
def test_a_field_that_works_reaches_the_engine(path: str, name: str) -> None:
    assert asked(path, {name: IN_REQUEST[path][name]}) != asked(path, {})


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, fields in REFUSED.items() for name in fields]
)
def test_a_field_that_does_not_work_is_refused_by_its_name(path: str, name: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        asked(path, {name: REFUSED[path][name]})
    assert raised.value.param == name and name in raised.value.message


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, fields in HARMLESS.items() for name in fields]
)
def test_a_field_without_effect_is_documented(path: str, name: str) -> None:
    BODIES[path].of(Fields({**LEAST[path], name: HARMLESS[path][name]}, typed=False))
    lines = (ROOT / "docs/api.md").read_text("utf-8").splitlines()
    assert any(f"`{name}`" in line and "without effect" in line for line in lines)
