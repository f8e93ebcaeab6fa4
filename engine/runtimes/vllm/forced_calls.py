"""Tool calls that a request forces, by `tool_choice: required` or by the name of a function.

vLLM lets each tool parser constrain and read forced calls in its model's own format, and binds the
arguments to the tool's schema only if the tool is `strict`. Here a forced call is JSON whatever the
parser: the grammar holds the schemas of all tools, and one reader serves streams and documents.
Parsers that also render thoughts in a format of their own keep it, and bind the arguments.

Importing this module imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
)
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import DelegatingParser, Parser
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.streaming import (
    extract_named_tool_call_streaming,
    extract_required_tool_call_streaming,
)
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.tool_parsers.utils import get_function_tools, require_function_tools

NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


def forces_call(request: Any) -> bool:
    """Whether the request leaves no other answer than a tool call."""
    choice = request.tool_choice
    return bool(request.tools) and (choice == "required" or _forced_name(choice) is not None)


def _forced_name(choice: Any) -> str | None:
    if choice is None or isinstance(choice, str):
        return None
    name = getattr(getattr(choice, "function", choice), "name", None)
    return name if isinstance(name, str) else None


def call_schema(
    tools: Sequence[tuple[str, Mapping[str, Any] | None]], *, name: str | None, several: bool
) -> dict[str, Any]:
    """The JSON schema of what a forced model may write.

    Args:
        tools: names and the schemas of their parameters.
        name: the one tool to call: the text is its arguments. None: it is a list of calls.
        several: whether the list may have more than one call.

    Raises:
        KeyError: there is no tool of that name.

    """
    if name is not None:
        return dict(dict(tools)[name] or NO_PARAMETERS)
    definitions: dict[str, Any] = {}
    calls = []
    for index, (each, parameters) in enumerate(tools):
        # Tools may define different things by the same name, so each keeps its own definitions.
        place = f"tool{index}"
        definitions[place] = _moved(parameters or NO_PARAMETERS, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": each},
                    "parameters": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not several:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself as they are if it stands at `place`."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


class CompleteCalls(DelegatingParser):  # type: ignore[misc]
    """A stream never leaves the arguments of a tool without parameters empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names: dict[int, str] = {}
        """Calls of the stream, by index."""
        self._written: set[int] = set()
        """Calls that have arguments."""

    def parse_delta(
        self, delta_text: str, delta_token_ids: list[int], request: Any, *args: Any, **kwargs: Any
    ) -> DeltaMessage | None:
        """The next piece, with `{}` for each call that ends without arguments and takes none."""
        delta = super().parse_delta(delta_text, delta_token_ids, request, *args, **kwargs)
        calls = list(delta.tool_calls) if delta is not None else []
        whole: list[DeltaToolCall] = []
        for call in calls:
            if call.index not in self._names:
                whole += self._complete(request)
            function = call.function
            if function is not None:
                if function.name:
                    self._names[call.index] = function.name
                if function.arguments:
                    self._written.add(call.index)
            whole.append(call)
        if kwargs.get("finished"):
            whole += self._complete(request)
        if len(whole) > len(calls):
            delta = delta or DeltaMessage()
            delta.tool_calls = whole
        return delta

    def _complete(self, request: Any) -> list[DeltaToolCall]:
        """Arguments for the calls so far that have none and whose tool takes none."""
        parameters = dict(_tools(request))
        empty = [
            index
            for index, name in self._names.items()
            if index not in self._written
            and name in parameters
            and not (parameters[name] or {}).get("properties")
        ]
        self._written.update(empty)
        return [
            DeltaToolCall(index=index, function=DeltaFunctionCall(arguments="{}"))
            for index in empty
        ]


class StrictForcedCalls(CompleteCalls):
    """Forced calls in the parser's own format, with the arguments bound to the schema."""

    def adjust_request(self, request: Any) -> Any:
        """Constrain the answer, as if each tool were `strict` where a call is forced."""
        if forces_call(request):
            self.tool_strict_level = ToolStrictLevel.PARAMETER
        return super().adjust_request(request)


