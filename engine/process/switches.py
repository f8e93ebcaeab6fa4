"""The interval at which threads hand the interpreter over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

QUICK_SWITCH_S = 0.0001
"""How long a thread may hold the interpreter while another waits, in `quick_switches`.

A step releases the interpreter at every torch operation. It waits to get it back while a load
beside it runs Python. Measured on two cores, a step of 9 ms: 90 ms beside a load at an interval of
0.5 ms, 50 ms at 0.1 ms, no better at 0.02 ms, where the load itself gets slower. CPython's own
5 ms are better where only the event loop runs beside the steps, in short pieces: 12-15 % more
tokens a second with 16 and 64 streams.
"""

_switch_lock = threading.Lock()
_quick = 0
_usual_switch_s = 0.0


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let steps get the interpreter back quickly, while another thread runs Python for long."""
    global _quick, _usual_switch_s
    with _switch_lock:
        if not _quick:
            _usual_switch_s = sys.getswitchinterval()
            sys.setswitchinterval(QUICK_SWITCH_S)
        _quick += 1
    try:
        yield
    finally:
        with _switch_lock:
            _quick -= 1
            if not _quick:
                sys.setswitchinterval(_usual_switch_s)
