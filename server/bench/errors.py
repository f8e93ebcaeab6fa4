"""What can keep a benchmark from being run; wrong answers of a server are counted instead.

BenchError
├── BadSetUp      the scenario cannot be run so: an unknown model, a peer that cannot do it
├── NotStarted    a side did not come up, or died
└── Void          the sides gave different answers, so that their figures cannot be compared
"""

from __future__ import annotations


class BenchError(Exception):
    """Base of the tree; the message is for whoever ran the command."""


class BadSetUp(BenchError):
    """The scenario cannot be run so."""


class NotStarted(BenchError):
    """A side did not come up, or died; the message ends with what it said last."""


class Void(BenchError):
    """The sides gave different answers to the same request."""
