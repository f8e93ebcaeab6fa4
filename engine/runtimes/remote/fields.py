"""Fields of ours that OpenAI's documents do not have: sent if the provider takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.runtimes.remote.options import RemoteOptions


def extra_fields(
    model_id: str, options: RemoteOptions, values: Mapping[str, object]
) -> dict[str, Any]:
    """Those of `values` that were given.

    Raises:
        InvalidRequest: naming one that the provider does not take.

    """
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in options.extra_fields:
            raise InvalidRequest(f"{name}: the model {model_id!r} does not take it.", param=name)
    return given
