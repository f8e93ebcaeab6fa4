"""The scheduler: it owns the queue and the state of every model.

The scheduler lives on the event loop. Each `on_*` method is called there. It changes the
state, asks the planner, and carries the plan out before it returns. It never waits and
takes no lock. Slow work (reading headers, loading, unloading) goes out through `Effects`,
which returns at once. The outcome comes back as another event.

All events change the same state, so their handlers stand in one module. What only reads
that state is in `report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from engine.config import EngineConfig
from engine.errors import (
    Conflict,
    EngineError,
    InsufficientCapacity,
    LoadFailed,
    Overloaded,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from engine.memory.block import Block, Estimate
from engine.process.faults import FAULTS
from engine.requests import Priority
from engine.scheduling.effects import Effects
from engine.scheduling.eta import retry_after_s
from engine.scheduling.lease import Lease, LeaseTimings
from engine.scheduling.ledger import EntryKind, Ledger, LedgerOverflow
from engine.scheduling.order import Order, OrderKind
from engine.scheduling.plan import Park, Plan, Refusal, RefusalCode, Transition, Unload
from engine.scheduling.planner import plan
from engine.scheduling.report import SchedulerReport
from engine.scheduling.scheduled_model import ScheduledModel
from engine.scheduling.scheduler_event import EventKind, SchedulerEvent
from engine.scheduling.snapshot import Snapshot
from engine.scheduling.ticket import Ticket
from engine.scheduling.ticket_queue import TicketQueue
from engine.status import MOVING, ModelState
from engine.units import format_size

MEAN_WEIGHT = 0.3
"""Weight of the newest sample in the running means of load and service seconds."""
FIRST_BACKOFF_S = 1.0
LAST_BACKOFF_S = 60.0
RESTART_S = 5.0
"""The `Retry-After` of tickets that a bug of ours refuses: the process is replaced."""
SESSION_RETRY_S = 30.0
"""The `Retry-After` of a session that others leave no room for. Nobody knows when they end."""
RESERVATION = "reservation"


class Scheduler:
    """Queues requests and moves models, so that the engine's promises hold."""

    def __init__(
        self,
        config: EngineConfig,
        ledger: Ledger,
        effects: Effects,
        clock: Callable[[], float],
        *,
        on_event: Callable[[SchedulerEvent], None] | None = None,
        on_empty: Callable[[], None] = lambda: None,
        created: int = 0,
    ) -> None:
        """Start with every model absent.

        `clock` gives monotonic seconds. `created` is in Unix seconds and only reported.
        `on_empty` is called after `on_drain`, whenever nothing waits, runs, moves or is resident.
        `on_event` and `on_empty` must not raise.
        """
        self._config = config
        self._ledger = ledger
        self._effects = effects
        self._clock = clock
        self._on_event = on_event
        self._on_empty = on_empty
        self._models = {
            model.id: ScheduledModel(
                config=model,
                keep_alive_s=config.keep_alive if model.keep_alive is None else model.keep_alive,
                pinned=model.pin,
            )
            for model in config.models
        }
        self._queue = TicketQueue()
        self.report = SchedulerReport(
            self._models,
            self._queue,
            self._snapshot,
            clock,
            max_overtake_s=config.max_overtake_s,
            created=created,
        )
        self._leases: dict[Lease, int] = {}
        """The leases that are held, with the working bytes of each."""
        self._exclusive_running = False
        self._transition: str | None = None
        self._draining: frozenset[str] = frozenset()
        self._shutting_down = False
        self._prefetched: str | None = None
        """The model whose files were read ahead last; None after the next load."""
        self._asked_at: float | None = None
        self._replanning = False
        self._stale = False

    # Events from the engine.

    def on_request(self, ticket: Ticket, *, ignore_backoff: bool = False) -> None:
        """Queue a ticket; it may be granted before this returns.

        With `ignore_backoff` a model that lately failed to load is tried at once.

        Raises:
            ShuttingDown: `on_drain` was called.
            LoadFailed: the model failed to load, and its backoff is not over.
            Overloaded: the engine's queue is at its bound.
            QueueFull: the model's queue is at its bound.
            ValueError: the ticket waits already, or its working memory is negative.

        """
        if self._queue.serial(ticket) is not None or ticket.working_bytes < 0:
            raise ValueError(f"ticket {ticket.request_id!r} cannot be queued")
        model = self._models[ticket.model_id]
        now = self._clock()
        if self._shutting_down:
            raise self._shutting_down_error(model)
        for name in ticket.models:
            self._check_model(self._models[name], now, ignore_backoff=ignore_backoff)
        if len(self._queue) + len(self._leases) >= self._config.max_queue:
            raise Overloaded(
                f"The engine serves or queues {self._config.max_queue} requests, its bound.",
                retry_after_s=retry_after_s(model),
            )
        at_once = self._can_grant_at_once(ticket, model)
        serial = self._queue.add(ticket, now, model.tier)
        for name in ticket.models:
            self._models[name].waiting += 1
            # What a batch asked for says nothing of what comes next: its model may leave first.
            if ticket.priority is not Priority.BATCH:
                self._models[name].demand.count(now)
        if at_once:
            with self._reporting():
                self._grant(serial)
            return
        for name in ticket.models:
            model = self._models[name]
            if model.needed_bytes is None and not model.estimating:
                model.estimating = True
                self._effects.estimate(name)
        self._replan()

    def _check_model(self, model: ScheduledModel, now: float, *, ignore_backoff: bool) -> None:
        """Return if one more ticket may wait for a model."""
        if now < model.blocked_until and not ignore_backoff:
            wait_s = math.ceil(model.blocked_until - now)
            raise LoadFailed(f"{model.last_error} (tried again after {wait_s} s)")
        if model.waiting >= self._config.max_queue_per_model:
            raise QueueFull(
                f"{model.waiting} requests wait for {model.config.id!r}, its bound.",
                retry_after_s=retry_after_s(model),
            )

    def on_cancel(self, ticket: Ticket) -> None:
        """Forget a waiting ticket. A ticket that was granted or refused is left alone."""
        serial = self._queue.serial(ticket)
        if serial is not None:
            self._remove(serial)
            self._replan()

    def on_release(self, lease: Lease) -> None:
        """Take a lease back. A second call for the same lease does nothing."""
        working_bytes = self._leases.pop(lease, None)
        if working_bytes is None:
            return
        now = self._clock()
        if lease.hold:
            self._end_hold(lease, now)
            return
        model = self._models[lease.model_id]
        if working_bytes:
            self._ledger.release(lease.model_id, lease.name)
        model.leases -= 1
        model.leased_working_bytes -= working_bytes
        model.service_s = _mean(model.service_s, now - lease.granted_at)
        if model.leases == 0:
            model.idle_since = now
        if lease.exclusive:
            self._exclusive_running = False
        elif self._is_settled and self._may_stay(model):
            self._ask_for_its_expiry(model, now)
            return
        self._replan()

    def _end_hold(self, lease: Lease, now: float) -> None:
        for name in lease.models:
            model = self._models[name]
            model.holds -= 1
            if model.holds == 0 and model.leases == 0 and model.state is not ModelState.ABSENT:
                model.idle_since = now
        self._replan()

    def on_order(self, order: Order) -> None:
        """Take an idle model off the device. The order may be done before this returns.

        An order waits for the transition under way, and behind tickets that came before it is
        carried out. It is refused if the model is pinned meanwhile, or at its deadline.

        Raises:
            Conflict: the model is in use, waited for, pinned, being moved, or cannot be parked.

        """
        model = self._models[order.model_id]
        leaving = model.state is ModelState.UNLOADING
        if order.kind is OrderKind.PARK:
            leaving = leaving or model.state is ModelState.PARKING
        if not leaving and not model.obeys(order):
            model.check_idle()
            if order.kind is OrderKind.PARK and not all(each.parkable for each in model.blocks):
                raise Conflict(f"The model {order.model_id!r} cannot be parked.", param="model")
        model.orders[order] = self._clock() + order.timeout_s
        self._replan()

    def on_order_cancelled(self, order: Order) -> None:
        """Forget an order. One that was done or refused is left alone."""
        if self._models[order.model_id].orders.pop(order, None) is not None:
            self._replan()

    def pin(self, model_id: str) -> None:
        """Never evict the model from now on. Does not load it. Orders that wait are refused."""
        model = self._models[model_id]
        model.pinned = True
        if model.state is not ModelState.UNLOADING:
            for order in tuple(model.orders):
                error = Conflict(f"The model {model_id!r} is pinned.", param="model")
                self._refuse_order(order, error)
        self._replan()

    def unpin(self, model_id: str) -> None:
        """Allow evictions of the model while it is idle."""
        self._models[model_id].pinned = False
        self._replan()

    def users_of(self, model_id: str, adapter: str) -> int:
        """The requests that wait or run with a LoRA of a model."""
        holders: list[Lease | Ticket] = [*self._leases, *self._queue.tickets()]
        return sum(each.model_id == model_id and adapter in each.adapters for each in holders)

    def on_drain(self) -> None:
        """Refuse waiting and new tickets; each model leaves when its last lease ends."""
        self._shutting_down = True
        for model in self._models.values():
            if model.state not in (ModelState.ABSENT, ModelState.UNLOADING):
                model.unload_reason = model.unload_reason or "shutting down"
        for model in self._models.values():
            self._refuse_waiting(model, self._shutting_down_error)
        self._replan()

    # Events from the effects.

    def on_estimate(self, model_id: str, estimate: Estimate) -> None:
        """Take the estimate of a model; measurements made since are kept."""
        model = self._models[model_id]
        model.estimating = False
        if model.needed_bytes is None:
            model.needed_bytes = estimate.nbytes
        if model.reload_s is None:
            model.reload_s = estimate.load_seconds
        model.expected_host_bytes = estimate.host_bytes
        self._replan()

    def on_estimate_failed(self, model_id: str, reason: str) -> None:
        """Fail the tickets that wait for the model: its files cannot be read."""
        model = self._models[model_id]
        model.estimating = False
        if model.needed_bytes is None:
            self._fail_waiting(model, reason)
        self._replan()

    def on_files_changed(self, model_id: str) -> None:
        """Measure afresh what the model takes: newer files are here.

        A model that is there, or on its way, keeps what it has until it leaves.
        """
        model = self._models[model_id]
        model.outdated = model.state is not ModelState.ABSENT
        if not model.outdated:
            model.forget_measurements()
        self._replan()

    def on_loaded(
        self,
        model_id: str,
        blocks: Iterable[Block],
        load_seconds: float,
        max_concurrency: int,
        host_bytes: int = 0,
    ) -> None:
        """Take a finished load with its measured blocks, and keep the measurements.

        If the blocks need more than was reserved and is free, the model leaves again, and its
        tickets go on waiting. If that happens twice in a row, the load counts as failed.
        """
        model = self._expect(model_id, ModelState.LOADING)
        blocks = tuple(blocks)
        measured_bytes = sum(block.nbytes for block in blocks)
        reserved_bytes = model.granted_bytes
        model.needed_bytes = measured_bytes
        model.reload_s = _mean(model.reload_s if model.load_measured else None, load_seconds)
        model.load_measured = True
        try:
            self._ledger.convert(
                model_id, RESERVATION, [(block.name, block.nbytes) for block in blocks]
            )
        except LedgerOverflow:
            reason = (
                f"took {format_size(measured_bytes)} where {format_size(reserved_bytes)} "
                "were reserved"
            )
            twice = model.overflowed
            model.overflowed = True
            if twice:
                self._fail_waiting(model, f"The model {reason}, twice.")
            self._begin_unload(model, reason)
            self._replan()
            return
        model.blocks = blocks
        model.host_bytes = host_bytes
        model.max_concurrency = max_concurrency
        model.grants_since_load = 0
        model.overflowed = False
        model.failures = 0
        model.blocked_until = -math.inf
        model.last_error = None
        self._transition = None
        self._become_resident(model)
        self._emit(EventKind.LOADED, model, f"{format_size(measured_bytes)}, {load_seconds:.1f} s")
        self._replan()

    def _become_resident(self, model: ScheduledModel) -> None:
        model.state = ModelState.RESIDENT
        model.parked = frozenset()
        model.count_granted()
        model.resident_since = model.idle_since = self._clock()
        if model.failed_while_loading is not None:
            self._fail_resident(model, model.failed_while_loading)

    def on_load_failed(self, model_id: str, error: EngineError) -> None:
        """Release the reservation of a failed load, and fail exactly the tickets for it."""
        model = self._expect(model_id, ModelState.LOADING)
        self._leave(model)
        self._fail_waiting(model, error.message)
        self._replan()

    def on_parked(self, model_id: str) -> None:
        """Release the bytes of the parked blocks, and measure what that freed."""
        model = self._expect(model_id, ModelState.PARKING)
        for name in model.leaving:
            self._ledger.release(model_id, name)
        model.parked |= model.leaving
        model.leaving = frozenset()
        model.state = ModelState.PARKED
        model.count_granted()
        self._transition = None
        self._measure()
        self._emit(EventKind.PARKED, model, "")
        self._replan()

    def on_woken(self, model_id: str, wake_seconds: float) -> None:
        """Take a model of which all blocks are on the device again."""
        model = self._expect(model_id, ModelState.WAKING)
        woken = [block for block in model.blocks if block.name in model.parked]
        self._ledger.convert(model_id, RESERVATION, [(block.name, block.nbytes) for block in woken])
        copied_bytes = sum(block.nbytes for block in woken if not block.scratch)
        if copied_bytes:
            model.wake_s_per_byte = _mean(model.wake_s_per_byte, wake_seconds / copied_bytes)
        self._transition = None
        self._become_resident(model)
        self._emit(EventKind.WOKEN, model, f"{wake_seconds * 1e3:.0f} ms")
        self._replan()

    def on_wake_failed(self, model_id: str, error: EngineError) -> None:
        """Unload a model that could not be woken; its tickets get a fresh load."""
        model = self._expect(model_id, ModelState.WAKING)
        self._ledger.release(model_id, RESERVATION)
        model.state = ModelState.PARKED
        model.count_granted()
        model.unload_reason = f"could not be woken: {error.message}"
        model.last_error = error.message
        self._transition = None
        self._emit(EventKind.WAKE_FAILED, model, error.message)
        self._replan()

    def on_unloaded(self, model_id: str) -> None:
        """Release the bytes of an unloaded model, and measure what that freed."""
        model = self._expect(model_id, ModelState.UNLOADING)
        self._leave(model)
        self._measure()
        self._emit(EventKind.UNLOADED, model, "")
        self._replan()

    def on_model_failed(self, model_id: str, reason: str) -> None:
        """Grant no more leases on a model that died; it leaves after its last lease.

        Its waiting tickets get a fresh load, unless it died before it served any request. That
        counts as a failed load: otherwise the model would be loaded again and again.
        """
        model = self._models[model_id]
        if model.state in (ModelState.LOADING, ModelState.WAKING):
            # The runtime may report this before the loop has seen the end of the load.
            model.failed_while_loading = reason
        elif model.state in (ModelState.RESIDENT, ModelState.PARKING, ModelState.PARKED):
            self._fail_resident(model, reason)
            self._replan()

    def on_transition_lost(self, model_id: str, reason: str) -> None:
        """Clear the state of a model of which a transition, or its estimate, ended by a bug.

        Its bytes count as free from here on; what is really free is measured. Its tickets are
        refused until the process has been replaced.
        """
        model = self._models[model_id]
        if model.state in MOVING:
            self._leave(model)
            self._measure()
        elif not model.estimating:
            return
        model.estimating = False
        model.last_error = reason
        self._emit(EventKind.MODEL_FAILED, model, reason)
        self._refuse_waiting(
            model,
            lambda _: Overloaded("The server met a bug and restarts.", retry_after_s=RESTART_S),
        )
        self._replan()

    def on_timer(self) -> None:
        """Plan again. May be called at any time, for instance to notice other programs."""
        self._asked_at = None
        if self._transition is None:
            self._measure()
        self._replan()

    # State that the engine reads; the rest is in `report`.

    @property
    def transition(self) -> str | None:
        """The load or unload under way, in words."""
        return self._transition

    @property
    def empty(self) -> bool:
        """Nothing waits, runs, moves or is resident."""
        return not (self._queue or self._leases) and all(
            model.state is ModelState.ABSENT for model in self._models.values()
        )

    # The short way: where nobody else waits and nothing moves, a plan could only grant the ticket,
    # or find when the model expires. A plan looks at every model; this does not.

    @property
    def _is_settled(self) -> bool:
        """Nobody waits, nothing moves, and no plan is being carried out."""
        return not (
            self._replanning
            or self._queue
            or self._transition is not None
            or self._exclusive_running
            or self._shutting_down
        )

    def _can_grant_at_once(self, ticket: Ticket, model: ScheduledModel) -> bool:
        """Whether a plan could only grant a ticket that has just come."""
        return (
            self._is_settled
            and model.state is ModelState.RESIDENT
            and model.unload_reason is None
            and not model.orders
            and model.leases < model.max_concurrency
            and not ticket.exclusive
            and not ticket.hold
            and ticket.timeout_s > 0
            # What is free now is within the budget and the capacity, whatever is pinned.
            and ticket.working_bytes <= self._ledger.free_bytes
        )

    def _may_stay(self, model: ScheduledModel) -> bool:
        """Whether a plan would let the model stay that has just lost a lease, and all others."""
        return (
            model.state is ModelState.RESIDENT
            and model.unload_reason is None
            and not model.orders
            and (model.leases > 0 or model.keep_alive_s > 0)
            and self._ledger.free_bytes >= 0
        )

    def _ask_for_its_expiry(self, model: ScheduledModel, now: float) -> None:
        """Ask for the timer when the model expires, unless it comes before: it then asks again."""
        if model.leases or model.pinned or model.holds:
            return
        expires_at = now + model.keep_alive_s
        if expires_at < (math.inf if self._asked_at is None else self._asked_at):
            self._asked_at = expires_at
            self._effects.call_at(expires_at)

    # Plans, carried out.

    def _replan(self) -> None:
        """Carry out plans until one changes nothing."""
        if self._replanning:
            # A callback sent another event while the loop below still runs. The rest of its
            # plan is older than this event and must not be acted on.
            self._stale = True
            return
        self._replanning = True
        try:
            with self._reporting():
                wake_at = self._carry_out_plans()
        finally:
            self._replanning = False
        if wake_at is not None and wake_at != self._asked_at:
            self._asked_at = wake_at
            self._effects.call_at(wake_at)
        if self._shutting_down and self.empty:
            self._on_empty()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Report an error: it has left a change half made, and nothing after it can be trusted."""
        try:
            yield
        except Exception as error:
            FAULTS.report("the scheduler", error)
            raise

    def _carry_out_plans(self) -> float | None:
        """Plan and act until a plan changes nothing; returns its `wake_at`."""
        measured = False
        while True:
            self._stale = False
            order_at = self._answer_orders()
            decision = plan(self._snapshot())
            self._draining = decision.draining
            if decision.next_model is not None and decision.next_model != self._prefetched:
                self._prefetched = decision.next_model
                self._effects.prefetch(decision.next_model)
            if decision.grants or decision.refusals:
                self._answer(decision)
            elif decision.transition is None:
                times = [at for at in (decision.wake_at, order_at) if at is not None]
                return min(times, default=None)
            elif not measured:
                # Other programs may have taken or freed memory since. Measure, then plan again.
                self._measure()
                measured = True
            else:
                self._begin(decision.transition)
                measured = False

    def _answer_orders(self) -> float | None:
        """Answer the orders that are carried out or late; returns the next deadline."""
        now = self._clock()
        deadlines = []
        for model in self._models.values():
            for order, deadline in tuple(model.orders.items()):
                if model.obeys(order):
                    del model.orders[order]
                    order.on_done()
                elif deadline <= now:
                    message = f"The model {order.model_id!r} could not be moved in time."
                    self._refuse_order(order, QueueTimeout(message, retry_after_s=1.0))
                elif deadline < math.inf:
                    deadlines.append(deadline)
        return min(deadlines, default=None)

    def _refuse_order(self, order: Order, error: EngineError) -> None:
        del self._models[order.model_id].orders[order]
        order.on_refused(error)

    def _answer(self, decision: Plan) -> None:
        for refusal in decision.refusals:
            if self._stale:
                return
            self._refuse(refusal.ticket_id, self._refusal_error(refusal))
        for serial in decision.grants:
            if self._stale:
                return
            self._grant(serial)

    def _begin(self, transition: Transition) -> None:
        model = self._models[transition.model]
        if isinstance(transition, Unload):
            self._begin_unload(model, transition.reason)
        elif isinstance(transition, Park):
            self._begin_park(model, transition)
        else:
            self._begin_load(model)

    def _begin_load(self, model: ScheduledModel) -> None:
        waking = model.state is ModelState.PARKED
        missing_bytes = sum(block.nbytes for block in model.blocks if block.name in model.parked)
        wanted_bytes = missing_bytes if waking else model.needed_bytes or 0
        self._ledger.grant(model.config.id, EntryKind.RESERVATION, RESERVATION, wanted_bytes)
        model.granted_bytes += wanted_bytes
        model.load_began_at = self._clock()
        if waking:
            model.state = ModelState.WAKING
            self._transition = f"waking {model.config.id}"
            self._emit(EventKind.WAKE, model, format_size(wanted_bytes))
            self._effects.wake(model.config.id, model.parked)
        else:
            model.state = ModelState.LOADING
            self._prefetched = None
            self._transition = f"loading {model.config.id}"
            self._emit(EventKind.LOAD, model, format_size(wanted_bytes))
            self._effects.load(model.config.id)

    def _begin_park(self, model: ScheduledModel, park: Park) -> None:
        model.state = ModelState.PARKING
        model.leaving = park.blocks
        self._transition = f"parking {model.config.id}: {park.reason}"
        self._emit(EventKind.PARK, model, f"{', '.join(sorted(park.blocks))}: {park.reason}")
        self._effects.park(model.config.id, park.blocks, park.reason)

    def _begin_unload(self, model: ScheduledModel, reason: str) -> None:
        model.state = ModelState.UNLOADING
        model.idle_since = None
        self._transition = f"unloading {model.config.id}: {reason}"
        self._emit(EventKind.UNLOAD, model, reason)
        self._effects.unload(model.config.id, reason)

    def _leave(self, model: ScheduledModel) -> None:
        self._ledger.release_all(model.config.id)
        model.clear()
        self._transition = None

    def _fail_resident(self, model: ScheduledModel, reason: str) -> None:
        model.unload_reason = f"failed: {reason}"
        model.last_error = reason
        self._emit(EventKind.MODEL_FAILED, model, reason)
        if model.grants_since_load == 0:
            self._fail_waiting(model, reason)

    def _fail_waiting(self, model: ScheduledModel, reason: str) -> None:
        """Fail every ticket that waits for the model, and back off."""
        model.forget_measurements()  # somebody may repair the files before the next try
        model.last_error = reason
        backoff_s = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2**model.failures)
        model.failures += 1
        model.blocked_until = self._clock() + backoff_s
        self._emit(EventKind.LOAD_FAILED, model, reason)
        self._refuse_waiting(model, lambda _: LoadFailed(reason))

    def _refuse_waiting(
        self, model: ScheduledModel, error: Callable[[ScheduledModel], EngineError]
    ) -> None:
        # One error each: an exception raised in two tasks would mix their tracebacks.
        for view in self._queue.views():
            # The callback of an earlier ticket may have cancelled this one.
            if model.config.id in view.models and view.id in self._queue:
                self._refuse(view.id, error(model))

    def _grant(self, serial: int) -> None:
        now = self._clock()
        view, tier = self._queue.view(serial), self._queue.tier(serial)
        ticket = self._remove(serial)
        model = self._models[ticket.model_id]
        if ticket.keep_alive_s is not None:
            model.keep_alive_s = ticket.keep_alive_s
        name = f"{ticket.request_id}#{serial}"
        if ticket.working_bytes:
            self._ledger.grant(ticket.model_id, EntryKind.LEASE, name, ticket.working_bytes)
        if ticket.hold:
            for each in ticket.models:
                self._models[each].holds += 1
                self._models[each].idle_since = None
        else:
            model.leases += 1
            model.leased_working_bytes += ticket.working_bytes
            model.grants_since_load += 1
            model.idle_since = None
        loaded_at = model.resident_since or now
        load_s = max(0.0, loaded_at - max(view.enqueued_at, model.load_began_at))
        lease = Lease(
            ticket.model_id,
            name,
            exclusive=ticket.exclusive,
            granted_at=now,
            timings=LeaseTimings(queued_s=now - view.enqueued_at, load_s=load_s, tier=tier),
            release=self.on_release,
            adapters=ticket.adapters,
            hold=ticket.hold,
            further_models=ticket.further_models,
        )
        self._leases[lease] = ticket.working_bytes
        self._exclusive_running = self._exclusive_running or ticket.exclusive
        self._emit(EventKind.GRANT, model, "", ticket.request_id)
        ticket.on_granted(lease)

    def _refuse(self, serial: int, error: EngineError) -> None:
        ticket = self._remove(serial)
        model = self._models[ticket.model_id]
        self._emit(EventKind.REFUSE, model, error.message, ticket.request_id)
        ticket.on_refused(error)

    def _remove(self, serial: int) -> Ticket:
        ticket = self._queue.remove(serial)
        for name in ticket.models:
            self._models[name].waiting -= 1
        return ticket

    def _refusal_error(self, refusal: Refusal) -> EngineError:
        model = self._models[self._queue.view(refusal.ticket_id).model]
        message = f"The request for {model.config.id!r} was {refusal.reason}."
        if refusal.code is RefusalCode.DEADLINE:
            return QueueTimeout(message, retry_after_s=retry_after_s(model))
        if refusal.code is RefusalCode.HELD:
            message = f"Sessions keep the room for {model.config.id!r}: it {refusal.reason}."
            return Overloaded(message, retry_after_s=SESSION_RETRY_S)
        if refusal.code is RefusalCode.NOT_LOADED:
            return Conflict(f"The model {model.config.id!r} {refusal.reason}.", param="model")
        return InsufficientCapacity(f"The request for {model.config.id!r} {refusal.reason}.")

    def _shutting_down_error(self, model: ScheduledModel) -> ShuttingDown:
        return ShuttingDown("The engine is shutting down.", retry_after_s=retry_after_s(model))

    def _measure(self) -> None:
        self._ledger.observe(self._effects.measure_external())

    def _snapshot(self) -> Snapshot:
        now = self._clock()
        return Snapshot(
            now=now,
            budget_bytes=self._ledger.budget_bytes,
            capacity_bytes=self._ledger.capacity_bytes,
            free_bytes=self._ledger.free_bytes,
            max_overtake_s=self._config.max_overtake_s,
            models=tuple(model.view(now) for model in self._models.values()),
            tickets=self._queue.views(),
            busy=self._transition is not None,
            exclusive_running=self._exclusive_running,
            draining=self._draining,
            host_free_bytes=self._effects.host_free_bytes(),
        )

    def _expect(self, model_id: str, state: ModelState) -> ScheduledModel:
        model = self._models[model_id]
        if model.state is not state:
            raise RuntimeError(f"{model_id!r} is {model.state}, not {state}")
        return model

    def _emit(
        self, kind: EventKind, model: ScheduledModel, reason: str, request_id: str | None = None
    ) -> None:
        if self._on_event is not None:
            ledger = self._ledger
            self._on_event(
                SchedulerEvent(
                    kind,
                    model.config.id,
                    reason,
                    ledger.granted_bytes,
                    ledger.capacity_bytes,
                    request_id,
                )
            )


def _mean(mean: float | None, sample: float) -> float:
    """A running mean that weighs the newest sample `MEAN_WEIGHT`."""
    return sample if mean is None else mean + MEAN_WEIGHT * (sample - mean)
