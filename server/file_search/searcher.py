"""Runs the searches that a model asks for, with the rights of the key that asked the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.file_search.tool import HostedTools
from server.keys.access import Access
from server.schemas.vector_stores import MAX_QUERY_CHARS
from server.stored_files.record import Viewer
from server.vector_stores.stores import Found, VectorStores


class Searcher:
    """The searches of one caller."""

    def __init__(self, stores: VectorStores, access: Access) -> None:
        self._stores = stores
        self._access = access
        self._viewer = Viewer(access.caller.name, sees_all=access.admin)

    async def check(self, hosted: HostedTools) -> None:
        """Return if the caller may search all stores of the tools.

        Raises:
            EngineError: naming the store that is not there, or the model that it may not use.

        """
        for tool in hosted.searches:
            for place, store in enumerate(tool.stores):
                param = f"tools[{tool.index}].vector_store_ids[{place}]"
                await self._stores.check(
                    self._viewer, self._access, store, ranks=tool.search.ranks, param=param
                )

    async def run(self, hosted: HostedTools, queries: Sequence[str]) -> list[dict[str, Any]]:
        """The best passages of all tools as OpenAI has them in the item, best first.

        Raises:
            EngineError: a store is gone, or its models cannot be used.

        """
        asked = [query[:MAX_QUERY_CHARS] for query in queries]
        best: dict[tuple[str, str], Found] = {}
        for tool in hosted.searches:
            search = replace(tool.search, queries=asked)
            found: list[Found] = []
            for store in dict.fromkeys(tool.stores):
                found += await self._stores.search(self._viewer, self._access, store, search)
            found.sort(key=_by_score)
            for each in found[: search.most]:
                best.setdefault((each.attachment.file, each.text), each)
        return [_result(each) for each in sorted(best.values(), key=_by_score)]


def _by_score(found: Found) -> float:
    return -found.score


def _result(found: Found) -> dict[str, Any]:
    attachment = found.attachment
    return {
        "file_id": attachment.file,
        "filename": attachment.filename,
        "score": found.score,
        "attributes": dict(attachment.attributes),
        "text": found.text,
    }
