"""A vLLM model's device memory on a CPU: measured, given back while it is parked, brought back.

`ModelMemory` is the seam; its implementation on CUDA is in `cuda_memory`. All calls run on the
loading thread, not on the thread that steps the cores. They need no gate: nothing else touches the
memory of a model that is being parked or woken. So its bytes move while other models step.

On a CPU the bytes of a model are in three places:

* Parameters and buffers that torch can see. `Weights` moves them.
* Linear layers that vLLM's kernels keep rearranged ("packed"), in memory that cannot be read. They
  are dropped, and packed again from a host copy of the plain weight.
* The KV cache, one storage. Its pages are given back, and come again as zeros.

Importing this module imports vLLM.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engine.memory.block import Block
from engine.memory.host_memory import HostMemory, HostMemoryFull
from engine.memory.slabs import SharedMemory
from engine.memory.weights import Weights
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

log = logging.getLogger(__name__)

WEIGHTS, KV_CACHE, WORKSPACE = "weights", "kv_cache", "workspace"

LORAS = "loras"
"""The slots of a batch's LoRAs. They are empty after a park: vLLM copies LoRAs in as it steps."""

STACKED_DIMENSIONS = 2
"""At least: vLLM's other attributes of a layer with LoRAs are lists of numbers."""

UNSEEN_SHARE = 0.02
"""Share of the weights that may stay on the device when they are parked: small tensors that a layer
keeps as a plain attribute. A model with more is not parked, or its bytes would be counted wrong."""


class ModelMemory(Protocol):
    """The device memory of one loaded model, block by block."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Bytes of each part while it is on the device."""

    @property
    def host_bytes(self) -> int:
        """Bytes of the master copies."""

    def park(self, names: Collection[str]) -> None:
        """Give back the bytes of these blocks, of parked ones nothing. It copies nothing."""

    def wake(self, names: Collection[str]) -> None:
        """Bring these blocks back, all or none.

        Raises:
            torch.OutOfMemoryError | MemoryError: there is no room. They are parked as before.

        """

    def close(self) -> None:
        """Give the master copies back. Call it once the engine is shut down, parked or not."""


@dataclass(slots=True, eq=False)
class PackedLayer:
    """A layer whose weight a CPU kernel of vLLM keeps in another form, in its own memory."""

    layer: torch.nn.Module
    nbytes: int
    only_form: bool
    """Whether the layer has dropped the plain weight."""
    plain: torch.Tensor | None
    """The weight as it was loaded, if the layer has dropped it and the model is to be parked."""
    slab: torch.Tensor | None = None
    """The host memory under `plain`."""

    def keep(self, host: HostMemory) -> None:
        """Copy the plain weight to host memory.

        Raises:
            HostMemoryFull: there is no room.

        """
        if self.plain is None:
            return
        self.slab = host.allocate(self.plain.nbytes)
        view = self.slab[: self.plain.nbytes].view(self.plain.dtype).view(self.plain.shape)
        self.plain = view.copy_(self.plain)

    def forget(self, host: HostMemory | None) -> None:
        """Give the host memory back."""
        self.plain, slab, self.slab = None, self.slab, None
        if slab is not None and host is not None:
            host.free(slab)

    def drop(self) -> None:
        """Free the packed form."""
        self.layer.cpu_linear = _parked

    def pack(self) -> None:
        """Make the packed form again. vLLM chooses its kernel as it did before.

        Raises:
            MemoryError: the kernel could not be made. The layer cannot be used.

        """
        emptied = self.layer.weight
        if self.plain is not None:
            self.layer.weight = torch.nn.Parameter(self.plain, requires_grad=False)
        try:
            layer_utils.dispatch_cpu_unquantized_gemm(self.layer, self.only_form)
        finally:
            self.layer.weight = emptied
        if not _is_packed(self.layer):  # vLLM fell back to torch and the plain weight
            raise MemoryError("a layer could not be packed again")


