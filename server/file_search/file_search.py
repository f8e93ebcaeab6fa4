"""The tool `file_search` of all requests: what is checked before a turn, and how it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.requests import TextRequest
from server.file_search.rounds import Ask, Rounds
from server.file_search.searcher import Searcher
from server.file_search.tool import HostedTools
from server.keys.access import Access
from server.responses.exchange import Answer
from server.responses.turn import Turn
from server.vector_stores.stores import VectorStores


class FileSearch:
    """Answers requests that have the tool."""

    def __init__(self, stores: VectorStores) -> None:
        self._stores = stores

    async def check(self, body: Mapping[str, Any], access: Access) -> HostedTools | None:
        """The tools of a request, whose stores the caller may search; None if it has none.

        Raises:
            EngineError: naming the wrong field, or the store that is not there.

        """
        hosted = HostedTools.of(body)
        if hosted is not None:
            await Searcher(self._stores, access).check(hosted)
        return hosted

    def answer(self, turn: Turn, request: TextRequest, ask: Ask, access: Access | None) -> Answer:
        """The answer of a model to a turn, in as many rounds as it needs.

        Without `access` the key of the turn is gone, and no search succeeds.
        """
        hosted = HostedTools.of_turn(turn)
        if hosted is None:
            return ask(request)
        searcher = None if access is None else Searcher(self._stores, access)
        # Each run of a job begins anew.
        return lambda send: Rounds(turn, request, ask, hosted, searcher).answer(send)
