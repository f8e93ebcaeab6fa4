"""Measure swaps on one device: weights alone, whole models, and a stream beside them.

Each turn measures a copy or a read of the same bytes beside the swap; a ratio is the median.

Usage: python -m tests.gpu.measure_swap CONFIG.yaml (--small | --real)
"""

from __future__ import annotations

import asyncio
import ctypes
import statistics
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.config import ModelConfig
from engine.engine import Engine
from engine.memory.host_memory import HostMemory, host_slab
from engine.memory.nvidia_smi import read_gpus
from engine.memory.weights import Weights
from tests.gpu.arguments import arguments, read
from tests.gpu.device import DEVICE, free_bytes, synchronize, used_bytes
from tests.gpu.models import write_weights
from tests.gpu.record import Figure, tell
from tests.gpu.requests import made, request_for, text_request
from tests.layouts.sparse import Tensor

PIECE = 256 * 2**20
"""Bytes of a copy: as a slab of weights has them, and page-locked memory comes in powers of two."""

STAYING = ("kv_cache", "workspace")
"""Blocks that a wake does not copy."""

LEAST_COPY = 0.9
"""Of the speed of one copy of the same bytes from pinned memory."""

MOST_PARK = 0.03
"""Of the time of a wake."""

MOST_GAP_MS = 50.0
"""Between two tokens of a stream while another model comes and goes."""

MOST_ERROR = 0.03
"""Of what the ledger counts against what nvidia-smi shows."""


def timed(act: Callable[[], object]) -> float:
    """Seconds of a call, until the device has done its work."""
    synchronize()
    began = time.perf_counter()
    kept = act()
    synchronize()
    seconds = time.perf_counter() - began
    del kept
    return seconds


class Copy:
    """A copy of so many bytes from host memory to the device, as fast as the library does it."""

    def __init__(self, nbytes: int) -> None:
        sizes = [min(PIECE, nbytes - start) for start in range(0, nbytes, PIECE)]
        if DEVICE == "cuda":
            self._source = [torch.ones(n, dtype=torch.uint8).pin_memory() for n in sizes]
        else:
            self._source = [host_slab(n).fill_(1) for n in sizes]

    def __call__(self) -> list[torch.Tensor]:
        targets = []
        for piece in self._source:
            if DEVICE == "cuda":
                target = torch.empty_like(piece, device="cuda")
                target.copy_(piece, non_blocking=True)
            else:
                target = host_slab(piece.numel())
                ctypes.memmove(target.data_ptr(), piece.data_ptr(), piece.numel())
            targets.append(target)
        return targets

    def close(self) -> None:
        """Give the host memory back. torch would keep what is page-locked."""
        self._source.clear()
        if DEVICE == "cuda":
            torch._C._host_emptyCache()


