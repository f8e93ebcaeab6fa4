"""Which model serves a request, and which is tried next if it cannot."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

from engine.admission import Admission
from engine.config import EngineConfig, ModelConfig
from engine.costs.accounts import Accounts
from engine.errors import (
    BudgetExceeded,
    EngineError,
    InsufficientCapacity,
    LoadFailed,
    NoSpaceLeft,
    NotLoaded,
    OutOfDeviceMemory,
    Overloaded,
    ProviderBusy,
    ProviderFailed,
    QueueFull,
    QueueTimeout,
    RuntimeFailed,
    ShuttingDown,
)
from engine.events import Document
from engine.requests import Request, TextOperation, TextRequest
from engine.routing.choice import Choice
from engine.routing.examples import Examples, Vector
from engine.routing.prompt_text import prompt_text
from engine.routing.router import Router, request_to, with_adapter
from engine.scheduling.deadline import Deadline
from engine.scheduling.report import SchedulerReport
from engine.scheduling.waiting import Waiting
from engine.session import Attempt, Retry, Session

log = logging.getLogger(__name__)

PASSED_ON = (
    InsufficientCapacity,
    LoadFailed,
    NoSpaceLeft,
    NotLoaded,
    OutOfDeviceMemory,
    Overloaded,
    RuntimeFailed,
)
"""Errors after which another model may serve the request: none of them is the client's."""

EMBED_TIMEOUT_S = 10.0
"""How long a choice waits for the model that compares it with examples."""

LONGEST_PAUSE_S = 30.0
"""How long a request waits for a provider that is busy, where nobody else can serve it."""


OpenAt: TypeAlias = Callable[[ModelConfig, Request, Deadline, Waiting], Awaitable[Session]]
"""Opens a request at one model."""


