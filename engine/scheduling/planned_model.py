"""A model while a plan is made: its view, and what the plan decided of it so far."""

from __future__ import annotations

from engine.scheduling.snapshot import ModelView, Snapshot
from engine.status import COMPLETE, ModelState


class PlannedModel:
    """One model of a plan in the making."""

    __slots__ = (
        "base_bytes", "budget_bytes", "capacity_bytes", "closed", "held", "holds", "leases",
        "room_held", "turn_held", "view",
    )  # fmt: skip

    def __init__(
        self, view: ModelView, snapshot: Snapshot, pinned_bytes: int, kept_bytes: int
    ) -> None:
        self.view = view
        self.leases = view.leases
        self.holds = view.holds
        self.closed = False
        """No later ticket for it is granted, whatever is decided after this."""
        self.held = False
        """Its tickets that come later in the order must wait."""
        self.room_held = False
        """Room is held for its first overdue ticket while it loads."""
        self.turn_held = False
        """One of its places is held for the claim, of which the working memory does not fit yet."""
        granted = view.state in COMPLETE
        self.base_bytes = view.resident_bytes if granted else view.needed_bytes
        pinned_others = pinned_bytes - (view.resident_bytes if stays(view) else 0)
        self.budget_bytes = snapshot.budget_bytes - pinned_others
        kept_others = kept_bytes - kept_for_sessions(view)
        self.capacity_bytes = snapshot.capacity_bytes - pinned_others - kept_others

    @property
    def resident(self) -> bool:
        """It is on the device and may stay."""
        return self.view.state is ModelState.RESIDENT and self.view.unload_reason is None

    @property
    def weightless(self) -> bool:
        """It is there and has no bytes on the device. What runs on it disturbs nobody."""
        return self.resident and self.view.resident_bytes == 0

    @property
    def ample_bytes(self) -> int:
        """Up to this working memory a ticket is not refused, nor waits for other programs."""
        return min(self.budget_bytes, self.capacity_bytes) - (self.base_bytes or 0)

    @property
    def has_place(self) -> bool:
        """One more request may run on it."""
        return self.leases + self.turn_held < self.view.max_concurrency

    @property
    def can_come(self) -> bool:
        """It can be brought in once there is room."""
        return self.view.state in (ModelState.ABSENT, ModelState.PARKED)

    @property
    def incoming_bytes(self) -> int:
        """Bytes that bringing it in takes, once its leaving blocks have left."""
        view = self.view
        parked = view.state in (ModelState.PARKED, ModelState.PARKING)
        staying_bytes = view.resident_bytes - view.leaving_bytes if parked else 0
        return (self.base_bytes or 0) - staying_bytes

    @property
    def evictable(self) -> bool:
        """It has bytes on the device that may be freed once it is idle."""
        view = self.view
        parked = view.state is ModelState.PARKED and view.unload_reason is None
        free = not view.pinned and not self.holds
        return (self.resident or parked) and view.resident_bytes > 0 and free


def stays(view: ModelView) -> bool:
    """Whether its bytes can never be freed for another model: it is pinned."""
    granted = view.state in (*COMPLETE, ModelState.PARKED)
    return view.pinned and granted and view.unload_reason is None


def kept_for_sessions(view: ModelView) -> int:
    """The bytes that cannot be freed because sessions hold the model, unless it stays anyway."""
    if not view.holds or stays(view):
        return 0
    return view.resident_bytes if view.state in COMPLETE else view.needed_bytes or 0
