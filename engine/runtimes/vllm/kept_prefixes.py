"""A model's prefix cache in host memory, while its KV cache is off the device.

vLLM's block pool knows each full block of the KV cache by a hash of its tokens and of all before
them, with the LoRA, the salt and the images among them. Those blocks are copied to host
memory before the KV cache leaves, and into blocks of the empty KV cache when that is back. Their
hashes are then entered in the pool again, as of free blocks that are cached.

`note` and `register` run on the core thread, `save` and `restore` on the loading thread, while the
model takes no step. Whatever fails, the cache is cold, and no byte is kept.

Importing this module imports vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from engine.memory.host_memory import SLAB_BYTES, HostMemory, Spare, copy_bytes
from engine.units import format_size
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    HiddenStateCacheSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

log = logging.getLogger(__name__)

KEPT = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Kinds of layers whose blocks are copied as they are."""

NOT_KEPT = (HiddenStateCacheSpec, RSWASpec, SinkFullAttentionSpec, SlidingWindowMLASpec)
"""Kinds derived from those, of which it has not been looked at whether that is right."""


class CannotKeep(Exception):
    """This model's prefixes cannot be kept, with the reason in words."""


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A full block of the KV cache as the block pool knows it."""

    block_id: int
    hashes: tuple[Any, ...]
    """With the number of the KV cache group in each. The first is the block's own."""
    tokens: int | None
    """The length of the prefix that ends here."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Blocks in host memory."""

    stamp: Any
    """What the model computes them with: they are of use only to one with an equal stamp."""
    blocks: tuple[CachedBlock, ...]
    """The most recently used first."""
    slots: tuple[int, ...]
    """The place of each in the slabs."""
    counts: tuple[int, ...]
    """How many are in each slab."""
    spare: Spare


