"""Whose answer an answer is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.catalog.identity import Identity
from engine.config import EngineConfig
from engine.requests import ImageOperation, ImageRequest, LoraChoice, TextOperation, TextRequest
from engine.scheduling.event_log import EventLog
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.status import ModelState, ModelStatus
from server.response_cache.entry import Entry
from server.response_cache.target import Loads, Target
from tests.server.fake import FakeRuntime, fake_engine

SERVED_BY = "x-roundhouse-served-by"
CONFIG = EngineConfig.model_validate(
    {
        "models": [
            {"id": "small", "aliases": ["tiny"], "source": "a/b"},
            {"id": "large", "source": "a/c", "fallbacks": ["cloud"]},
            {"id": "cloud", "source": "a/d"},
            {"id": "auto:7b", "source": "a/e"},
        ],
        "routes": [{"id": "auto", "choose": ["tiny", "large"]}],
    }
)


def entry(served_by: str | None) -> Entry:
    return Entry(200, {} if served_by is None else {SERVED_BY: served_by}, (b"",), streamed=False)


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("tiny", ["small"]),
        ("large", ["large"]),
        ("auto", ["small", "large"]),
        ("auto:best", ["small", "large"]),
        ("auto:7b", ["auto:7b"]),
        ("other", None),
        ("other:best", None),
    ],
)
def test_the_models_of_a_name(name: str, models: list[str] | None) -> None:
    target = Target.of(CONFIG, name)
    assert (target and [model.id for model in target.models]) == models


@pytest.mark.parametrize(
    ("name", "served_by", "answered"),
    [
        ("small", None, True),
        ("small", "small", True),
        ("small", "cloud", False),
        ("large", None, False),  # nobody knows whether its fallback answered
        ("large", "large", True),
        ("large", "cloud", False),
        ("auto", None, False),
        ("auto", "small", True),
        ("auto", "cloud", False),
    ],
)
def test_a_fallback_is_another_model(name: str, served_by: str | None, answered: bool) -> None:
    target = Target.of(CONFIG, name)
    assert target is not None
    assert target.answered(entry(served_by)) is answered


TEXT = TextRequest("small", TextOperation.CHAT, {}, "id")
IMAGE = ImageRequest(model="small", operation=ImageOperation.GENERATION, request_id="id")
WITH_LORA = replace(IMAGE, loras=(LoraChoice("style"),))
LOADED_AT = 100.0


class TestLoads:
    @pytest.fixture
    def status(self, tmp_path: Path) -> ModelStatus:
        engine = fake_engine(FakeRuntime(), tmp_path)
        return replace(engine.model_status("small"), state=ModelState.RESIDENT)

    @pytest.fixture
    def log(self) -> EventLog:
        return EventLog(clock=lambda: LOADED_AT)

    @pytest.fixture
    def loads(self, log: EventLog) -> Loads:
        loads = Loads(log)
        for model in ("small", "other"):
            log.append(SchedulerEvent(EventKind.LOAD, model, "", 0, 0))
        return loads

    @pytest.mark.parametrize(
        ("identity", "request_", "current"),
        [
            (Identity("", 99, True, 0), TEXT, True),
            (Identity("", 101, True, 0), TEXT, False),
            (Identity("", 0, True, 0), TEXT, True),  # of a provider: it has no files
            (Identity("", 0, False, 0), TEXT, False),  # they were deleted behind its back
            (Identity("", 99, True, 101), TEXT, True),
            (Identity("", 99, True, 101), IMAGE, True),
            (Identity("", 99, True, 101), WITH_LORA, False),
            (Identity("", 99, True, 98), WITH_LORA, True),
        ],
    )
    def test_a_loaded_model(
        self,
        loads: Loads,
        status: ModelStatus,
        identity: Identity,
        request_: TextRequest | ImageRequest,
        current: bool,
    ) -> None:
        assert loads.is_current(status, identity, request_) is current

    def test_an_absent_model_will_read_what_is_there(
        self, loads: Loads, status: ModelStatus
    ) -> None:
        absent = replace(status, state=ModelState.ABSENT)
        assert loads.is_current(absent, Identity("", 101, True, 0), TEXT)
        assert loads.is_current(absent, Identity("", 0, False, 0), TEXT)

    def test_a_pull_has_brought_newer_files(self, loads: Loads, status: ModelStatus) -> None:
        identity = Identity("", 99, True, 0)
        assert not loads.is_current(replace(status, outdated=True), identity, TEXT)

    def test_a_load_that_nobody_saw(self, log: EventLog, status: ModelStatus) -> None:
        assert not Loads(log).is_current(status, Identity("", 99, True, 0), TEXT)
        assert Loads(log).is_current(status, Identity("", 0, True, 0), TEXT)
