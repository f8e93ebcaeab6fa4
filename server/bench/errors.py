"""Errors that end a benchmark. Wrong answers of a server are counted instead.

BenchError
├── BadSetUp      the scenario cannot run so: an unknown model, a peer without support for it
├── NotStarted    a target did not start, or died
├── BadServer     a server refused a request whose answer is to be judged
└── InvalidRun    the targets gave different answers, so their figures cannot be compared
"""

from __future__ import annotations


class BenchError(Exception):
    """Base of the tree. The command prints the message."""


class BadSetUp(BenchError):
    """The scenario cannot run so."""


class NotStarted(BenchError):
    """A target did not start, or died. The message ends with the end of its log."""


class BadServer(BenchError):
    """A server refused a request whose answer is to be judged. The message has its answer."""


class InvalidRun(BenchError):
    """The targets gave different answers to the same request."""
