"""Searches of files among the items of a turn: as a model gets them, and as clients see them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KIND = "file_search_call"
"""The type of such an item."""
FUNCTION = "file_search"
"""The type of the tool, and the name of the function that a model has in its place."""
RESULTS = "file_search_call.results"
"""What a request includes to see the passages that were found."""

ERROR = "error"
"""A field of a kept item: what the model was told of a search that failed."""

NOTHING = "No passage was found."
FAILED = "The search failed."

_MARK = re.compile(r"【(\d{1,6})】")


def mark_of(number: int) -> str:
    """What stands before a passage, and behind what rests on it."""
    return f"【{number}】"


@dataclass(slots=True)
class Searches:
    """Writes the searches of a conversation for a model, and numbers their passages through.

    The same items always give the same text, so a prefix cache and a response cache find it again.
    """

    calls: int = 0
    files: list[list[str]] = field(default_factory=list)
    """The id and the name of the file of each passage. The first has the number 1."""

    def copy(self) -> Searches:
        """Another one that goes on from here."""
        return Searches(self.calls, [*self.files])

    def for_model(self, items: Iterable[Any]) -> list[Any]:
        """The items, each search replaced by a call of the function and its output.

        A search whose passages are not there is left out: its output is not known.
        """
        found: list[Any] = []
        for item in items:
            if isinstance(item, Mapping) and item.get("type") == KIND:
                found += self._function_call(item)
            else:
                found.append(item)
        return found

    def citations(self, text: str) -> list[dict[str, Any]]:
        """A citation for each mark in the text that stands for a passage the model was given."""
        found = []
        for match in _MARK.finditer(text):
            number = int(match[1])
            if 1 <= number <= len(self.files):
                file_id, filename = self.files[number - 1]
                found.append(
                    {
                        "type": "file_citation",
                        "index": match.start(),
                        "file_id": file_id,
                        "filename": filename,
                    }
                )
        return found

    def _function_call(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        results, queries = item.get("results"), item.get("queries")
        output = item.get(ERROR) or (FAILED if item.get("status") == "failed" else None)
        if output is None:
            if not isinstance(results, list):
                return []
            output = self._passages(results)
        self.calls += 1
        # Nine letters and digits, as some templates demand.
        call_id = f"fs{self.calls:07d}"
        arguments = json.dumps({"queries": queries or []}, ensure_ascii=False)
        call = {
            "type": "function_call",
            "call_id": call_id,
            "name": FUNCTION,
            "arguments": arguments,
            "status": "completed",
        }
        return [call, {"type": "function_call_output", "call_id": call_id, "output": str(output)}]

    def _passages(self, results: Iterable[Any]) -> str:
        texts = []
        for result in results:
            if not isinstance(result, Mapping):
                continue
            name = str(result.get("filename") or "")
            self.files.append([str(result.get("file_id") or ""), name])
            attributes = result.get("attributes")
            about = f" {json.dumps(attributes, ensure_ascii=False)}" if attributes else ""
            # A mark that a file has would stand for another passage.
            text = _MARK.sub(r"[\1]", str(result.get("text") or ""))
            texts.append(f"{mark_of(len(self.files))} {name}{about}\n{text}")
        return "\n\n".join(texts) or NOTHING


def shown(item: Any, *, with_results: bool) -> Any:
    """An item as its client sees it. The passages are there only if they were asked for."""
    if not isinstance(item, Mapping) or item.get("type") != KIND:
        return item
    results = item.get("results") if with_results else None
    return {**{name: each for name, each in item.items() if name != ERROR}, "results": results}


def shown_output(document: Mapping[str, Any], *, with_results: bool) -> dict[str, Any]:
    """A document of a response as its client sees it."""
    output = document.get("output")
    items = output if isinstance(output, list) else []
    return {**document, "output": [shown(item, with_results=with_results) for item in items]}
