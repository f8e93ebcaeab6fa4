"""The tool `file_search` of a request: its fields, and the function that a model has instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.errors import InvalidRequest
from server.forms import Fields
from server.responses.file_searches import FUNCTION, RESULTS, mark_of
from server.responses.turn import Turn
from server.schemas.fields import Body
from server.schemas.vector_stores import MAX_QUERIES, RankingOptions
from server.vector_stores.filters import parse_filter
from server.vector_stores.stores import Search

MAX_STORES = 16
"""Vector stores of one tool."""
MAX_TOOLS = 4
"""Tools `file_search` of one request."""

FUNCTION_TOOL: Mapping[str, Any] = {
    "type": "function",
    "name": FUNCTION,
    "description": (
        "Finds passages in the user's files by meaning. Call it before you answer what the files"
        " may say. Each passage begins with its mark, such as"
        f" {mark_of(1)}. Where your answer rests on a passage, write its mark right behind it."
    ),
    "parameters": {
        "type": "object",
        "properties": {
            "queries": {
                "type": "array",
                "items": {"type": "string"},
                "description": "What to look for: questions or statements, each of them complete.",
            }
        },
        "required": ["queries"],
        "additionalProperties": False,
    },
    "strict": False,
}


class FileSearchTool(Body):
    """One tool `file_search`."""

    type: Literal["file_search"]
    vector_store_ids: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        min_length=1, max_length=MAX_STORES
    )
    max_num_results: int = Field(default=10, ge=1, le=50)
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions = RankingOptions()


@dataclass(frozen=True, slots=True)
class StoreSearch:
    """What one tool searches, and how. `search` has no queries."""

    index: int
    """Of the tool."""
    stores: tuple[str, ...]
    search: Search


@dataclass(frozen=True, slots=True)
class HostedTools:
    """The tools `file_search` of one request."""

    searches: tuple[StoreSearch, ...]
    tools: tuple[tuple[int, dict[str, Any]], ...]
    """As they came, each with its index."""
    with_results: bool
    """Whether the client gets the passages."""
    max_calls: int | None
    """The most calls of them in this response; None: the server's own bound."""

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> HostedTools | None:
        """The tools of a request; None if it has none.

        Raises:
            InvalidRequest: naming the wrong field.

        """
        given = body.get("tools")
        given = given if isinstance(given, list) else []
        tools = [
            (index, tool)
            for index, tool in enumerate(given)
            if isinstance(tool, Mapping) and tool.get("type") == FUNCTION
        ]
        if not tools:
            _check_not_chosen(body.get("tool_choice"))
            return None
        if len(tools) > MAX_TOOLS:
            param = f"tools[{tools[MAX_TOOLS][0]}]"
            raise InvalidRequest(f"{param}: at most {MAX_TOOLS} are file_search.", param=param)
        for index, tool in enumerate(given):
            if isinstance(tool, Mapping) and tool.get("name") == FUNCTION:
                param = f"tools[{index}].name"
                raise InvalidRequest(
                    f"{param}: beside the tool file_search no function has its name.", param=param
                )
        calls = body.get("max_tool_calls")
        if calls is not None and (isinstance(calls, bool) or not isinstance(calls, int)):
            raise InvalidRequest("max_tool_calls: it is a number.", param="max_tool_calls")
        if calls is not None and calls < 1:
            raise InvalidRequest("max_tool_calls: it is at least 1.", param="max_tool_calls")
        include = body.get("include")
        return cls(
            tuple(_search_of(index, tool) for index, tool in tools),
            tuple((index, dict(tool)) for index, tool in tools),
            isinstance(include, list) and RESULTS in include,
            calls,
        )

    @classmethod
    def of_turn(cls, turn: Turn) -> HostedTools | None:
        """The tools that a turn was offered with."""
        hosted = turn.hosted
        if hosted is None:
            return None
        return cls(
            tuple(_search_of(index, tool) for index, tool in hosted["tools"]),
            tuple((index, tool) for index, tool in hosted["tools"]),
            hosted["results"],
            hosted["max_calls"],
        )

    def offered(self, turn: Turn) -> Turn:
        """The turn, whose model gets a function in the place of these tools."""
        body = dict(turn.body)
        own = {index for index, _ in self.tools}
        tools = []
        for index, tool in enumerate(body["tools"]):
            if index == self.tools[0][0]:
                tools.append(dict(FUNCTION_TOOL))
            elif index not in own:
                tools.append(tool)
        choice = body.get("tool_choice")
        body["tools"] = tools
        if choice is not None:
            body["tool_choice"] = _of_model(choice)
        body.pop("max_tool_calls", None)
        echo = {**turn.echo, "tool_choice": "auto" if choice is None else choice}
        if self.max_calls is not None:
            echo["max_tool_calls"] = self.max_calls
        hosted = {
            "tools": [[index, tool] for index, tool in self.tools],
            "results": self.with_results,
            "max_calls": self.max_calls,
        }
        return replace(turn, body=body, echo=echo, hosted=hosted)


