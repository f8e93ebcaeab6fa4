"""How likely it is that somebody speaks, 31 times a second, by silero's voice activity detector.

The model (MIT, 1.2 MB) comes with faster-whisper, and ONNX Runtime runs it on the CPU in some
0.15 ms a window. One session serves the process: it keeps no state between runs, and any thread
may use it. Nothing is imported before the first detector.

The runtimes that transcribe load the same model when they start, before the device's baseline is
measured. The session is theirs then, so its bytes are counted. Without them it takes 36 MB more.
"""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from engine.errors import InvalidRequest
from engine.events import Samples

RATE = 16_000
"""Hertz of the samples."""

WINDOW = 512
"""Samples of a window."""

WINDOW_MS = WINDOW * 1000 // RATE

_CONTEXT = 64
"""Samples of the window before that the model sees again."""

_STATE_SHAPE = (1, 1, 128)
"""Of each of the two states of its LSTM."""

_WINDOWS_AT_ONCE = 256
"""A bound on the working memory, 8 seconds, if a client sends minutes in one message."""

_MODEL = Path("assets", "silero_vad_v6.onnx")


class VoiceActivity:
    """The detector of one stream. One thread at a time may use it."""

    def __init__(self) -> None:
        """The first one of the process loads the model: `load` does so elsewhere.

        Raises:
            InvalidRequest: faster-whisper is not installed. Names `turn_detection`.

        """
        self._session = _MODELS.session()
        self._waiting = np.zeros(0, np.float32)
        self._context = np.zeros(_CONTEXT, np.float32)
        self._h = np.zeros(_STATE_SHAPE, np.float32)
        self._c = np.zeros(_STATE_SHAPE, np.float32)

    @staticmethod
    async def load() -> None:
        """Load the model on a thread, so that the first detector does not stop the event loop.

        Raises:
            InvalidRequest: as in the constructor.

        """
        await asyncio.to_thread(_MODELS.session)

    def feed(self, samples: Samples) -> list[float]:
        """The probability of speech in each window that is whole by now, 0 to 1.

        The samples have 16 kHz. Those of a window that is not whole wait for the next call.
        """
        samples = np.concatenate([self._waiting, samples], dtype=np.float32)
        whole = len(samples) - len(samples) % WINDOW
        self._waiting = samples[whole:]
        windows = samples[:whole].reshape(-1, WINDOW)
        found: list[float] = []
        for start in range(0, len(windows), _WINDOWS_AT_ONCE):
            found += self._run(windows[start : start + _WINDOWS_AT_ONCE])
        return found

    def _run(self, windows: Samples) -> list[float]:
        """The probabilities of (windows, samples)."""
        before = np.vstack([self._context, windows[:-1, -_CONTEXT:]])
        probabilities, self._h, self._c = self._session.run(
            None, {"input": np.hstack([before, windows]), "h": self._h, "c": self._c}
        )
        self._context = windows[-1, -_CONTEXT:].copy()
        return [float(each) for each in probabilities]


class _Models:
    """The session of the process, made once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._session: Any = None

    def session(self) -> Any:
        with self._lock:
            if self._session is None:
                self._session = _new_session()
            return self._session


_MODELS = _Models()


def _new_session() -> Any:
    loaded = sys.modules.get("faster_whisper.vad")
    if loaded is not None:
        return loaded.get_vad_model().session
    # The package is found, not imported: importing it loads CTranslate2.
    package = find_spec("faster_whisper")
    folders = (package and package.submodule_search_locations) or ()
    path = next((path for folder in folders if (path := Path(folder, _MODEL)).is_file()), None)
    try:
        if path is None:
            raise ImportError(f"there is no {_MODEL.name}")
        import onnxruntime
    except ImportError as error:
        raise InvalidRequest(
            "`turn_detection` needs the voice activity detector that comes with faster-whisper,"
            " which is not installed here. Set it to null and commit the audio yourself.",
            param="turn_detection",
        ) from error
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # a large run would keep its memory
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"], sess_options=options
    )
