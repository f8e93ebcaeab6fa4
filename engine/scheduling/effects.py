"""The slow work that the scheduler starts."""

from __future__ import annotations

from typing import Protocol


class Effects(Protocol):
    """Slow work and measurements. Every call returns at once and never raises."""

    def estimate(self, model_id: str) -> None:
        """Estimate the model from its files; answers `on_estimate` or `on_estimate_failed`."""

    def prefetch(self, model_id: str) -> None:
        """Read the files of the next model ahead, as far as there is memory to spare."""

    def load(self, model_id: str) -> None:
        """Bring the model in; answers `on_loaded` or `on_load_failed`."""

    def unload(self, model_id: str, reason: str) -> None:
        """Unload the model; answers `on_unloaded`."""

    def park(self, model_id: str, blocks: frozenset[str], reason: str) -> None:
        """Take blocks off the device; answers `on_parked`."""

    def wake(self, model_id: str, blocks: frozenset[str]) -> None:
        """Bring parked blocks back; answers `on_woken` or `on_wake_failed`."""

    def measure_external(self) -> int:
        """Device bytes in use, measured now, that no ledger entry accounts for.

        Called only while no model is being moved.
        """

    def host_free_bytes(self) -> int:
        """Host memory left for host copies."""

    def call_at(self, when: float) -> None:
        """Call `on_timer` at that time of the scheduler's clock; replaces the call set before."""
