"""Responses that are made in the background: jobs that outlive their connection, and a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.types import Message, Send

from engine.caller import Caller
from engine.errors import (
    BudgetExceeded,
    BudgetReserved,
    EngineError,
    InvalidRequest,
    Overloaded,
    QueueFull,
    ShuttingDown,
)
from engine.requests import Priority, SchedulingOptions, TextOperation, TextRequest
from server.responses.exchange import Answer, Exchange
from server.responses.fields import KeepingFields
from server.responses.file_searches import Searches
from server.responses.records import CANCELLED, FAILED, IN_PROGRESS, QUEUED, Kept
from server.responses.store import ResponseStore, is_unfinished
from server.responses.stream_reader import ENDED, blocks_of, document_of, type_of
from server.responses.turn import Turn, Turns, is_spoken, outputs_of
from server.sse import EventStream, event_frame

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)

MAX_RUNNING = 16
"""Jobs that are handed to the engine at once."""
MAX_UNFINISHED = 1000
"""Jobs that may wait or run."""
MAX_ATTEMPTS = 3
"""A job whose run ends the process so many times has failed."""
LONGEST_PAUSE_S = 30.0
"""Before a job is tried again that found the engine busy."""
HEARTBEAT_S = 15.0
"""Proxies close a connection that is silent for longer (60 s is common)."""


Answers: TypeAlias = Callable[[Turn, TextRequest], Answer]


@dataclass(slots=True, eq=False)
class _Run:
    """A job that waits or runs."""

    turn: Turn
    request: TextRequest
    attempts: int = 0
    events: list[str] = field(default_factory=list)
    """Those that a client may have. The last comes once the response is kept."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    cancelled: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def streams(self) -> bool:
        """Whether its events are kept."""
        return self.request.body.get("stream") is True

    async def take(self, message: Message) -> None:
        """Take a message of the answer, in the place of a client."""
        if message["type"] != "http.response.body" or not self.streams:
            return
        for block in blocks_of(message.get("body", b"")):
            kind = type_of(block)
            document = document_of(block)
            # The first event was the server's own, and the last one comes with `end`.
            if document is not None and kind not in ENDED | {"", "error", "response.created"}:
                self.add(document)

    def add(self, document: Mapping[str, Any]) -> None:
        """Add an event, with the next number."""
        self.events.append(event_frame({**document, "sequence_number": len(self.events)}).data)
        self.wake()

    def wake(self) -> None:
        """Have all who wait look again."""
        self.changed.set()
        self.changed = asyncio.Event()


