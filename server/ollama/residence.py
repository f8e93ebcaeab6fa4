"""Requests without a prompt: they load a model, or with `keep_alive: 0` unload it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.errors import NotLoaded
from engine.requests import TextOperation, TextRequest
from engine.status import ModelState
from server.ollama.translation import Sender

if TYPE_CHECKING:
    from engine.engine import Engine

LOAD = "load"
UNLOAD = "unload"

_QUESTION = [{"role": "user", "content": "Hello"}]
"""What a route is asked, to learn which model it would choose."""


async def bring(engine: Engine, name: str, sender: Sender) -> str:
    """Load a model or the choice of a route, or let it leave; returns which.

    A model with `keep_alive: 0` leaves as soon as nothing runs on it.

    Raises:
        EngineError: it cannot be loaded.

    """
    scheduling = sender.scheduling
    if name in engine.router:
        body = {"model": name, "messages": _QUESTION}
        request = TextRequest(name, TextOperation.CHAT, body, sender.request_id, scheduling)
        name = (await engine.resolve(request)).model
    if scheduling.keep_alive_s != 0:
        await engine.load(name, scheduling)
        return LOAD
    if engine.model_status(name).state is ModelState.ABSENT:
        return UNLOAD  # otherwise its files would be fetched first
    with suppress(NotLoaded):  # it leaves already
        await engine.load(name, replace(scheduling, if_loaded_only=True))
    return UNLOAD