class Dispatch:
    """Opens requests at the model they name, at its fallbacks, or at the models of a route."""

    def __init__(
        self,
        config: EngineConfig,
        router: Router,
        admission: Admission,
        accounts: Accounts,
        report: SchedulerReport,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._router = router
        self._admission = admission
        self._accounts = accounts
        self._report = report
        self._clock = clock
        self._chains: dict[str, tuple[ModelConfig, ...]] = {}
        self._examples: dict[str, Examples] = {}

    def check_name(self, name: str) -> None:
        """Return if a model or a route has that name.

        Raises:
            ModelNotFound: there is none.

        """
        if name not in self._router:
            self._config.find(name)

    async def choose(self, request: Request, deadline: Deadline) -> Choice:
        """What the route would choose; for a model, itself and its fallbacks in their order.

        Raises:
            InvalidRequest: the caller's key may not use the route.

        """
        if request.model not in self._router:
            request = with_adapter(self._config, request)
            chain = self._chain(self._config.find(request.model))
            await self._know_sizes(chain, deadline)
            return self._router.look(request, chain)
        await self._know_sizes(self._router.models(request.model), deadline)
        return self._router.choose(request, await self._likeness(request))

    def open(
        self, request: Request, deadline: Deadline, waiting: Waiting
    ) -> Coroutine[Any, Any, Session]:
        """Open the request at the first model that can serve it.

        Raises:
            ModelNotFound: no model and no route has that name.
            InvalidRequest: no model of the route can do it.
            EngineError: none can serve it; the error is that of the last, and names those tried
                before.

        """
        # Not a coroutine itself: most requests have one model, and each layer costs at each wait.
        if request.model in self._router:
            return self._open_route(request, deadline, waiting)
        request = with_adapter(self._config, request)
        chain = self._chain(self._config.find(request.model))
        return self._open_first(chain, request, deadline, waiting)

    async def _open_route(self, request: Request, deadline: Deadline, waiting: Waiting) -> Session:
        chosen = await self.choose(request, deadline)
        if not chosen.models:
            raise chosen.refusal()
        models = [self._config.find(name) for name in chosen.models]
        behind = [model for each in models for model in self._chain(each)]
        every = tuple({model.id: model for model in (*models, *behind)}.values())
        return await self._open_first(every, request, deadline, waiting)

    def _open_first(
        self,
        models: Sequence[ModelConfig],
        request: Request,
        deadline: Deadline,
        waiting: Waiting,
    ) -> Coroutine[Any, Any, Session]:
        if len(models) == 1:
            return self.open_at(models[0], request, deadline, waiting)
        return _Opening(
            self.open_at, self._report, self._clock, request, models, deadline, waiting
        ).open()

    async def open_at(
        self, model: ModelConfig, request: Request, deadline: Deadline, waiting: Waiting
    ) -> Session:
        """Open the request at this model, if the budgets admit it.

        Raises:
            EngineError: see `Accounts.reserve` and `Admission.open`.

        """
        own = request_to(model, request)
        reservation = self._accounts.reserve(model, own)
        waiting.model, waiting.ticket, waiting.usage = model.id, None, None
        try:
            session = await self._admission.open(model, own, deadline, waiting)
        except BaseException:
            usage = waiting.usage
            reservation.settle(usage, usage.device_s if usage else 0.0, served=False)
            raise
        session.reservation = reservation
        if isinstance(session.first, Document):
            session.settle()  # the run has ended, and the headers of the answer have its cost
        return session

    async def _likeness(self, request: Request) -> float | None:
        """How like the hard examples of its route the request is; None: nobody knows."""
        route = self._router.find(request.model)
        config = route.complexity.examples
        if config is None or not (text := prompt_text(request)):
            return None
        examples = self._examples.setdefault(route.id, Examples(config, self._embed))
        try:
            return await examples.likeness(text)
        except EngineError as error:
            log.warning("the examples of %s say nothing: %s", route.id, error)
            return None

    async def _embed(self, name: str, texts: Sequence[str]) -> list[Vector]:
        model = self._config.find(name)
        body = {"model": model.id, "input": list(texts)}
        request = TextRequest(model.id, TextOperation.EMBEDDINGS, body, f"route-{model.id}")
        deadline = Deadline(self._clock, EMBED_TIMEOUT_S)
        session = await self._admission.open(model, request, deadline, Waiting())
        try:
            first = session.first
        finally:
            await session.close()
        if not isinstance(first, Document):
            raise RuntimeFailed(f"{model.id!r} gave no embeddings.")
        return [each["embedding"] for each in json.loads(first.body)["data"]]

    def _chain(self, model: ModelConfig) -> tuple[ModelConfig, ...]:
        """The model, its fallbacks, theirs, and so on; each once."""
        if model.id not in self._chains:
            found: dict[str, ModelConfig] = {}
            self._follow(model, found)
            self._chains[model.id] = tuple(found.values())
        return self._chains[model.id]

    def _follow(self, model: ModelConfig, found: dict[str, ModelConfig]) -> None:
        if model.id not in found:
            found[model.id] = model
            for name in model.fallbacks:
                self._follow(self._config.find(name), found)

    async def _know_sizes(self, models: Iterable[ModelConfig], deadline: Deadline) -> None:
        """Read the sizes of the models that are on this disk: forecasts need them."""
        for model in models:
            await self._admission.learn_size(model, deadline)


class _Opening:
    """One request on its way through several models."""

    def __init__(
        self,
        open_at: OpenAt,
        report: SchedulerReport,
        clock: Callable[[], float],
        request: Request,
        models: Sequence[ModelConfig],
        deadline: Deadline,
        waiting: Waiting,
    ) -> None:
        self._open_at_model = open_at
        self._report = report
        self._clock = clock
        self._request = request
        self._left = deque(models)
        self._second_round = False
        self._deadline = deadline
        self._waiting = waiting
        self._attempts: list[Attempt] = []
        self._later: list[tuple[float, ModelConfig]] = []
        """Models that may serve the request after so many seconds; infinity: with more patience."""
        self._pause_s = 0.0
        """Before the next model is tried."""

    async def open(self) -> Session:
        """Open the request at the first of the models left.

        Raises:
            EngineError: none of them can serve it.

        """
        while True:
            if self._pause_s:
                await asyncio.sleep(min(self._pause_s, self._deadline.left_s))
                self._pause_s = 0.0
            model = self._left.popleft()
            try:
                return await self._open_at(model)
            except PASSED_ON as error:
                self._pass_on(model, error)

    def _pass_on(self, model: ModelConfig, error: EngineError) -> None:
        """Return if another model may serve the request after this error; raise it otherwise."""
        final = isinstance(error, BudgetExceeded) and not error.free
        if final or isinstance(error, ShuttingDown) or not isinstance(error, PASSED_ON):
            raise error
        log.info("%s: %s cannot serve it: %s", self._request.request_id, model.id, error)
        self._attempts.append(Attempt(model.id, error.code))
        later_s = _later_s(error)
        if later_s is not None and not self._second_round:
            self._later.append((later_s, model))
        if not self._left and self._later and self._deadline.left_s > 0:
            self._begin_second_round()
        if not self._left:
            raise self._refusal(error)

    def _begin_second_round(self) -> None:
        """Try those again that may serve it later, each once: nobody else can.

        The last of them is a model that only was busy. The request waits for it to its deadline.
        """
        self._second_round = True
        self._later.sort(key=lambda each: each[0])
        providers = [model for seconds, model in self._later if seconds < math.inf]
        busy = [model for seconds, model in self._later if seconds == math.inf]
        self._pause_s = self._later[0][0] if providers else 0.0
        self._left.extend((*providers, *busy[:1]))
        self._later.clear()

    def _refusal(self, error: EngineError) -> EngineError:
        before = self._attempts[:-1]
        if not before:
            return error
        tried = ", ".join(f"{attempt.model} ({attempt.code})" for attempt in before)
        return error.reworded(f"{error.message} Tried before: {tried}.")

    async def _open_at(self, model: ModelConfig) -> Session:
        deadline = self._deadline
        patience_s = self._patience_s(model)
        if patience_s < deadline.left_s:
            self._check_queue(model, patience_s)
            deadline = Deadline(self._clock, patience_s)
        session = await self._open_at_model(model, self._request, deadline, self._waiting)
        self._adopt(session)
        return session

    def _patience_s(self, model: ModelConfig) -> float:
        """Seconds that the request waits for the model while others are left."""
        if not self._left:
            return math.inf
        own = self._request.scheduling.max_wait_s
        patience_s = model.max_wait if own is None else own
        return math.inf if patience_s is None else patience_s

    def _check_queue(self, model: ModelConfig, patience_s: float) -> None:
        eta_s = self._report.forecast(model.id, priority=self._request.scheduling.priority).eta_s
        if eta_s is not None and eta_s > patience_s:
            raise QueueTimeout(
                f"The model {model.id!r} would take {eta_s:.1f} s to begin.", retry_after_s=eta_s
            )

    def _adopt(self, session: Session) -> None:
        """Note what was tried, and have the session go on elsewhere if it gives nothing."""
        session.attempts = tuple(self._attempts)
        session.again = partial(self._go_on, session.model, session.again)

    async def _go_on(self, model: ModelConfig, alone: Retry | None, error: EngineError) -> Session:
        """A session for a request whose run failed before it gave anything."""
        if alone is not None:
            try:
                session = await alone(error)
            except EngineError as second:
                error = second
            else:
                self._adopt(session)
                return session
        self._deadline.go_on()
        self._pass_on(model, error)
        return await self.open()


def _later_s(error: EngineError) -> float | None:
    """After how many seconds the same model may serve the request; None: not soon."""
    if isinstance(error, QueueFull | QueueTimeout):
        return math.inf
    if isinstance(error, ProviderBusy):
        return error.retry_after_s if error.retry_after_s <= LONGEST_PAUSE_S else None
    return 0.0 if isinstance(error, ProviderFailed) else None
