"""remote: models of providers with OpenAI's endpoints, or Anthropic's.

A remote model has no bytes and no files here. It is brought in at the start and stays: that only
takes its key. `source` is the provider's base URL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config import ModelConfig
from engine.errors import InvalidRequest, LoadFailed
from engine.files.hub.selection import HubSource
from engine.memory.block import Estimate
from engine.requests import (
    ImageRequest,
    Request,
    SpeechRequest,
    TextRequest,
    TranscriptionRequest,
)
from engine.runtimes.base import LoadedModel, Prepared, Runtime, RuntimeContext, Voice
from engine.runtimes.remote.address import Address
from engine.runtimes.remote.options import RemoteOptions, provider_of
from engine.section import Section
from engine.status import ProviderStatus

if TYPE_CHECKING:
    from engine.runtimes.remote.provider import Provider


class RemoteRuntime(Runtime):
    """Asks providers."""

    name: ClassVar[str] = "remote"
    tasks: ClassVar[tuple[str, ...]] = ("generate", "embed", "image", "speech", "transcribe")
    Options: ClassVar[type[Section]] = RemoteOptions
    takes_no_device: ClassVar[bool] = True

    def __init__(
        self, context: RuntimeContext, new_provider: Callable[[str], Provider] | None = None
    ) -> None:
        """`new_provider` makes the provider of a name."""
        super().__init__(context)
        self._new_provider = new_provider
        self._providers: dict[str, Provider] = {}

    @classmethod
    def hub_sources(cls, model: ModelConfig) -> tuple[HubSource, ...]:  # noqa: ARG003 - the same
        """Nothing: a provider has the files."""
        return ()

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """Look at the address.

        Raises:
            ValueError: it is none.

        """
        try:
            Address.of(model.source)
        except ValueError as error:
            raise ValueError(f"source: {error}") from None

    def start(self) -> None:
        """Import httpx, and keep its line for each request out of the log.

        Whoever has the address of an answer's file may be able to read it.
        """
        logging.getLogger("httpx").setLevel(logging.WARNING)
        from engine.runtimes.remote.metrics import provider_registry

        self.metrics = provider_registry(self._providers.values)

    def prepare(self, model: ModelConfig, request: Request) -> Prepared:
        """Check what the provider is known not to take."""
        options = model.options_as(RemoteOptions)
        payload: Any
        match model.task, request:
            case "generate" | "embed", TextRequest():
                from engine.runtimes.remote.text import prepare_text

                payload = prepare_text(model, request, options)
            case "image", ImageRequest():
                from engine.runtimes.remote.image import prepare_image

                payload = prepare_image(model, request, options)
            case "speech", SpeechRequest():
                from engine.runtimes.remote.speech import prepare_speech

                payload = prepare_speech(model, request, options)
            case "transcribe", TranscriptionRequest():
                from engine.runtimes.remote.transcription import prepare_transcription

                payload = prepare_transcription(model, request, options)
            case _:
                raise InvalidRequest(
                    f"The model {model.id!r} does not support {request.operation.value}.",
                    param="model",
                )
        return Prepared(request, payload)

    def inputs(self, model: ModelConfig) -> frozenset[str] | None:
        """What the options say of images."""
        sees = model.options_as(RemoteOptions).vision
        if sees is None or model.task != "generate":
            return None
        return frozenset({"text", "image"} if sees else {"text"})

    def estimate(self, model: ModelConfig) -> Estimate:  # noqa: ARG002 - the same for all
        """Nothing, at once."""
        return Estimate(blocks=(), load_seconds=0.0)

    async def load(
        self,
        model: ModelConfig,
        on_failure: Callable[[str], None],  # noqa: ARG002 - a provider that fails is asked again
    ) -> LoadedModel:
        """Look whether the key is there.

        Raises:
            LoadFailed: it is not. The error names the variable or the file.

        """
        from engine.runtimes.remote.model import RemoteModel
        from engine.runtimes.remote.provider import Provider
        from engine.runtimes.remote.target import Target

        options = model.options_as(RemoteOptions)
        name = provider_of(model.id, options)
        provider = self._providers.get(name)
        if provider is None:
            provider = (
                Provider(name, tracer=self.context.tracer)
                if self._new_provider is None
                else self._new_provider(name)
            )
            self._providers[name] = provider
        try:
            target = provider.target(model.id)  # what is known of it outlives an unload
            if target is None or target.options != options:
                target = provider.add(Target(model, provider.clock))
            target.headers()
        except LoadFailed as error:
            provider.cannot_load(error.message)
            raise
        await provider.open()
        return RemoteModel(provider, target)

    async def unload(self, loaded: LoadedModel) -> None:
        """Nothing: the connections are the provider's."""

    def voices(self, model: ModelConfig) -> tuple[Voice, ...]:
        """Those that the configuration names."""
        options = model.options_as(RemoteOptions)
        names = dict.fromkeys([*([options.voice] if options.voice else []), *options.voices])
        return tuple(Voice(name, name) for name in names)

    def providers(self) -> tuple[ProviderStatus, ...]:
        """How each provider is."""
        return tuple(provider.status for provider in self._providers.values())

    async def stop(self) -> None:
        """Close all connections."""
        for provider in self._providers.values():
            await provider.close()
