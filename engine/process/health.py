"""The health check: whether this process can still serve requests."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from engine.errors import reason
from engine.memory.device import Device
from engine.process.faults import FAULTS
from engine.process.gate import GATE
from engine.process.watchdog import WATCHDOG

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""Interval between checks of the native calls under way."""
CHECK_S = 5.0
"""Interval between checks of the device while nothing fails."""


async def wait_for_fault(
    device: Device, recheck: asyncio.Event, hang_s: float, stall_s: float
) -> str:
    """Wait for a fault with which no request can be served any more; return it in words.

    `FAULTS` has the bugs that were met. `Watchdog.check` watches the calls under way. The device
    runs a trivial call again and again, and at once when `recheck` is set. After an illegal access
    or a failed assertion on a GPU every later call fails, whatever the text of the first error was.
    """
    checks = asyncio.create_task(_check(device, recheck))
    try:
        while True:
            await asyncio.wait([checks], timeout=POLL_INTERVAL_S)
            if checks.done():
                return checks.result()
            fault = FAULTS.first or WATCHDOG.check(hang_s, stall_s)
            if fault is not None:
                return fault
    finally:
        checks.cancel()


async def _check(device: Device, recheck: asyncio.Event) -> str:
    while True:
        recheck.clear()
        try:
            await asyncio.to_thread(_touch, device)
        except Exception as error:
            log.debug("the check failed", exc_info=error)
            return f"the device does not work any more: {reason(error)}"
        with suppress(TimeoutError):
            async with asyncio.timeout(CHECK_S):
                await recheck.wait()


def _touch(device: Device) -> None:
    # At the gate: no other thread may synchronise while a graph is captured.
    with GATE.step(), WATCHDOG.watch("a trivial call of the device", computes=False):
        device.check()
