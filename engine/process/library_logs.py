"""The log levels of the native libraries."""

from __future__ import annotations

import logging
import os

QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables that the libraries read during their import."""
QUIET_LOGGERS = ("torch._library.triton",)


def quiet_libraries() -> None:
    """Make the libraries log errors only. Call it before any of them is imported.

    Their warnings are about choices of this project, or about what an operator cannot change: no
    Triton, no torchvision, and how the memory of a CPU is bound. Variables that the operator set
    stay as they are.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
