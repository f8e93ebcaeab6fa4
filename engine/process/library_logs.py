"""What libraries may log."""

from __future__ import annotations

import logging
import os

QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables that the libraries read as they are imported."""
QUIET_LOGGERS = ("torch._library.triton",)


def quiet_libraries() -> None:
    """Have shared libraries tell errors only. Call before any of them is imported.

    What they warn of here is a choice of ours, or nothing that an operator could mend: that there
    is no Triton, no torchvision, and how the memory of a CPU is bound. Variables that the operator
    set are left as they are.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
