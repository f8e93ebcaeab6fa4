"""The process-wide variables of torch and NumPy, as a part of the shared state."""

from __future__ import annotations

from typing import Any

from engine.process.gate import GATE, Gate


def share_torch_state(gate: Gate = GATE) -> None:
    """Register the process-wide variables of torch and NumPy. Call it once torch is imported.

    From then on the gate breathes at every submodule that is added to a module.
    """
    if "torch.rng" in gate.state:
        return
    import numpy
    import torch
    from torch.nn.modules.module import register_module_module_registration_hook

    def breathe(*_module_name_submodule: Any) -> None:
        # A compiler holds its lock while it traces: a step that compiles would wait for it.
        if torch._guards.TracingContext.try_get() is None:
            gate.breathe()

    register_module_module_registration_hook(breathe)

    gate.state.register("torch.default_dtype", torch.get_default_dtype, torch.set_default_dtype)
    gate.state.register("torch.rng", torch.get_rng_state, torch.set_rng_state)
    # vLLM's CPU worker replaces the function by one that only warns.
    set_num_threads = torch.set_num_threads

    def put_num_threads(number: int) -> None:
        # The value is the calling thread's, but setting it also sets the default of new threads.
        if torch.get_num_threads() != number:
            set_num_threads(number)

    gate.state.register("torch.num_threads", torch.get_num_threads, put_num_threads)
    gate.state.register(
        "torch.set_num_threads",
        lambda: set_num_threads,
        lambda function: setattr(torch, "set_num_threads", function),
    )
    gate.state.register("numpy.random", numpy.random.get_state, numpy.random.set_state)
    if torch.cuda.is_available():
        gate.state.register(
            "torch.cuda.rng", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
        )
