"""A configured model, with its state and its measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.config import ModelConfig
from engine.errors import Conflict
from engine.files.source import Source
from engine.memory.block import Block
from engine.scheduling.order import Order, OrderKind
from engine.scheduling.snapshot import ModelView, PartView
from engine.status import BlockStatus, ModelState, ModelStatus

DEMAND_MEMORY_S = 300.0
"""Time constant of the demand for a model: a request this long ago counts 1/e."""
FIRST_WAKE_S_PER_BYTE = 1 / 5e9
"""A copy at half of PCIe 4.0 × 16, used until a wake was measured."""

MOVING_WORDS = {
    ModelState.LOADING: "loaded",
    ModelState.WAKING: "woken",
    ModelState.PARKING: "parked",
}


@dataclass(slots=True)
class Demand:
    """Requests per second, exponentially decayed."""

    rate: float = 0.0
    at: float = 0.0

    def read(self, now: float) -> float:
        """Requests per second at a time of the scheduler's clock."""
        return self.rate * math.exp((self.at - now) / DEMAND_MEMORY_S)

    def count(self, now: float) -> None:
        """Note a request."""
        self.rate = self.read(now) + 1 / DEMAND_MEMORY_S
        self.at = now


@dataclass(slots=True)
class ScheduledModel:
    """Everything that the scheduler knows of one configured model."""

    config: ModelConfig
    keep_alive_s: float
    pinned: bool
    state: ModelState = ModelState.ABSENT
    blocks: tuple[Block, ...] = ()
    parked: frozenset[str] = frozenset()
    """Names of the blocks that are off the device."""
    leaving: frozenset[str] = frozenset()
    """Names of the blocks that are being parked."""
    granted_bytes: int = 0
    """For its blocks on the device, or its reservation."""
    host_bytes: int = 0
    """Of the host copy."""
    expected_host_bytes: int = 0
    """Of the host copy that a load makes where there is room for it."""
    estimating: bool = False
    needed_bytes: int | None = None
    """As estimated, then as measured; None until the files have been read."""
    reload_s: float | None = None
    load_measured: bool = False
    wake_s_per_byte: float | None = None
    """As measured with blocks that are copied; None before."""
    overflowed: bool = False
    """The last load took more than there was; the next one reserves that."""
    max_concurrency: int = 1
    leases: int = 0
    holds: int = 0
    """Sessions that keep it on the device."""
    leased_working_bytes: int = 0
    waiting: int = 0
    grants_since_load: int = 0
    load_began_at: float = 0.0
    resident_since: float | None = None
    idle_since: float | None = None
    unload_reason: str | None = None
    """Why it leaves, other than by an order."""
    orders: dict[Order, float] = field(default_factory=dict)
    """Orders to park or unload it, each with its deadline."""
    failed_while_loading: str | None = None
    outdated: bool = False
    """Newer files are here than those it was loaded from."""
    demand: Demand = field(default_factory=Demand)
    service_s: float | None = None
    failures: int = 0
    blocked_until: float = -math.inf
    last_error: str | None = None

    def wake_seconds(self, blocks: Iterable[Block]) -> float:
        """Seconds of bringing these blocks back."""
        rate = self.wake_s_per_byte
        copied_bytes = sum(block.nbytes for block in blocks if not block.scratch)
        return copied_bytes * (FIRST_WAKE_S_PER_BYTE if rate is None else rate)

    @property
    def tier(self) -> str:
        """The tier of the model: `device` only while all of it is there."""
        if self.state is ModelState.RESIDENT:
            return "device"
        return "host" if self.blocks else "disk"

    @property
    def move_s(self) -> float | None:
        """Seconds of bringing it in from its tier; None while unknown."""
        if self.tier == "host":
            return self.wake_seconds(block for block in self.blocks if block.name in self.parked)
        return 0.0 if self.tier == "device" else self.reload_s

    def count_granted(self) -> None:
        """Set `granted_bytes` to those of the blocks on the device."""
        self.granted_bytes = sum(b.nbytes for b in self.blocks if b.name not in self.parked)

    def check_idle(self) -> None:
        """Return if nothing forbids to move the model off the device.

        Raises:
            Conflict: it is being moved, in use, waited for, or pinned.

        """
        moving = MOVING_WORDS.get(self.state)
        for forbidden, why in (
            (moving is not None, f"is being {moving}"),
            (self.leases > 0, f"is in use by {self.leases} requests"),
            (self.holds > 0, f"is kept by {self.holds} sessions"),
            (self.waiting > 0, f"is waited for by {self.waiting} requests"),
            (self.pinned, "is pinned"),
        ):
            if forbidden:
                raise Conflict(f"The model {self.config.id!r} {why}.", param="model")

    def _ordered(self, kind: OrderKind) -> str | None:
        return "asked to" if any(order.kind is kind for order in self.orders) else None

    def obeys(self, order: Order) -> bool:
        """Whether the model is as the order wants it."""
        parked = order.kind is OrderKind.PARK and self.granted_bytes == 0
        return self.state is ModelState.ABSENT or (parked and self.state is ModelState.PARKED)

    def clear(self) -> None:
        """Forget everything of a residency that has ended."""
        self.state = ModelState.ABSENT
        self.blocks = ()
        self.parked = self.leaving = frozenset()
        self.granted_bytes = self.host_bytes = 0
        self.resident_since = self.idle_since = None
        self.unload_reason = self.failed_while_loading = None
        if self.outdated:
            self.outdated = False
            self.forget_measurements()

    def forget_measurements(self) -> None:
        """Forget what was read and measured of the files: they may be others the next time."""
        self.needed_bytes = self.reload_s = None
        self.load_measured = self.overflowed = False

    def status(self, now: float, created: int) -> ModelStatus:
        """What is reported of it; `created` is Unix seconds."""
        config = self.config
        return ModelStatus(
            id=config.id,
            aliases=config.aliases,
            runtime=config.runtime,
            task=config.task,
            source=config.source,
            state=self.state,
            tier=self.tier,
            blocks=tuple(
                BlockStatus(
                    block.name, block.nbytes, "host" if block.name in self.parked else "device"
                )
                for block in self.blocks
            ),
            device_bytes=self.granted_bytes,
            host_bytes=self.host_bytes,
            estimated_bytes=self.needed_bytes,
            estimated_load_s=self.reload_s,
            estimated_wake_s=self.move_s if self.tier == "host" else None,
            leases=self.leases,
            holds=self.holds,
            waiting=self.waiting,
            pinned=self.pinned,
            keep_alive_s=self.keep_alive_s,
            idle_s=None if self.idle_since is None or self.holds else now - self.idle_since,
            last_error=self.last_error,
            outdated=self.outdated,
            random_weights=Source(config.source).random_weights,
            created=created,
        )

    def view(self, now: float) -> ModelView:
        """What the planner sees of it."""
        parkable = [block for block in self.blocks if block.parkable]
        return ModelView(
            id=self.config.id,
            state=self.state,
            resident_bytes=self.granted_bytes,
            needed_bytes=self.needed_bytes,
            leases=self.leases,
            holds=self.holds,
            leased_working_bytes=self.leased_working_bytes,
            max_concurrency=self.max_concurrency,
            pinned=self.pinned,
            resident_since=self.resident_since,
            idle_since=self.idle_since,
            keep_alive_s=self.keep_alive_s,
            reload_s=self.reload_s or 0.0,
            demand=self.demand.read(now),
            unload_reason=self.unload_reason or self._ordered(OrderKind.UNLOAD),
            park_reason=self._ordered(OrderKind.PARK),
            parts=tuple(
                PartView(block.name, block.nbytes, self.wake_seconds([block]))
                for block in parkable
                if block.name not in self.parked
            ),
            leaving_bytes=sum(block.nbytes for block in self.blocks if block.name in self.leaving),
            wake_s=self.wake_seconds(parkable),
            host_bytes=self.host_bytes if self.blocks else self.expected_host_bytes,
            used_at=self.demand.at,
        )