@dataclass(slots=True)
class Packing:
    """The layers that a load packs."""

    keep_plain: bool
    layers: list[PackedLayer] = field(default_factory=list)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packing(*, keep_plain: bool) -> Iterator[Packing]:
    """Record every layer that this thread packs inside the context."""
    noted = Packing(keep_plain)
    token = _packing.set(noted)
    try:
        yield noted
    finally:
        _packing.reset(token)


def note_packed_layers() -> None:
    """Have vLLM's loads report to `packing` the layers that they pack. Harmless when repeated."""
    dispatch = layer_utils.dispatch_cpu_unquantized_gemm
    if hasattr(dispatch, "__wrapped__"):
        return

    @functools.wraps(dispatch)
    def noted(layer: Any, remove_weight: bool) -> None:
        plain = layer.weight.data
        dispatch(layer, remove_weight)
        now = _packing.get()
        if now is not None and _is_packed(layer):
            kept = plain if now.keep_plain and remove_weight else None
            now.layers.append(PackedLayer(layer, plain.nbytes, remove_weight, kept))

    layer_utils.dispatch_cpu_unquantized_gemm = noted


class CpuMemory:
    """A model's memory where the device is the host."""

    def __init__(
        self, worker: Any, packed: Packing, host: HostMemory | None, expected: Mapping[str, int]
    ) -> None:
        """Measure a model that was just loaded, and make its master copies if there is room.

        `expected` has the bytes of each block by the model's files. For the workspace there is no
        other source. Nothing may run on the model during the call.
        """
        models = (worker.get_model(), worker.get_draft_model())
        self._models = [model for model in models if model is not None]
        self._host = host
        self._weights: Weights | None = None
        self._kv = _storages(worker.model_runner.kv_caches)
        self._loras = _storages(_slots(self._models))
        self._packed = _used(packed.layers, self._models)
        if packed.keep_plain and self._all_movable(expected[WEIGHTS]):
            self._make_masters()
        if self._weights is None:
            self._forget_masters()
        blocks = [self._weights_block(expected[WEIGHTS])]
        if self._kv:
            kv_bytes = sum(storage.nbytes() for storage in self._kv)
            blocks.append(Block(KV_CACHE, kv_bytes, parkable=True, scratch=True))
        if self._loras:
            lora_bytes = sum(storage.nbytes() for storage in self._loras)
            blocks.append(Block(LORAS, lora_bytes, parkable=True, scratch=True))
        # Between two steps it has no memory, so it can leave and come back at no cost.
        blocks.append(Block(WORKSPACE, expected[WORKSPACE], parkable=True, scratch=True))
        self._blocks = tuple(blocks)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Weights and KV cache as measured, the workspace as estimated."""
        return self._blocks

    @property
    def host_bytes(self) -> int:
        """Bytes of the master copies of all weights."""
        slabs = sum(int(each.slab.nbytes) for each in self._packed if each.slab is not None)
        return slabs + (self._weights.host_bytes if self._weights is not None else 0)

    def park(self, names: Collection[str]) -> None:
        """Drop weights and packed forms, and give the pages of the KV cache back."""
        if WEIGHTS in names and self._weights is not None:
            for each in self._packed:
                each.drop()
            self._weights.park([WEIGHTS])
        if KV_CACHE in names:
            for storage in self._kv:
                _release_pages(storage)
        if LORAS in names:
            for storage in self._loras:
                _release_pages(storage)

    def wake(self, names: Collection[str]) -> None:
        """Copy the weights back and pack them. Pages of the KV cache come when they are written.

        Raises:
            MemoryError | RuntimeError: there is no room; on a CPU torch has no special type for
                that. The blocks are parked as before.

        """
        if WEIGHTS not in names or self._weights is None:
            return
        self._weights.wake([WEIGHTS])
        try:
            for each in self._packed:
                each.pack()
        except BaseException:
            self.park([WEIGHTS])
            raise

    def close(self) -> None:
        """Give the master copies back. The model must not be used any more."""
        self._forget_masters()
        self._packed, self._models, self._kv, self._loras = [], [], [], []

    def _weights_block(self, expected_bytes: int) -> Block:
        packed_bytes = sum(each.nbytes for each in self._packed)
        if self._weights is not None:
            plain_bytes = sum(self._weights.block_bytes().values())
            return Block(WEIGHTS, plain_bytes + packed_bytes, parkable=True)
        return Block(WEIGHTS, max(self._plain_bytes() + packed_bytes, expected_bytes))

    def _plain_bytes(self) -> int:
        tensors = [t for model in self._models for t in (*model.parameters(), *model.buffers())]
        return sum(storage.nbytes() for storage in _storages(tensors))

    def _all_movable(self, expected_bytes: int) -> bool:
        """Whether the weights are in memory that parking gives back.

        A quantised layer may keep them packed in memory that cannot be seen. Any layer may keep a
        tensor made of its weights as a plain attribute. Both would stay.
        """
        only_packed = sum(each.nbytes for each in self._packed if each.only_form)
        unseen_bytes = max(0, expected_bytes - self._plain_bytes() - only_packed)
        unseen_bytes += _attribute_bytes(self._models, (*self._kv, *self._loras))
        if unseen_bytes <= UNSEEN_SHARE * expected_bytes:
            return True
        log.info("%d bytes of weights cannot be moved: the model will not be parked", unseen_bytes)
        return False

    def _make_masters(self) -> None:
        assert self._host is not None  # otherwise no plain weight was kept
        try:
            for each in self._packed:
                each.keep(self._host)
            weights = Weights.adopt({WEIGHTS: self._models}, self._host, "cpu")
        except (HostMemoryFull, SharedMemory) as error:
            log.info("the model will not be parked: %s", error)
            return
        except BaseException:
            self._forget_masters()
            raise
        if weights.parkable:
            self._weights = weights

    def _forget_masters(self) -> None:
        for each in self._packed:
            each.forget(self._host)
        if self._weights is not None:
            self._weights.close()
            self._weights = None


def _parked(*_args: Any) -> Any:
    raise RuntimeError("the weights of this model are parked")


def _is_packed(layer: Any) -> bool:
    """Whether vLLM chose a kernel with its own weight: a closure holds that."""
    return bool(getattr(layer.__dict__.get("cpu_linear"), "__closure__", None))


def _used(packed: Iterable[PackedLayer], models: Iterable[torch.nn.Module]) -> list[PackedLayer]:
    """The layers whose packed form is used. The packed form of the others is freed.

    vLLM packs every embedding as if it computed logits. The packed form is as large as the
    embedding, and most models never use it. If one does after all, torch computes it.
    """
    heads = {
        module
        for model in models
        for name, module in model.named_modules(remove_duplicate=False)
        if name.endswith("lm_head")
    }
    used = []
    for each in packed:
        layer = each.layer
        embeds = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
        if embeds and layer not in heads:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            used.append(each)
    return used


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """The distinct storages of some tensors."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
    found.pop(0, None)  # of empty tensors
    return list(found.values())


