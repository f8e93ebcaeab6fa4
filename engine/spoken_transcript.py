"""A transcript with its speakers: two runs at once, on two models that one plan holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from engine.engine import Engine
from engine.errors import InvalidRequest, RuntimeFailed
from engine.events import Segment, Speakers, SpeakerTurn
from engine.media.spoken import SpokenSegment, spoken_segments
from engine.requests import DiarizationRequest, TranscriptionRequest
from engine.scheduling.lease import Lease, LeaseTimings
from engine.session import Session

DIARIZE = "diarize"
"""The task of models that tell speakers apart."""

WORDS = "timestamp_granularities"
"""The field that a model names which does not say when a word was spoken."""


class SpokenTranscript:
    """Holds both models. The caller runs `request`, and then joins what it gave.

    Call `end` in any case: it stops what still runs, and lets the models go.
    """

    def __init__(self, request: TranscriptionRequest, lease: Lease, session: Session) -> None:
        """`begin` makes one."""
        self.request = request
        self._lease = lease
        self._session = session
        self._turns = asyncio.create_task(_turns(session))

    @classmethod
    async def begin(
        cls, engine: Engine, request: TranscriptionRequest, diarization: DiarizationRequest
    ) -> SpokenTranscript:
        """Check both requests, hold both models or none, and begin to tell the speakers apart.

        The recording is decoded by then: a bad one fails here.

        Raises:
            InvalidRequest: a model refuses its request. Nothing is loaded for it.
            Overloaded: sessions leave no room for both models.
            InsufficientCapacity: both never fit.
            EngineError: one of them cannot be loaded, or the diarization failed.

        """
        request = await engine.resolve(request)
        await _with_words(engine, request)
        await engine.check(diarization)
        lease = await engine.hold(
            (request.model, diarization.model),
            request_id=f"{request.request_id}-models",
            scheduling=request.scheduling,
        )
        try:
            # Only now are the files of the model here for sure.
            request = await _with_words(engine, request)
            session = await engine.open(diarization)
            return cls(request, lease, session)
        except BaseException:
            lease.release()
            raise

    @property
    def waited(self) -> LeaseTimings:
        """The wait for both models."""
        return self._lease.timings

    async def join(self, segments: Sequence[Segment]) -> list[SpokenSegment]:
        """What each speaker said, from the whole transcript. The models are let go before.

        Raises:
            EngineError: the diarization failed.

        """
        try:
            turns = await self._turns
        finally:
            await self.end()
        return await asyncio.to_thread(spoken_segments, segments, turns)

    async def end(self) -> None:
        """Stop the diarization if it still runs, and let both models go."""
        self._turns.cancel()
        try:
            await asyncio.wait([self._turns])
            if not self._turns.cancelled():
                self._turns.exception()  # whoever joins has it too
            # A task that was cancelled before it began has not closed it.
            await self._session.close()
        finally:
            self._lease.release()


async def _with_words(engine: Engine, request: TranscriptionRequest) -> TranscriptionRequest:
    """The request with the times of words, if its model knows them.

    Raises:
        InvalidRequest: the model refuses the request in either form.

    """
    with_words = replace(request, word_times=True)
    try:
        await engine.check(with_words)
    except InvalidRequest as error:
        if error.param != WORDS:
            raise
        await engine.check(request)
        return request
    return with_words


async def _turns(session: Session) -> tuple[SpeakerTurn, ...]:
    async with aclosing(session.events()) as events:
        async for event in events:
            if isinstance(event, Speakers):
                return event.turns
    raise RuntimeFailed("The model told no speakers apart.")
