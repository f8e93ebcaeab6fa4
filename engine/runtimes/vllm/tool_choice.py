"""What a request chooses among its tools: some by OpenAI's `allowed_tools`, or one by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.words import echoed


def narrow_to_allowed(body: dict[str, Any]) -> None:
    """Leave the allowed tools of a chat or response in place, with their mode as the choice.

    vLLM knows no such choice. The chat API nests its fields, the Responses API does not.

    Raises:
        InvalidRequest: the mode or the tools are wrong, or a tool is not among `tools`.

    """
    choice = body.get("tool_choice")
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return
    allowed, where = choice, "tool_choice"
    if isinstance(choice.get("allowed_tools"), Mapping):
        allowed, where = choice["allowed_tools"], "tool_choice.allowed_tools"
    mode, names = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise _wrong(f"{where}.mode", "it is 'auto' or 'required'")
    if not isinstance(names, list) or not names:
        raise _wrong(f"{where}.tools", "it is a list of at least one tool")
    tools = body.get("tools")
    tools = tools if isinstance(tools, list) else []
    wanted = [_identity(each) for each in names]
    known = [_identity(tool) for tool in tools]
    for index, each in enumerate(wanted):
        if each is None or each not in known:
            raise _wrong(f"{where}.tools[{index}]", "there is no such tool in 'tools'")
    body["tools"] = [tool for tool, each in zip(tools, known, strict=True) if each in wanted]
    body["tool_choice"] = mode


def check_chosen_tool(payload: Any) -> None:
    """Check that a message has the tool that it must call.

    vLLM looks the tool up only while the model runs, and forgets the choice if there are no tools.

    Raises:
        InvalidRequest: there is no such tool, or none at all.
        ValueError: vLLM's, of a block that removes or adds a tool that is not declared.

    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    choice = payload.tool_choice
    if choice is None or choice.type not in ("any", "tool"):
        return
    # Blocks of messages may add tools and remove them.
    tools = AnthropicServingMessages._resolve_tools(payload) or []
    if choice.type == "any" and not tools:
        raise _wrong("tool_choice", "there are no tools to choose from")
    if choice.type == "tool" and choice.name not in {tool.name for tool in tools}:
        raise _wrong("tool_choice.name", f"there is no tool {echoed(choice.name)} in 'tools'")


def _wrong(param: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {rule}.", param=param)


def _identity(tool: Any) -> tuple[Any, Any] | None:
    """Type and name of a tool."""
    if not isinstance(tool, Mapping):
        return None
    kind = tool.get("type", "function")
    nested = tool.get(kind) if isinstance(kind, str) else None
    return kind, (nested if isinstance(nested, Mapping) else tool).get("name")