def _slots(models: Iterable[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """The tensors in which vLLM stacks the LoRAs of a batch."""
    for model in models:
        for module in model.modules():
            if isinstance(module, BaseLayerWithLoRA):
                for value in vars(module).values():
                    for each in value if isinstance(value, tuple) else (value,):
                        if isinstance(each, torch.Tensor) and each.dim() >= STACKED_DIMENSIONS:
                            yield each


def _attribute_bytes(
    models: Iterable[torch.nn.Module], counted: Iterable[torch.UntypedStorage]
) -> int:
    """Bytes of tensors that modules keep neither as a parameter nor as a buffer."""
    tensors = [
        value
        for model in models
        for module in model.modules()
        for attribute in vars(module).values()
        for value in (attribute if isinstance(attribute, list | tuple) else (attribute,))
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    ]
    known = {storage.data_ptr() for storage in counted}
    return sum(
        storage.nbytes() for storage in _storages(tensors) if storage.data_ptr() not in known
    )


def _release_pages(storage: torch.UntypedStorage) -> None:
    """Give the pages of a storage back to the system. Read again, they are zeros.

    The address stays. madvise(2) defines MADV_DONTNEED for private anonymous memory, which is what
    malloc gives. Pages that the storage shares with others at its ends stay.
    """
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    nbytes = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if nbytes <= 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
