"""The slow work that the scheduler sends out."""

from __future__ import annotations

from typing import Protocol


class Effects(Protocol):
    """What the scheduler asks of the world. Every call returns at once and never raises."""

    def estimate(self, model_id: str) -> None:
        """Read what the model takes; comes back as `on_estimate` or `on_estimate_failed`."""

    def prefetch(self, model_id: str) -> None:
        """Have the model's files read ahead, where there is memory to spare: it comes next."""

    def load(self, model_id: str) -> None:
        """Bring the model in; comes back as `on_loaded` or `on_load_failed`."""

    def unload(self, model_id: str, reason: str) -> None:
        """Take the model out; comes back as `on_unloaded`."""

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:
        """Take blocks off the device; comes back as `on_parked`."""

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:
        """Bring parked blocks back; comes back as `on_woken` or `on_wake_failed`."""

    def measure_external(self) -> int:
        """Device bytes in use, measured now, that no ledger entry accounts for.

        Asked only while no model is being moved.
        """

    def host_free_bytes(self) -> int:
        """Host memory left for host copies."""

    def call_at(self, when: float) -> None:
        """Ask for `on_timer` at that time of the scheduler's clock; replaces the ask before."""