def refuse_hosted(body: Mapping[str, Any]) -> None:
    """Refuse the tool by its name, on a server that keeps no responses.

    Raises:
        InvalidRequest: the request has it.

    """
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, Mapping) and tool.get("type") == FUNCTION:
            param = f"tools[{index}].type"
            raise InvalidRequest(
                f"{param}: file_search needs responses that are kept (server.keep_responses).",
                param=param,
            )


def without_function(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body for a model that is to search no more."""
    tools = [tool for tool in body["tools"] if tool.get("name") != FUNCTION]
    if tools:
        return {**body, "tools": tools}
    gone = ("parallel_tool_calls", "tool_choice", "tools")
    return {name: value for name, value in body.items() if name not in gone}


def free_choice(choice: Any) -> Any:
    """The choice of a model that has called what it had to call."""
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return {**choice, "mode": "auto"}
    return choice if choice in (None, "none") else "auto"


def _search_of(index: int, tool: Mapping[str, Any]) -> StoreSearch:
    place = f"tools[{index}]"
    try:
        asked = FileSearchTool.of(Fields(dict(tool), typed=True))
    except InvalidRequest as error:
        # Its message names the field as that of a body.
        param = place if error.param is None else f"{place}.{error.param}"
        own = error.message.replace(f"'{error.param}'", f"'{param}'")
        raise InvalidRequest(own, param=param) from error
    filters = None if asked.filters is None else parse_filter(asked.filters, f"{place}.filters")
    options = asked.ranking_options
    search = Search(
        (), asked.max_num_results, filters, options.ranker != "none", options.score_threshold
    )
    return StoreSearch(index, tuple(asked.vector_store_ids), search)


def _of_model(choice: Any) -> Any:
    """The choice with the function in the place of the tool."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == FUNCTION:
        return {"type": "function", "name": FUNCTION}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        return {**choice, "tools": [_of_model(each) for each in choice["tools"]]}
    return choice


def _check_not_chosen(choice: Any) -> None:
    if isinstance(choice, Mapping) and choice.get("type") == FUNCTION:
        raise InvalidRequest(
            "tool_choice.type: there is no such tool in 'tools'.", param="tool_choice.type"
        )


def queries_of(arguments: Any) -> list[str]:
    """The queries of a call. `arguments` is the JSON that a model wrote, as it was read.

    Raises:
        ValueError: saying what a model should write.

    """
    queries = arguments.get("queries") if isinstance(arguments, Mapping) else None
    if isinstance(queries, str):
        queries = [queries]
    wanted = [each.strip() for each in queries or () if isinstance(each, str) and each.strip()]
    if not isinstance(queries, list) or not wanted:
        raise ValueError('The arguments are {"queries": [...]} with at least one text.')
    return wanted[:MAX_QUERIES]
