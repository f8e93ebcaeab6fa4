"""The LoRAs of one loaded model: brought to host memory before a request, dropped when room ends.

vLLM would read a LoRA in the middle of a step, where an unreadable file ends the whole engine.
So it is read before its request, beside the steps. vLLM then only copies it into a free slot of the
batch. A LoRA in use is never dropped.

Importing this module imports vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, InsufficientCapacity, InvalidRequest, ModelNotFound, reason
from engine.files.lora_folder import PEFT_WEIGHTS
from engine.memory.host_memory import HostMemory, HostMemoryFull
from engine.runtimes.vllm.adapter_files import AdapterFiles
from engine.words import without_folders
from vllm.lora.request import LoRARequest

if TYPE_CHECKING:
    from engine.runtimes.vllm.core_client import CoreClient

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""Inode, size and modification time of the weights."""


@dataclass(slots=True, eq=False)
class Held:
    """A LoRA in host memory."""

    request: LoRARequest
    stamp: Stamp
    nbytes: int
    users: int = 0


class Adapters:
    """Belongs to one loaded model and lives on the event loop."""

    def __init__(
        self,
        model_id: str,
        client: CoreClient,
        manager: Any,
        capacity: int,
        item_bytes: int,
        find: Callable[[str], Path],
        host: HostMemory | None,
    ) -> None:
        """`manager` is vLLM's of the worker. `find` gives the checked folder of a name.

        `item_bytes` is the size of an element at run time. `host` counts what is kept.
        """
        self.requests: dict[str, Any] = {}
        """vLLM's own, by the name of the model in a request; set once it is served."""
        self._model_id = model_id
        self._client = client
        self._manager = manager
        self._capacity = capacity
        self._item_bytes = item_bytes
        self._find = find
        self._host = host
        self._held: OrderedDict[str, Held] = OrderedDict()
        """By name; the latest use comes last."""
        self._versions: dict[str, list[Stamp]] = {}
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._waiting: list[asyncio.Future[None]] = []
        """Requests that wait until one of those kept is idle."""

    @property
    def host_bytes(self) -> int:
        """Bytes of the LoRAs in host memory."""
        return sum(held.nbytes for held in self._held.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Those in host memory."""
        return tuple(self._held)

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[None]:
        """Keep a LoRA in host memory, from where vLLM takes it for a step.

        Raises:
            ModelNotFound: it has been removed.
            InvalidRequest: it does not fit the model.
            InsufficientCapacity: host memory has no room for it.

        """
        held = await self._take(name)
        try:
            yield
        finally:
            self._release(held)

    async def _take(self, name: str) -> Held:
        while True:
            # A change that a cancellation cut in half would leave vLLM and this apart.
            change = asyncio.ensure_future(self._try_to_take(name))
            try:
                held = await asyncio.shield(change)
            except asyncio.CancelledError:
                change.add_done_callback(self._undo)
                raise
            if held is not None:
                return held
            if not any(not each.users for each in self._held.values()):
                freed = asyncio.get_running_loop().create_future()
                self._waiting.append(freed)
                await freed

    async def _try_to_take(self, name: str) -> Held | None:
        """A LoRA with one more user; None if there is no room while all that are kept are used."""
        async with self._changing:
            held = self._held.get(name)
            if held is None or (not held.users and held.stamp != self._stamp(name)):
                if held is not None:
                    await self._drop(name)
                held = await self._bring(name)
            if held is not None:
                held.users += 1
                self._held.move_to_end(name)
            return held

    def _undo(self, change: asyncio.Future[Held | None]) -> None:
        if not change.cancelled() and change.exception() is None:
            held = change.result()
            if held is not None:
                self._release(held)

    def _release(self, held: Held) -> None:
        held.users -= 1
        if not held.users:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)

    async def _bring(self, name: str) -> Held | None:
        """Read a LoRA; None if all that are kept are in use."""
        stamp = self._stamp(name)
        folder = self._find(name)
        nbytes = AdapterFiles(folder).elements * self._item_bytes
        while len(self._held) >= self._capacity:
            if not await self._drop_oldest():
                return None
        while self._host is not None:
            try:
                self._host.reserve(nbytes)
                break
            except HostMemoryFull as error:
                if await self._drop_oldest():
                    continue
                if self._held:
                    return None
                raise InsufficientCapacity(f"The LoRA {name!r} has no room: {error}.") from error
        try:
            return await self._read(name, folder, stamp, nbytes)
        except BaseException:
            if self._host is not None:
                self._host.unreserve(nbytes)
            raise

    async def _read(self, name: str, folder: Path, stamp: Stamp, nbytes: int) -> Held:
        versions = self._versions.setdefault(name, [])
        if stamp not in versions:
            versions.append(stamp)
        # The prefix cache tells LoRAs apart by name and path. New weights need another path.
        path = f"{folder}{'/.' * versions.index(stamp)}"
        request = LoRARequest(f"{self._model_id}:{name}", next(self._numbers), path)
        try:
            read = await asyncio.to_thread(self._manager._load_adapter, request)
        except EngineError:
            raise
        except Exception as error:
            log.exception("%s: cannot read the LoRA %s", self._model_id, name)
            why = without_folders(reason(error))
            raise InvalidRequest(
                f"The LoRA {name!r} does not fit the model: {why}", param="model"
            ) from error
        add = self._client.call(lambda _core: self._manager._adapter_manager.add_adapter(read))
        await asyncio.wrap_future(add)
        held = self._held[name] = Held(request, stamp, nbytes)
        self.requests[request.lora_name] = request
        return held

    async def _drop_oldest(self) -> bool:
        name = next((name for name, held in self._held.items() if not held.users), None)
        if name is not None:
            await self._drop(name)
        return name is not None

    async def forget(self, name: str) -> None:
        """Drop a LoRA that nobody uses; its files are to be deleted."""
        async with self._changing:
            held = self._held.get(name)
            if held is not None and not held.users:
                await self._drop(name)

    async def _drop(self, name: str) -> None:
        held = self._held.pop(name)
        number = held.request.lora_int_id
        self.requests.pop(held.request.lora_name, None)

        def drop(core: Any) -> None:
            # vLLM aborts the request of a closed stream some turns of the event loop later.
            left = [
                each.request_id
                for each in core.scheduler.requests.values()
                if each.lora_request is not None and each.lora_request.lora_int_id == number
            ]
            if left:
                core.abort_requests(left)
            self._manager.remove_adapter(number)

        try:
            await asyncio.wrap_future(self._client.call(drop))
        finally:
            if self._host is not None:
                self._host.unreserve(held.nbytes)

    def empty_slots(self) -> None:
        """Take all LoRAs out of the batch's slots, whose memory is to leave. No step may run.

        They stay in host memory. The next step that needs one copies it again.
        """
        manager = self._manager._adapter_manager
        for number in list(manager._active_adapters):
            manager.deactivate_adapter(number)
        manager._last_mapping = None

    def close(self) -> None:
        """Count nothing any more: the engine is shut down."""
        if self._host is not None:
            self._host.unreserve(self.host_bytes)
        self._held.clear()

    def _stamp(self, name: str) -> Stamp:
        try:
            status = (self._find(name) / PEFT_WEIGHTS).stat()
        except OSError as error:
            raise ModelNotFound(
                f"The model '{self._model_id}:{name}' does not exist.", param="model"
            ) from error
        return status.st_ino, status.st_size, status.st_mtime_ns
