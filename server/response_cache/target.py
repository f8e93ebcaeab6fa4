"""Which models may answer a request, and whether they are what their files say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.catalog.identity import Identity, identity_of
from engine.config import EngineConfig, ModelConfig
from engine.errors import ModelNotFound
from engine.requests import ImageRequest, Request
from engine.route_config import RouteConfig
from engine.scheduling.event_log import EventLog
from engine.scheduling.scheduler_event import EventKind
from engine.status import ModelState, ModelStatus
from server.headers import SERVED_BY_HEADER, weights_header
from server.response_cache.entry import Entry

VARIANT = ":"
"""Ends the name of a route before a preference, as in `auto:best`."""


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a request names, or the models of the route that it names."""

    models: tuple[ModelConfig, ...]
    route: RouteConfig | None = None

    @classmethod
    def of(cls, config: EngineConfig, name: str) -> Target | None:
        """The target of a name; None if nothing has it."""
        routes = {route.id: route for route in config.routes}
        route = routes.get(name)
        if route is None:
            try:
                return cls((config.find(name),))
            except ModelNotFound:
                route = routes.get(name.rpartition(VARIANT)[0])
        if route is None:
            return None
        return cls(tuple(config.find(each) for each in route.choose), route)

    def identities(self, cache_dir: Path) -> tuple[Identity, ...]:
        """The identity of each model. Blocks on the disk.

        Raises:
            EngineError, OSError: see `identity_of`.

        """
        return tuple(identity_of(model, cache_dir) for model in self.models)

    def answered(self, entry: Entry) -> bool:
        """Whether one of these models gave the answer, and no fallback did."""
        served_by = entry.headers.get(SERVED_BY_HEADER)
        if served_by is not None:
            return served_by in {model.id for model in self.models}
        # A stream that reported its wait began before anybody knew.
        return self.route is None and not self.models[0].fallbacks

    def headers(self) -> dict[str, str]:
        """What an answer must say of its only model."""
        return {} if self.route is not None else weights_header(self.models[0].source)


class Loads:
    """When the loaded models began to load, from the engine's events."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._last_id = events.last_id
        self._began_at: dict[str, float] = {}

    def is_current(self, status: ModelStatus, identity: Identity, request: Request) -> bool:
        """Whether the model is absent, or was loaded from the files that are here now."""
        for model_id, at in self._news():
            self._began_at[model_id] = at
        if status.state is ModelState.ABSENT:
            return True
        if status.outdated or not identity.complete:
            return False
        if not identity.changed_at:
            return True  # it has no files
        began_at = self._began_at.get(status.id)
        if began_at is None or identity.changed_at > began_at:
            return False
        named = isinstance(request, ImageRequest) and request.loras
        # One of the same name may be attached already.
        return not named or identity.loras_changed_at <= began_at

    def _news(self) -> Iterator[tuple[str, float]]:
        page = self._events.after(self._last_id)
        self._last_id = page.last_id
        for logged in page.events:
            if logged.event.kind is EventKind.LOAD:
                yield logged.event.model, logged.at
