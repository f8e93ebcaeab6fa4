"""The fields of a request that some pipelines have no argument for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from engine.errors import InvalidRequest

ARGUMENTS: Mapping[str, frozenset[str]] = {
    "negative_prompt": frozenset({"negative_prompt"}),
    "guidance": frozenset({"guidance_scale", "max_guidance_scale"}),
    "steps": frozenset({"num_inference_steps"}),
    "strength": frozenset({"strength"}),
    "motion": frozenset({"motion_bucket_id"}),
}
"""The pipelines' arguments for a field."""

OF_VARIANTS = frozenset({"strength"})
"""Fields for another pipeline of the same parts, which an edit takes."""


def asked_fields(request: Any) -> frozenset[str]:
    """Those of the fields that the client set."""
    return frozenset(name for name in ARGUMENTS if getattr(request, name, None) is not None)


def check_arguments(asked: Collection[str], accepted: Collection[str]) -> None:
    """Refuse a field that a pipeline, whose arguments are `accepted`, has no argument for.

    Raises:
        InvalidRequest: naming the field.

    """
    for field in sorted(asked):
        if ARGUMENTS[field].isdisjoint(accepted):
            raise InvalidRequest(
                f"This model has no setting for {field.replace('_', ' ')}.", param=field
            )


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call.

    Reading a signature takes a quarter of a millisecond, and a run asks several times.
    """
    return _parameters(type(pipe).__call__)


@cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def class_arguments(pipeline_class: str) -> Collection[str] | None:
    """The arguments of a class of diffusers; None if the class or the library is not known yet.

    The library imports the class now, which the model's load would do.
    """
    kind = getattr(sys.modules.get("diffusers"), pipeline_class, None) if pipeline_class else None
    return _parameters(kind.__call__).keys() if isinstance(kind, type) else None
