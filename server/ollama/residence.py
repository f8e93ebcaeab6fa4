"""Requests without a prompt: they load a model, or with `keep_alive: 0` unload it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.requests import TextOperation, TextRequest
from server.ollama.translation import Sender

if TYPE_CHECKING:
    from engine.engine import Engine

LOAD = "load"
UNLOAD = "unload"

_QUESTION = [{"role": "user", "content": "Hello"}]
"""What a route is asked, to learn which model it would choose."""


async def bring(engine: Engine, name: str, sender: Sender) -> str:
    """Load a model or the choice of a route, or unload it; returns which.

    Raises:
        EngineError: it cannot be loaded, or not be unloaded now.

    """
    if name in engine.router:
        body = {"model": name, "messages": _QUESTION}
        request = TextRequest(name, TextOperation.CHAT, body, sender.request_id, sender.scheduling)
        name = (await engine.resolve(request)).model
    if sender.scheduling.keep_alive_s == 0:
        # Not a request with that value: it would hold for all later ones.
        await engine.unload(name)
        return UNLOAD
    await engine.load(name, sender.scheduling)
    return LOAD