class JsonForcedCalls(CompleteCalls):
    """Forced calls as JSON. Everything else is the parser's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._text = ""
        """What a forced stream has written after its thoughts."""

    def adjust_request(self, request: Any) -> Any:
        """Constrain a forced answer to the schemas of the tools.

        Raises:
            VLLMValidationError: a call is forced, and there is no function to call.

        """
        if self._tool_parser is None or not forces_call(request):
            return super().adjust_request(request)
        if self._reasoning_parser is not None:
            request = self._reasoning_parser.adjust_request(request)
        require_function_tools(request.tools)
        schema = call_schema(
            _tools(request),
            name=_forced_name(request.tool_choice),
            several=request.parallel_tool_calls is not False,
        )
        request.structured_outputs = StructuredOutputsParams(json=schema)
        # The forced call is the answer: a format of the text has no meaning.
        if hasattr(request, "response_format"):
            request.response_format = None
        else:
            request.text = None
        return request

    def _extract_tool_calls(
        self, content: str | None, request: Any, enable_auto_tools: bool = False
    ) -> tuple[list[FunctionCall] | None, str | None]:
        if self._tool_parser is None or not forces_call(request):
            own: tuple[list[FunctionCall] | None, str | None] = super()._extract_tool_calls(
                content, request, enable_auto_tools
            )
            return own
        delta = self._read_forced(content or "", request)
        calls = [
            FunctionCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in (delta.tool_calls if delta is not None else ())
        ]
        return calls, None

    def _extract_tool_calls_streaming(
        self, *args: Any, delta_text: str, request: Any, **kwargs: Any
    ) -> tuple[DeltaMessage | None, bool]:
        if not forces_call(request):
            own: tuple[DeltaMessage | None, bool] = super()._extract_tool_calls_streaming(
                *args, delta_text=delta_text, request=request, **kwargs
            )
            return own
        delta = self._read_forced(delta_text, request)
        return delta, self._stream_state.function_name_returned

    def _read_forced(self, text: str, request: Any) -> DeltaMessage | None:
        """The calls, or the pieces of calls, that `text` adds to what was read before."""
        before, self._text = self._text, self._text + text
        if not self._text.strip():
            return None
        state = self._stream_state
        ids = {
            "tool_call_idx": state.history_tool_call_cnt,
            "tool_call_id_type": state.tool_call_id_type,
        }
        name = _forced_name(request.tool_choice)
        if name is None:
            delta, state.function_name_returned = extract_required_tool_call_streaming(
                previous_text=before, current_text=self._text, **ids
            )
            return delta
        if not text:
            return None
        delta, state.function_name_returned = extract_named_tool_call_streaming(
            delta_text=text,
            function_name=name,
            function_name_returned=state.function_name_returned,
            tokenizer=self.model_tokenizer,
            **ids,
        )
        return delta


def _tools(request: Any) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Names and parameters of the functions that the model is shown."""
    functions = [
        getattr(tool, "function", tool) for tool in get_function_tools(request.tools or [])
    ]
    return [(function.name, function.parameters) for function in functions]


def bind_forced_calls() -> None:
    """Have every parser of vLLM read forced calls so. Call once, before the first engine."""
    compose = ParserManager._compose_parser.__func__

    def composed(cls: type[ParserManager], *args: Any, **kwargs: Any) -> type[Parser] | None:
        parser: type[Parser] | None = compose(cls, *args, **kwargs)
        if parser is None or not issubclass(parser, DelegatingParser):
            return parser
        # Harmony and the like read the whole answer in a format of their own.
        plain = all(
            getattr(parser, method) is getattr(DelegatingParser, method)
            for method in ("adjust_request", "parse", "parse_delta", "_extract_tool_calls")
        )
        return type(parser.__name__, (JsonForcedCalls if plain else StrictForcedCalls, parser), {})

    ParserManager._compose_parser = classmethod(composed)
