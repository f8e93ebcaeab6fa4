"""The patches that let vLLM run several engines in one process.

Importing this module imports vLLM.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import vllm.config.vllm as vllm_config_module
import vllm.v1.engine.core as vllm_core_module
from engine.process.gate import GATE
from engine.runtimes.common.late_imports import replaced
from engine.runtimes.vllm import adapter_ops, loader  # noqa: F401 - registers the load format
from engine.runtimes.vllm.answers import answer_messages, write_chunks_unchecked
from engine.runtimes.vllm.executor import GatedWorker
from engine.runtimes.vllm.forced_calls import bind_forced_calls
from engine.runtimes.vllm.masked_models import register_masked_models
from engine.runtimes.vllm.media_memory import keep_inputs_once
from engine.runtimes.vllm.output_collector import keep_outputs_apart
from engine.runtimes.vllm.park import note_packed_layers
from engine.runtimes.vllm.request_state import pace_streams
from engine.runtimes.vllm.structured_output import prepare_structured_output
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.scale_out import factories as scale_out_factories
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.models import registry as model_registry
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher
from vllm.utils import cpu_resource_utils
from vllm.v1.executor import uniproc_executor
from vllm.v1.worker import gpu_model_runner, workspace


def patch_vllm() -> None:
    """Make vLLM safe for several engines in one process. Call once, before the first engine.

    Each line answers a hazard that was found by running into it.
    """
    # Closing one engine tore down the parallel groups of all engines.
    vllm_core_module.cleanup_dist_env_and_memory = _leave_alone
    # Every new engine froze the heap with the garbage of the others in it.
    vllm_core_module.freeze_gc_heap = _leave_alone
    # An engine held up every stream while it was constructed, rearranged its layers or zeroed its
    # KV cache.
    uniproc_executor.WorkerWrapperBase = GatedWorker
    loader_utils.device_loading_context = _breathing(loader_utils.device_loading_context)
    gpu_model_runner.allocate_kv_cache = _yielding(gpu_model_runner.allocate_kv_cache)
    # The first load of an architecture imported vLLM again in a child process, only to look at the
    # class (10 s).
    model_registry._run_in_subprocess = _run_here
    # Every load read the metadata of all installed packages twice, and called `lscpu` twice. It
    # compiled each chat template twice more only to try it. It built the objects of routes that
    # are not served here. Together that took 0.1 s.
    entry_points: Any = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points = entry_points
    cpu_resource_utils._get_cpu_list = functools.cache(cpu_resource_utils._get_cpu_list)
    AnthropicServingMessages._detect_merge_inline_system = staticmethod(
        functools.cache(AnthropicServingMessages._detect_merge_inline_system)
    )
    scale_out_factories.init_scale_out_state = _leave_alone
    keep_inputs_once()
    note_packed_layers()
    pace_streams()
    keep_outputs_apart()
    bind_forced_calls()
    answer_messages()
    write_chunks_unchecked()
    prepare_structured_output()
    register_masked_models()
    GATE.state.register(
        "vllm.workspace",
        lambda: workspace._manager,
        lambda manager: setattr(workspace, "_manager", manager),
    )
    GATE.state.register(
        "vllm.current_config",
        lambda: vllm_config_module._current_vllm_config,
        lambda config: setattr(vllm_config_module, "_current_vllm_config", config),
    )
    adapter_ops.multiply_by_group()
    # Every engine wrapped the CPU kernels once more (0.2 s and one more call layer each time).
    dispatcher._rebind_kernels = _among_own_modules(dispatcher._rebind_kernels)
    platform = type(current_platform)
    register = getattr(platform, "register_triton_kernel_overrides", None)
    if register is not None:
        platform.register_triton_kernel_overrides = _once(register)


def _leave_alone(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for what vLLM does to a process that it has for itself."""


def _run_here(function: Callable[[], Any]) -> Any:
    return function()


def _yielding(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with GATE.yielded():
            return function(*args, **kwargs)

    return wrapper


def _breathing(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        GATE.breathe()
        return function(*args, **kwargs)

    return wrapper


def _among_own_modules(rebind: Callable[..., None]) -> Callable[..., None]:
    """Look for vLLM's kernels in its own modules. The others are ten times as many (0.3 s)."""

    def wrapper(*args: Any) -> None:
        own = {name: each for name, each in sys.modules.items() if name.split(".")[0] == "vllm"}
        with replaced(dispatcher, sys=SimpleNamespace(modules=own)):
            rebind(*args)

    return wrapper


def _once(function: Callable[..., None]) -> Any:
    done = False

    def wrapper(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        if not done:
            # The search looks at every name of every module. Some names are deprecated, and warn.
            # llvmlite's library object has a function for every name, which breaks the search.
            hidden = {name: sys.modules[name] for name in sys.modules if "llvmlite" in name}
            for name in hidden:
                del sys.modules[name]
            try:
                with warnings.catch_warnings(action="ignore"):
                    function(*args, **kwargs)
            finally:
                sys.modules.update(hidden)
            done = True

    return staticmethod(wrapper)