def measure_weights(folder: Path, nbytes: int, rounds: int) -> None:
    """Tell how fast weights alone are brought in, dropped and woken."""
    count = 64
    path = folder / "weights.safetensors"
    shape = (nbytes // count // 2,)
    write_weights(path, {f"t{index}": Tensor("BF16", shape) for index in range(count)})
    module = torch.nn.Module()
    for name, tensor in load_file(path).items():  # maps the file, reads nothing
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    host = HostMemory(2 * nbytes, pinned=DEVICE == "cuda")
    adopted: list[Weights] = []
    seconds = timed(lambda: adopted.append(Weights.adopt({"all": [module]}, host, DEVICE)))
    (weights,) = adopted
    tell(Figure("weights: file to device, with the host copy", nbytes / seconds / 1e9, "GB/s"))
    copy = Copy(nbytes)
    copy()
    wakes, parks, copies = [], [], []
    for _ in range(rounds):
        parks.append(timed(lambda: weights.park(["all"])))
        copies.append(timed(copy))
        wakes.append(timed(lambda: weights.wake(["all"])))
    note = f"{nbytes / 1e9:.2f} GB; wake {_spread(wakes)}, copy {_spread(copies)}"
    ratio = statistics.median(map(truediv, copies, wakes))
    tell(Figure("weights: pinned copy / wake", ratio, at_least=LEAST_COPY, note=note))
    ratio = statistics.median(map(truediv, parks, wakes))
    tell(Figure("weights: park / wake", ratio, at_most=MOST_PARK, note=f"park {_spread(parks)}"))
    copy.close()
    weights.close()
    host.close()
    path.unlink()


async def measure_model(engine: Engine, model: ModelConfig, rounds: int) -> None:
    """Tell how long a whole model takes to come from its files, and to be woken."""
    before = _smi_bytes()
    began = time.perf_counter()
    await engine.load(model.id)
    seconds = time.perf_counter() - began
    size = engine.model_status(model.id).device_bytes
    tell(Figure(f"{model.id}: from its files", seconds, "s", note=f"{size / 1e9:.2f} GB"))
    await first_output(engine, model)
    if before is not None:
        grown = (_smi_bytes() or 0) - before
        note = f"ledger {size / 1e9:.2f} GB, nvidia-smi {grown / 1e9:.2f} GB"
        error = abs(grown - size) / size
        tell(Figure(f"{model.id}: ledger's error", error, at_most=MOST_ERROR, note=note))
    wakes, parks, copies, firsts, warms = [], [], [], [], []
    moved = 0
    for _ in range(rounds):
        full = used_bytes()
        parks.append(await _timed(engine.park(model.id)))
        moved = full - used_bytes()
        wakes.append(await _timed(engine.load(model.id)))
        await engine.park(model.id)
        firsts.append(await first_output(engine, model))
        warms.append(await first_output(engine, model))
    tell(Figure(f"{model.id}: wake", statistics.median(wakes), "s", note=_spread(wakes)))
    tell(Figure(f"{model.id}: given back by a park", moved / 1e9, "GB"))
    ratio = statistics.median(map(truediv, parks, wakes))
    tell(Figure(f"{model.id}: park / wake", ratio, at_most=MOST_PARK, note=_spread(parks)))
    blocks = engine.model_status(model.id).blocks
    weights = sum(each.nbytes for each in blocks if each.name not in STAYING)
    copy = Copy(weights)
    copy()
    copies = [timed(copy) for _ in range(rounds)]
    copy.close()
    ratio = statistics.median(map(truediv, copies, wakes))
    note = f"{weights / 1e9:.2f} GB of weights, copy {_spread(copies)}"
    tell(Figure(f"{model.id}: pinned copy / wake", ratio, at_least=LEAST_COPY, note=note))
    tell(Figure(f"{model.id}: first output after a park", statistics.median(firsts), "s"))
    tell(Figure(f"{model.id}: first output, resident", statistics.median(warms), "s"))


async def measure_gaps(
    engine: Engine, streaming: ModelConfig, moving: ModelConfig, rounds: int
) -> None:
    """Tell the worst gap between two tokens while another model is parked, woken and loaded."""
    gaps: list[float] = []
    stop = asyncio.Event()

    async def stream() -> None:
        while not stop.is_set():
            session = await engine.open(text_request(streaming.id, max_tokens=400))
            last = 0.0
            async for event in session.events():
                now = time.perf_counter()
                if last and "[DONE]" not in str(event):
                    gaps.append(now - last)
                last = now

    await engine.load(moving.id)
    task = asyncio.create_task(stream())
    worst: dict[str, list[float]] = {"alone": [], "parked": [], "woken": [], "loaded": []}
    for _ in range(rounds):
        gaps.clear()
        await asyncio.sleep(1.0)
        worst["alone"].append(max(gaps, default=0.0))
        for what, move in (
            ("parked", engine.park),
            ("woken", engine.load),
            ("", engine.unload),
            ("loaded", engine.load),
        ):
            gaps.clear()
            await move(moving.id)
            await asyncio.sleep(0.05)
            if what:
                worst[what].append(max(gaps, default=0.0))
    stop.set()
    await task
    size = engine.model_status(moving.id).device_bytes
    for what, seconds in worst.items():
        name = (
            f"worst gap of a stream, {moving.id} {what}" if what != "alone" else "worst gap alone"
        )
        bound = None if what == "alone" else MOST_GAP_MS
        note = f"{size / 1e9:.2f} GB; {_spread(seconds)}"
        tell(Figure(name, 1e3 * max(seconds), "ms", at_most=bound, note=note))


async def first_output(engine: Engine, model: ModelConfig) -> float:
    """Seconds to the first token, or to the whole picture."""
    began = time.perf_counter()
    if model.task != "generate":
        await made(engine, model, steps=1)
        return time.perf_counter() - began
    session = await engine.open(request_for(model))
    seconds = time.perf_counter() - began
    async for _ in session.events():
        pass
    return seconds


async def _timed(move: Any) -> float:
    began = time.perf_counter()
    await move
    return time.perf_counter() - began


def _smi_bytes() -> int | None:
    """What nvidia-smi shows as used; None without a card."""
    if DEVICE != "cuda":
        return None
    synchronize()
    free_bytes()  # empties torch's cache
    (gpu, *_) = read_gpus()
    return gpu.total_bytes - gpu.free_bytes


def _spread(seconds: list[float]) -> str:
    low, high = 1e3 * min(seconds), 1e3 * max(seconds)
    return f"{1e3 * statistics.median(seconds):.1f} ms ({low:.1f}–{high:.1f})"


async def main(path: Path, *, small: bool) -> None:
    """Measure: the first model streams, the second moves beside it, the third is for images."""
    config = read(path)
    rounds = 1 if small else 3
    await asyncio.to_thread(
        measure_weights, path.parent, 64 * 2**20 if small else 4 * 2**30, rounds
    )
    engine = Engine(config)
    await engine.start()
    try:
        language, moving, image = config.models
        await measure_model(engine, language, rounds)
        await measure_model(engine, image, rounds)
        await engine.unload(image.id)
        await measure_gaps(engine, language, moving, 1)
    finally:
        await engine.stop()


if __name__ == "__main__":
    given = arguments(__doc__)
    asyncio.run(main(given.config, small=given.small))
