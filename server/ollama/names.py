"""Names of models as Ollama writes them: a name without a tag means the tag `latest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest, ModelNotFound
from engine.words import echoed

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.engine import Engine

LATEST = ":latest"


def own_name(engine: Engine, name: Any) -> Any:
    """The engine's own name for what a client calls `name`; unchanged if there is none."""
    if not isinstance(name, str) or is_known(engine, name):
        return name
    other = name.removesuffix(LATEST) if name.endswith(LATEST) else name + LATEST
    return other if is_known(engine, other) else name


def is_known(engine: Engine, name: str) -> bool:
    """Whether a model or a route has that name."""
    if name in engine.router:
        return True
    try:
        engine.config.find(name)
    except ModelNotFound:
        return False
    return True


def check_known(engine: Engine, name: str) -> None:
    """Return if a model or a route has that name.

    Raises:
        ModelNotFound: in the words that programs look for.

    """
    if not is_known(engine, name):
        raise not_found(name)


def find_model(engine: Engine, name: str) -> ModelConfig:
    """The model of that name.

    Raises:
        ModelNotFound: there is none.
        InvalidRequest: it is a route, or a LoRA of a model, whose files are not to be touched.

    """
    check_known(engine, name)
    if name in engine.router:
        models = ", ".join(repr(model.id) for model in engine.router.models(name))
        raise InvalidRequest(f"{name!r} is a route, without files. It has {models}.", param="model")
    model, adapter = engine.config.find_adapter(name)
    if adapter is not None:
        raise InvalidRequest(
            f"{name!r} is a LoRA of {model.id!r}; /v1/engine/loras is for those.", param="model"
        )
    return model


def not_found(name: str) -> ModelNotFound:
    """The error for a name that nothing has."""
    return ModelNotFound(f"model {echoed(name)} not found", param="model")
