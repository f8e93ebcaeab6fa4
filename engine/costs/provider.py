"""Whose model it is: a provider's, or this machine's."""

from __future__ import annotations

from engine.config import ModelConfig

REMOTE = "remote"
"""The runtime of models that a provider runs."""

LOCAL = ""
"""The provider of models that run here."""


def provider_of(model: ModelConfig) -> str:
    """The provider of a remote model; `LOCAL` of all others."""
    if model.runtime != REMOTE:
        return LOCAL
    return str(model.options.get("provider") or model.id)
