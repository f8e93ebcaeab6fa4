"""The driver: it lets the real scheduler serve a trace on the modelled machine.

`simulate` drives the real `Scheduler`, and with it the real planner and `Ledger`, through hours of
requests in milliseconds, without torch. Only the machine is modelled. Other policies on the same
machine are in `baselines.py` and `clairvoyant.py`.
"""

from __future__ import annotations

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError, Overloaded
from engine.memory.block import Block, Estimate
from engine.scheduling.lease import Lease
from engine.scheduling.ledger import Ledger
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.ticket import Ticket
from engine.simulation.machine import Machine
from engine.simulation.outcome import Outcome
from engine.simulation.traces import Trace, TracedModel


def simulate(trace: Trace, policy: EngineConfig, *, serial_device: bool = False) -> Outcome:
    """Let the real scheduler serve a trace, with the limits of `policy`.

    Models that `policy` and the trace both name take `keep_alive` and `pin` from `policy`. Each
    request of the trace waits for as long as its own timeout says.

    Raises:
        RuntimeError: the scheduler broke a promise (see `Machine`).

    """
    machine = Machine(trace, serial_device=serial_device)
    driver = _Driver(trace, policy, machine)
    machine.play(driver.arrive)
    return machine.outcome()


def usual_config(trace: Trace) -> EngineConfig:
    """The default limits, for the models of a trace."""
    models = tuple(ModelConfig(id=name, source="trace") for name in trace.models)
    return EngineConfig(models=models)


def _config(trace: Trace, policy: EngineConfig) -> EngineConfig:
    """The limits of `policy`, for the models of a trace."""
    known = {model.id: model for model in policy.models}
    usual = usual_config(trace)
    models = tuple(known.get(model.id, model) for model in usual.models)
    return policy.model_copy(update={"models": models})


class _Driver:
    """The effects of the scheduler on a modelled machine, and the clients of the trace."""

    def __init__(self, trace: Trace, policy: EngineConfig, machine: Machine) -> None:
        self._trace = trace
        self._machine = machine
        self._alarm = 0
        self._scheduler = Scheduler(
            _config(trace, policy),
            Ledger(budget_bytes=trace.budget_bytes, total_bytes=trace.budget_bytes),
            self,
            lambda: machine.now_s,
        )

    # The effects.

    def estimate(self, model_id: str) -> None:
        model = self._trace.models[model_id]
        estimate = Estimate(_blocks(model, parkable=model.wake_s is not None), model.load_s)
        self._machine.at(
            self._machine.now_s, lambda: self._scheduler.on_estimate(model_id, estimate)
        )

    def prefetch(self, model_id: str) -> None:
        """Do nothing: a load takes the seconds of the trace."""

    def load(self, model_id: str) -> None:
        model = self._trace.models[model_id]

        def loaded(seconds: float) -> None:
            copy_bytes = self._machine.copied.get(model_id, 0)
            blocks = _blocks(model, parkable=model_id in self._machine.copied)
            self._scheduler.on_loaded(model_id, blocks, seconds, model.max_concurrency, copy_bytes)

        self._machine.load(model_id, loaded)

    def unload(self, model_id: str, reason: str) -> None:  # noqa: ARG002 - for a log
        self._machine.unload(model_id, lambda: self._scheduler.on_unloaded(model_id))

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:  # noqa: ARG002
        self._machine.park(model_id, blocks, lambda: self._scheduler.on_parked(model_id))

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:  # noqa: ARG002 - all of them
        self._machine.wake(model_id, lambda s: self._scheduler.on_woken(model_id, s))

    def measure_external(self) -> int:
        return 0

    def host_free_bytes(self) -> int:
        return self._machine.host_free_bytes

    def call_at(self, when: float) -> None:
        self._alarm += 1
        alarm = self._alarm

        def ring() -> None:
            if alarm == self._alarm:
                self._scheduler.on_timer()

        self._machine.at(when, ring)

    # The clients.

    def arrive(self, index: int) -> None:
        """Send a request, by its index in the trace."""
        request = self._trace.requests[index]

        def granted(lease: Lease) -> None:
            self._machine.start(index, lease.release)

        def refused(_: EngineError) -> None:
            self._machine.refuse(index)

        ticket = Ticket(
            request_id=str(index),
            model_id=request.model,
            operation="simulated",
            working_bytes=request.working_bytes,
            priority=request.priority,
            timeout_s=request.timeout_s,
            on_granted=granted,
            on_refused=refused,
        )
        try:
            self._scheduler.on_request(ticket)
        except Overloaded as error:
            refused(error)


def _blocks(model: TracedModel, *, parkable: bool) -> tuple[Block, ...]:
    return tuple(Block(name, nbytes, parkable) for name, nbytes in model.blocks.items())
