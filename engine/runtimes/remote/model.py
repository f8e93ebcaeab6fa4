"""A remote model that has its key, and how it answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from engine.errors import RuntimeFailed
from engine.events import Event
from engine.memory.block import Block
from engine.requests import ImageRequest, SpeechRequest, TextRequest, TranscriptionRequest
from engine.runtimes.base import LoadedModel, Prepared
from engine.runtimes.remote.provider import Provider
from engine.runtimes.remote.target import Target


class RemoteModel(LoadedModel):
    """A model of a provider. It has no bytes here."""

    def __init__(self, provider: Provider, target: Target) -> None:
        self.provider = provider
        self.target = target

    def blocks(self) -> tuple[Block, ...]:
        """None."""
        return ()

    @property
    def max_concurrency(self) -> int:
        """As the configuration says."""
        return self.target.options.concurrency

    def run(self, prepared: Prepared) -> AsyncGenerator[Event, None]:
        """Ask the provider. Closing the generator closes the connection."""
        # Each brings what its kind of request needs, such as NumPy.
        request = prepared.request
        provider, target, call = self.provider, self.target, prepared.payload
        match request:
            case TextRequest():
                from engine.runtimes.remote.text import run_text

                return run_text(provider, target, request, call, prepared.usage)
            case ImageRequest():
                from engine.runtimes.remote.image import run_image

                return run_image(provider, target, request, call, prepared.usage)
            case SpeechRequest():
                from engine.runtimes.remote.speech import run_speech

                return run_speech(provider, target, request, call, prepared.usage)
            case TranscriptionRequest():
                from engine.runtimes.remote.transcription import run_transcription

                return run_transcription(provider, target, request, call, prepared.usage)
        raise RuntimeFailed(f"A provider is not asked for {request.operation.value}.")
