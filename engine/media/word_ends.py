"""Where words end in Thai, which has no spaces between them.

The dictionary is PyThaiNLP's, an optional package (the extra `thai`). It is imported when the first
Thai text has to be cut within a phrase: a second and 80 MB.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

log = logging.getLogger(__name__)

THAI = re.compile("[\u0e01-\u0e59]")

_SETTINGS = {"PYTHAINLP_READ_ONLY": "1", "PYTHAINLP_OFFLINE": "1"}
"""Otherwise it makes a folder in the home directory, and may fetch files."""


def word_ends(text: str) -> Sequence[int]:
    """The places after each word of a Thai text, in order; none without the package."""
    words = _segmenter()
    return () if words is None else tuple(accumulate(map(len, words(text))))


@cache
def _segmenter() -> Callable[[str], list[str]] | None:
    if "PYTHAINLP_READ_MODE" not in os.environ:  # the older name of the first; both are an error
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
    try:
        from pythainlp.tokenize.newmm import segment
    except ImportError:
        log.info("Thai texts are cut between letters: the package pythainlp is not installed")
        return None
    return segment  # type: ignore[no-any-return]
