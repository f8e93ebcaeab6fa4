"""A runtime without a library, written from the docstring of `Runtime` alone."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.events import Document, Event
from engine.files.hub.repository import Repository
from engine.files.hub.selection import HubSource
from engine.memory.block import Block, Estimate
from engine.model_folder import PresentFolders
from engine.requests import Request, TextRequest
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext
from engine.runtimes.recognised import Recognised
from engine.section import Section

RHYMES_FILE = "rhymes.json"


class ToyOptions(Section):
    lines: int = Field(default=2, ge=1)
    revision: str | None = None
    dictionary: str | None = None
    loras: Path | None = None


def read_rhymes(folder: Path) -> dict[str, str]:
    rhymes: dict[str, str] = json.loads((folder / RHYMES_FILE).read_text(encoding="utf-8"))
    return rhymes


class LoadedToy(LoadedModel):
    max_concurrency = 1

    def __init__(self, rhymes: dict[str, str]) -> None:
        self._rhymes = rhymes

    def blocks(self) -> tuple[Block, ...]:
        return (Block("rhymes", 100),)

    async def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        yield Document(json.dumps([self._rhymes[prepared.payload]] * 2).encode())


class ToyRuntime(Runtime):
    name: ClassVar[str] = "toy"
    tasks: ClassVar[tuple[str, ...]] = ("rhyme",)
    Options: ClassVar[type[Section]] = ToyOptions

    def __init__(self, context: RuntimeContext) -> None:
        super().__init__(context)
        self._rhymes = PresentFolders(context.cache_dir, read_rhymes, [RHYMES_FILE])
        self.started = False

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:
        options = model.options_as(ToyOptions)
        sources = [HubSource(model.source, (RHYMES_FILE, "*.npz"), options.revision)]
        if options.dictionary is not None:
            sources.append(HubSource(options.dictionary, ("*.npz",)))
        return tuple(sources)

    @classmethod
    def recognise(cls, repository: Repository) -> Recognised | None:
        if RHYMES_FILE not in repository.paths:
            return None
        return Recognised(cls.name, "rhyme", {"lines": len(repository.json(RHYMES_FILE))})

    @classmethod
    def lora_folder(cls, model: ModelConfig) -> Path | None:
        return model.options_as(ToyOptions).loras

    def start(self) -> None:
        self.started = True

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        assert isinstance(request, TextRequest)
        word = str(request.body.get("prompt"))
        rhymes = self._rhymes.get(model.source, model.options_as(ToyOptions).revision)
        if rhymes is not None and word not in rhymes:
            raise InvalidRequest(f"Nothing rhymes with {word!r}.", param="prompt")
        return Prepared(request, word)

    def estimate(self, model: ModelConfig) -> Estimate:
        self._folder(model)
        return Estimate((Block("rhymes", 100),), 0.1)

    async def load(self, model: ModelConfig, on_failure: Callable[[str], None]) -> LoadedModel:
        assert self.started
        rhymes = self._rhymes.get(model.source, model.options_as(ToyOptions).revision)
        if rhymes is None:
            raise LoadFailed("the files are gone")
        return LoadedToy(rhymes)

    async def unload(self, loaded: LoadedModel) -> None:
        pass
