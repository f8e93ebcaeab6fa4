"""Whether this process can still do what it is there for."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from engine.memory.device import Device
from engine.process.gate import GATE
from engine.process.watchdog import WATCHDOG

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""Seconds between two looks at the calls under way."""
CHECK_S = 5.0
"""Seconds between two checks of the device while nothing fails."""


async def wait_for_fault(
    device: Device, recheck: asyncio.Event, hang_s: float, stall_s: float
) -> str:
    """Return, in words, what no request can be served with any more; as long as all is well, wait.

    The calls under way are looked at as `Watchdog.look` says. The device is asked for something
    trivial again and again, and at once when `recheck` is set: after an illegal access or a failed
    assertion on a GPU each later call fails, whatever the first error's text was.
    """
    checks = asyncio.create_task(_check(device, recheck))
    try:
        while True:
            await asyncio.wait([checks], timeout=POLL_INTERVAL_S)
            if checks.done():
                return checks.result()
            if (fault := WATCHDOG.look(hang_s, stall_s)) is not None:
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
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the device does not work any more: {first_line}"
        with suppress(TimeoutError):
            async with asyncio.timeout(CHECK_S):
                await recheck.wait()


def _touch(device: Device) -> None:
    # At the gate: while a graph is captured no other thread may synchronise.
    with GATE.step(), WATCHDOG.watch("a trivial call of the device", computes=False):
        device.check()