class Background:
    """The jobs of all callers. Lives on one event loop."""

    def __init__(self, engine: Engine, turns: Turns, answers: Answers) -> None:
        """`answers` gives the answer to a request, with the tools of the server's own."""
        self._engine = engine
        self._answers = answers
        self._turns = turns
        self._keeper = turns.keeper
        self._runs: dict[str, _Run] = {}
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._stopping = False

    async def submit(self, turn: Turn, request: TextRequest) -> dict[str, Any]:
        """Check the request, keep the job, begin it, and return its first document.

        Raises:
            EngineError: no model can serve the request as it is.
            Overloaded: too many jobs wait, or the server starts or stops.

        """
        try:
            if self._stopping:
                raise ShuttingDown("No new jobs are taken at this moment.", retry_after_s=5.0)
            if len(self._runs) >= MAX_UNFINISHED:
                raise QueueFull(
                    f"{len(self._runs)} responses are made in the background, the server's bound.",
                    retry_after_s=60.0,
                )
            self._engine.prepare(await self._engine.resolve(request))
            document = turn.bare(QUEUED)
            job = _job_of(turn, request)
            await self._keeper.write(
                ResponseStore.save, turn.kept(document, job), turn.inputs, (), spoken=False
            )
        except EngineError as error:
            self._turns.release(turn)
            own = turn.own_error(error)
            if own is error:
                raise
            raise own from error
        except BaseException:
            self._turns.release(turn)
            raise
        run = self._begin(turn, request, 0)
        if run.streams:
            for kind in ("response.created", "response.queued"):
                run.add({"type": kind, "response": document})
        return document

    async def resume(self) -> None:
        """Begin the jobs that a former process left."""
        if not self._keeper.opened:
            return
        for kept in await self._keeper.write(ResponseStore.unfinished):
            if kept.id in self._runs or kept.job is None:
                continue
            turn, request = _turn_of(kept, kept.job)
            if kept.attempts >= MAX_ATTEMPTS:
                message = f"The process ended {kept.attempts} times while this response was made."
                error = {"code": "server_error", "message": message}
                await self._keep(turn, {**turn.bare(FAILED), "error": error}, None)
                continue
            self._turns.hold(turn.fields.conversation)
            run = self._begin(turn, request, kept.attempts)
            if run.streams:
                run.add({"type": "response.created", "response": turn.bare(QUEUED)})

    async def stop(self) -> None:
        """Stop the jobs. They go on after the next start."""
        self._stopping = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def cancel(self, response_id: str, owner: str | None) -> dict[str, Any]:
        """Stop a job and keep its record. Cancelling it again changes nothing.

        Raises:
            NotFound: there is no such response.
            InvalidRequest: it is no job, or has ended otherwise.

        """
        kept = await self._keeper.read(ResponseStore.response, response_id, owner)
        if not kept.background:
            raise InvalidRequest("Cannot cancel a synchronous response.", param="response_id")
        if is_unfinished(kept):
            await self._end_early(kept)
            kept = await self._keeper.read(ResponseStore.response, response_id, owner)
        if kept.status != CANCELLED:
            raise InvalidRequest(
                f"Cannot cancel a response whose status is {kept.status}.", param="response_id"
            )
        return await self._keeper.read(ResponseStore.document, response_id, owner)

    async def delete(self, response_id: str, owner: str | None) -> None:
        """Delete a response, and stop it first if it is a job.

        Raises:
            NotFound: there is no such response.

        """
        kept = await self._keeper.read(ResponseStore.response, response_id, owner)
        if is_unfinished(kept):
            await self._end_early(kept)
        await self._keeper.write(ResponseStore.delete_response, response_id, owner)

    async def send_events(
        self, response_id: str, owner: str | None, after: int | None, send: Send
    ) -> None:
        """Send the events of a job beyond the number `after`, until the last.

        Raises:
            NotFound: there is no such response.
            InvalidRequest: it was not made with `background` and `stream`.

        """
        run = self._runs.get(response_id)
        events = None
        if run is None or not run.streams:
            events = await self._keeper.read(ResponseStore.events, response_id, owner)
            if events is None:
                raise InvalidRequest(
                    "stream: only a response that was made with 'background' and 'stream' has"
                    " events.",
                    param="stream",
                )
        else:
            await self._keeper.read(ResponseStore.response, response_id, owner)
        stream = EventStream(send)
        await stream.begin({})
        begin = 0 if after is None else after + 1
        if run is None or events is not None:
            await stream.send("".join((events or [])[begin:]))
        else:
            async for text in _following(run, begin):
                await stream.send(text)
        await stream.end()

    async def _end_early(self, kept: Kept) -> None:
        run = self._runs.get(kept.id)
        if run is not None and run.task is not None:
            run.cancelled = True
            run.task.cancel()
            await asyncio.wait((run.task,))
        elif kept.job is not None:
            turn, _ = _turn_of(kept, kept.job)
            await self._keep(turn, turn.bare(CANCELLED), None)

    def _begin(self, turn: Turn, request: TextRequest, attempts: int) -> _Run:
        run = _Run(turn, request, attempts)
        self._runs[turn.id] = run
        run.task = asyncio.create_task(self._live(run))
        return run

    async def _live(self, run: _Run) -> None:
        try:
            document = await self._made(run)
            if document is not None:
                await self._end(run, document)
        except asyncio.CancelledError:
            if run.cancelled:
                await self._end(run, run.turn.bare(CANCELLED))
        except EngineError as error:
            # The store failed. The next start finds the job as it was.
            log.error("%s: %s", run.turn.id, error)
        finally:
            del self._runs[run.turn.id]
            self._turns.release(run.turn)
            run.over = True
            run.wake()

    async def _made(self, run: _Run) -> dict[str, Any] | None:
        """The last document of the response; None if it is left to the next start."""
        turn = run.turn
        async with self._slots:
            while True:
                run.attempts += 1
                if not await self._note(run, IN_PROGRESS):
                    return None
                exchange = Exchange(self._turns, turn, self._answers(turn, run.request))
                try:
                    await exchange.attempt(run.take)
                    return exchange.ended or turn.failed(RuntimeError("no response"))
                except asyncio.CancelledError:
                    if not run.cancelled:
                        await self._wait_again(run)
                    raise
                except ShuttingDown:
                    await self._wait_again(run)
                    return None
                except Overloaded as error:
                    if isinstance(error, BudgetExceeded) and not isinstance(error, BudgetReserved):
                        return turn.failed(error)
                    await self._wait_again(run)
                    pause_s = min(max(error.retry_after_s, 0.0), LONGEST_PAUSE_S)
                    await asyncio.sleep(pause_s)
                except EngineError as error:
                    return turn.failed(error)
                except Exception as error:
                    log.exception("%s failed unexpectedly", turn.id)
                    return turn.failed(error)

    async def _wait_again(self, run: _Run) -> None:
        """Note that the attempt does not count."""
        run.attempts -= 1
        with suppress(EngineError):
            await self._note(run, QUEUED)

    async def _note(self, run: _Run, status: str) -> bool:
        return await self._keeper.write(
            ResponseStore.begin_run, run.turn.id, run.turn.bare(status), run.attempts
        )

    async def _end(self, run: _Run, document: dict[str, Any]) -> None:
        events = None
        if run.streams:
            last = {
                "type": f"response.{document['status']}",
                "response": run.turn.shown(document),
                "sequence_number": len(run.events),
            }
            text = event_frame(last).data
            events = [*run.events, text]
        await self._keep(run.turn, document, events)
        if events is not None:
            run.events.append(events[-1])

    async def _keep(self, turn: Turn, document: dict[str, Any], events: list[str] | None) -> None:
        outputs = outputs_of(document)
        members = [*turn.inputs, *outputs] if is_spoken(document) else []
        await self._keeper.write(
            ResponseStore.end_run, turn.id, turn.kept(document).document, outputs, events, members
        )


