"""vLLM's in-process executor and worker, with everything but a step behind the gate.

Importing this module imports vLLM.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.process.gate import GATE
from vllm.distributed import parallel_state
from vllm.model_executor.layers import rotary_embedding
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker import workspace
from vllm.v1.worker.worker_base import WorkerWrapperBase

STEP_METHODS = frozenset(
    {"execute_model", "sample_tokens", "take_draft_token_ids", "execute_dummy_batch"}
)
"""Worker methods that belong to a step. Every other method may change process-wide state."""


class GatedWorker(WorkerWrapperBase):  # type: ignore[misc]
    """vLLM's worker. Each stage of its construction is behind the gate; steps go in between."""

    def init_worker(self, all_kwargs: Any) -> None:
        """Construct the worker."""
        with GATE.exclusive():
            super().init_worker(all_kwargs)

    def init_device(self) -> None:
        """Join the process-wide parallel groups and construct the model runner."""
        with GATE.exclusive():
            super().init_device()
            _join_expert_group()
            # One variable of the process for the scratch memory of each engine's kernels.
            self.workspaces = workspace._manager

    def load_model(self) -> None:
        """Build the module and fill it.

        vLLM shares equal rotary embeddings between all models of the process. Parking one model
        would take the buffers from the others, so the cache is cleared first.
        """
        with GATE.exclusive():
            rotary_embedding._ROPE_DICT.clear()
            # The graphs of all engines would share one pool, which ends with the last of them.
            type(current_platform)._global_graph_pool = None
            self.worker.load_model()


class GatedExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's in-process executor. Everything but a step is behind the gate."""

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the worker. The call is exclusive unless it is part of a step."""
        if method in STEP_METHODS:
            workspace._manager = self.driver_worker.workspaces
            return super().collective_rpc(method, *args, **kwargs)
        with GATE.exclusive():
            workspace._manager = getattr(self.driver_worker, "workspaces", None)
            return super().collective_rpc(method, *args, **kwargs)

    def shutdown(self) -> None:
        """Give back the worker's memory."""
        with GATE.exclusive():
            super().shutdown()


def _join_expert_group() -> None:
    """Join the parallel group that a mixture of experts asks for, if it is not there yet.

    Only the first engine of a process makes groups, and it makes this one only for a model of its
    own kind. After a dense model, a mixture of experts could not be loaded.
    """
    if parallel_state._EP is None:
        world = parallel_state.get_world_group()
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [world.ranks],
            world.local_rank,
            torch.distributed.get_backend(world.device_group),
            group_name="ep",
        )