class KeptPrefixes:
    """What is kept of one loaded model."""

    def __init__(
        self,
        owner: str,
        runner: Any,
        host: HostMemory,
        limit_bytes: int,
        stamp: Any,
        *,
        caches_prefixes: bool,
    ) -> None:
        """Find out where the blocks of a model lie. `runner` is vLLM's, just loaded.

        Raises:
            CannotKeep: it has no prefix cache, or one that is not blocks of attention.

        """
        config = runner.kv_cache_config
        if not caches_prefixes or not runner.kv_caches:
            raise CannotKeep("vLLM has no prefix cache for this model")
        specs = tuple(group.kv_cache_spec for group in config.kv_cache_groups)
        for kind in {type(each) for spec in specs for each in iter_layer_specs(spec)}:
            if not issubclass(kind, KEPT) or issubclass(kind, NOT_KEPT):
                raise CannotKeep(f"the model has layers of the kind {kind.__name__}")
        self.owner = owner
        self._host = host
        self._limit_bytes = limit_bytes
        self._regions = _regions(config, runner.kv_caches[0].untyped_storage())
        self._region_bytes = [region.shape[1] for region in self._regions]
        self._block_count: int = config.num_blocks
        self._device: torch.device = self._regions[0].device
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self.stamp = (stamp, specs, tuple(self._region_bytes))
        self.kept: Kept | None = None
        self._noted: Sequence[CachedBlock] = ()
        self._restored: Sequence[tuple[CachedBlock, int]] = ()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(self._region_bytes)

    # On the core thread.

    def note(self, pool: Any) -> None:
        """Note the cached blocks of a pool that nobody uses, before they are forgotten."""
        noted: list[CachedBlock] = []
        known = set()  # two requests at once may have computed the same
        queue = pool.free_block_queue
        block = queue.fake_free_list_tail.prev_free_block
        most = self._limit_bytes // self.block_bytes
        while block is not queue.fake_free_list_head and len(noted) < most:
            if block.block_hash is not None and block.block_hash not in known:
                known.add(block.block_hash)
                more = pool.cached_block_hashes_by_block.get(block.block_id, ())
                hashes = (block.block_hash, *more)
                noted.append(CachedBlock(block.block_id, hashes, block.block_hash_num_tokens))
            block = block.prev_free_block
        self._noted = noted

    def register(self, pool: Any) -> None:
        """Enter the blocks that were restored. It must not raise: the cache may stay cold."""
        restored, self._restored = self._restored, ()
        if not restored or pool.get_num_free_blocks() != pool.num_gpu_blocks - 1:
            return
        try:
            for cached, block_id in reversed(restored):
                block = pool.blocks[block_id]
                for each in cached.hashes:
                    pool._insert_block_hash(each, block, num_tokens=cached.tokens)
                pool.free_block_queue.remove(block)
                pool.free_block_queue.append(block)
        except Exception:
            log.exception("the kept prefixes of %s are lost", self.owner)
            pool.reset_prefix_cache()

    # On the loading thread.

    def save(self) -> None:
        """Copy the noted blocks to host memory, as many as there is room for."""
        noted, self._noted = self._noted, ()
        if not noted:
            return
        self.drop()
        try:
            self.kept = self._saved(noted)
        except Exception as error:
            log.warning("the prefixes of %s are not kept: %s", self.owner, error)
        if self.kept is not None:
            size = format_size(self.kept.spare.nbytes)
            log.info("%d blocks of %s stay in %s", len(self.kept.blocks), self.owner, size)

    def restore(self) -> None:
        """Copy the blocks that are kept into the KV cache, of which all blocks are free."""
        kept, self.kept = self.kept, None
        self._restored = ()
        if kept is None:
            return
        slabs = self._host.take_spare(kept.spare)
        try:
            if slabs:  # otherwise others have the room
                count = min(len(kept.blocks), self._block_count - 1)
                # In the order of the slots, so that neighbours stay neighbours. Block 0 is vLLM's.
                ordered = sorted(range(count), key=kept.slots.__getitem__)
                targets = {index: number for number, index in enumerate(ordered, start=1)}
                pairs = [(kept.slots[index], targets[index]) for index in ordered]
                self._copy(slabs, kept.counts, pairs, to_host=False)
                self._restored = [(kept.blocks[index], targets[index]) for index in range(count)]
        except Exception:
            log.exception("the kept prefixes of %s are lost", self.owner)
        finally:
            for slab in slabs:
                self._host.free(slab)

    def drop(self) -> None:
        """Give back what is kept."""
        kept, self.kept = self.kept, None
        if kept is not None:
            give_back(kept, self._host)

    def adopt(self, kept: Kept) -> None:
        """Take what an earlier load of the model left, if that computed the same."""
        if kept.stamp == self.stamp:
            self.kept = kept
        else:
            give_back(kept, self._host)

    def _saved(self, noted: Sequence[CachedBlock]) -> Kept | None:
        slabs: list[torch.Tensor] = []
        counts: list[int] = []
        try:
            left_bytes = self._limit_bytes
            while (wanted := len(noted) - sum(counts)) > 0:
                # What others have kept stays: it may be about to come back.
                room_bytes = min(left_bytes, self._host.unused_bytes)
                count = self._fitting(wanted, room_bytes)
                if not count:
                    break
                slabs.append(self._host.allocate(count * self.block_bytes))
                counts.append(count)
                left_bytes -= slabs[-1].numel()
            blocks = tuple(noted[: sum(counts)])
            ordered = sorted(range(len(blocks)), key=lambda index: blocks[index].block_id)
            pairs = [(slot, blocks[index].block_id) for slot, index in enumerate(ordered)]
            self._copy(slabs, counts, pairs, to_host=True)
        except BaseException:
            for slab in slabs:
                self._host.free(slab)
            raise
        if not blocks:
            return None
        slots = [0] * len(blocks)
        for slot, index in enumerate(ordered):
            slots[index] = slot
        spare = self._host.make_spare(self.owner, slabs)
        return Kept(self.stamp, blocks, tuple(slots), tuple(counts), spare)

    def _fitting(self, count: int, room_bytes: int) -> int:
        """How many of `count` blocks go into one slab."""
        count = min(count, max(1, SLAB_BYTES // self.block_bytes), room_bytes // self.block_bytes)
        while count > 0 and self._host.rounded(count * self.block_bytes) > room_bytes:
            count //= 2
        return max(0, count)

    def _copy(
        self,
        slabs: Sequence[torch.Tensor],
        counts: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        *,
        to_host: bool,
    ) -> None:
        """Copy blocks by pairs of slot and block id, in the order of the slots."""
        if self._stream is None:
            for host, device in self._ranges(slabs, counts, pairs):
                copy_bytes(host, device) if to_host else copy_bytes(device, host)
            return
        torch.cuda.synchronize()  # the steps have a stream of their own
        with torch.cuda.stream(self._stream):
            for host, device in self._ranges(slabs, counts, pairs):
                if to_host:
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)
        self._stream.synchronize()

    def _ranges(
        self, slabs: Sequence[torch.Tensor], counts: Sequence[int], pairs: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of each run of blocks, in a slab and on the device.

        A slab has the blocks of the first region, then those of the second, and so on.
        """
        ends = list(accumulate(counts))
        for slot, block_id, length in _runs(pairs, ends):
            number = next(index for index, end in enumerate(ends) if slot < end)
            first = slot - (ends[number] - counts[number])
            begin = 0
            for region, nbytes in zip(self._regions, self._region_bytes, strict=True):
                at = begin + first * nbytes
                yield (
                    slabs[number][at : at + length * nbytes],
                    region[block_id : block_id + length].reshape(-1),
                )
                begin += counts[number] * nbytes


def give_back(kept: Kept, host: HostMemory) -> None:
    """Free the host memory of blocks that nobody wants any more."""
    for slab in host.take_spare(kept.spare):
        host.free(slab)


def _runs(pairs: Iterable[tuple[int, int]], ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbours as first slot, first block and length. None crosses the end of a slab."""
    run: tuple[int, int, int] | None = None
    for slot, block_id in pairs:
        if run is not None:
            follows = (slot, block_id) == (run[0] + run[2], run[1] + run[2])
            if follows and slot not in ends:
                run = (run[0], run[1], run[2] + 1)
                continue
            yield run
        run = (slot, block_id, 1)
    if run is not None:
        yield run


def _regions(config: Any, storage: torch.UntypedStorage) -> list[torch.Tensor]:
    """The KV cache as tensors of bytes, each a row for each block.

    Groups of layers lie over each other: a block belongs to one of them at a time. So the bytes of
    a block are its rows in all regions, whichever group it belongs to.

    Raises:
        CannotKeep: the regions lie in a way that this does not hold for.

    """
    raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    count = config.num_blocks
    found: dict[tuple[int, int], torch.Tensor] = {}
    for tensor in config.kv_cache_tensors:
        nbytes = tensor.block_stride
        span = count * nbytes
        if tensor.layer_stride >= span:  # each layer by itself
            start, span = tensor.offset, len(tensor.layers) * tensor.layer_stride
        else:  # a row has all layers
            start = 0
        if tensor.host_resident or start + span > raw.numel() or span % (count * nbytes):
            raise CannotKeep("its KV cache lies in an unknown way")
        for region in raw[start : start + span].view(-1, count, nbytes):
            found[region.data_ptr(), nbytes] = region
    regions = sorted(found.values(), key=torch.Tensor.data_ptr)
    for before, after in pairwise(regions):
        if before.data_ptr() + before.numel() > after.data_ptr():
            raise CannotKeep("groups of its layers have blocks of different sizes")
    return regions