async def _following(run: _Run, begin: int) -> AsyncGenerator[str, None]:
    """The events of a job from a number on, and comments while there is none."""
    while True:
        changed = run.changed
        if begin < len(run.events):
            yield "".join(run.events[begin:])
            begin = len(run.events)
            continue
        if run.over:
            return
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await changed.wait()
        except TimeoutError:
            yield ": still here\n\n"


def _job_of(turn: Turn, request: TextRequest) -> dict[str, Any]:
    """What another process needs to go on with the job, as JSON."""
    scheduling = {**asdict(request.scheduling), "priority": int(request.scheduling.priority)}
    scheduling["caller"] = [request.scheduling.caller.name, request.scheduling.caller.tier]
    return {
        "model": request.model,
        "body": turn.body,
        "history": turn.history,
        "inputs": turn.inputs,
        "echo": turn.echo,
        "searches": asdict(turn.searches),
        "hosted": turn.hosted,
        "store": turn.fields.store,
        "scheduling": scheduling,
    }


def _turn_of(kept: Kept, job: dict[str, Any]) -> tuple[Turn, TextRequest]:
    fields = KeepingFields(
        store=job["store"],
        background=True,
        previous=kept.previous,
        conversation=kept.conversation,
        metadata=job["echo"]["metadata"],
    )
    turn = Turn(
        id=kept.id,
        owner=kept.owner,
        created_at=kept.created_at,
        fields=fields,
        keeps=True,
        thread=kept.thread,
        seen=kept.seen,
        inputs=job["inputs"],
        history=job["history"],
        body=job["body"],
        echo=job["echo"],
        # A job of an earlier version has neither.
        searches=Searches(**job.get("searches", {})),
        hosted=job.get("hosted"),
    )
    given = dict(job["scheduling"])
    scheduling = SchedulingOptions(
        **{**given, "priority": Priority(given["priority"]), "caller": Caller(*given["caller"])}
    )
    request = TextRequest(
        job["model"], TextOperation.RESPONSES, turn.body, kept.id, scheduling, history=turn.history
    )
    return turn, request
