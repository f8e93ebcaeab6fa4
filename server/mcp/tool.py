"""A tool of the MCP endpoint, and one call of it."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from mcp_types import CallToolResult, TextContent, ToolAnnotations
from mcp_types import Tool as WireTool
from starlette.requests import Request

from engine.scheduling.waiting import Stage, WaitStatus
from engine.status import EngineStatus, ModelState
from server.answer import wait_words
from server.json_schema import SchemaGenerator
from server.keys.access import Access, access_of
from server.mcp.inner_request import Answer, InnerRequest
from server.schemas.fields import Body

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.media.outputs import Outputs

Schema: TypeAlias = dict[str, Any]
Report: TypeAlias = Callable[[float, float | None, str], Awaitable[None]]
"""Tells the client the seconds so far, the seconds in all if known, and what is being done."""

PROGRESS_INTERVAL_S = 1.0
HEARTBEAT_S = 5.0
"""The longest silence: clients give up a tool that says nothing."""

_MOVING = {ModelState.LOADING: Stage.LOADING, ModelState.WAKING: Stage.WAKING}


class ToolFailure(Exception):
    """What the caller of a tool is told instead of a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool. It runs through an endpoint, `path`, whose scope it has."""

    name: str
    title: str
    description: str
    path: str
    properties: Mapping[str, Schema]
    run: Callable[[Call], Awaitable[CallToolResult]]
    required: tuple[str, ...] = ()
    output: Schema | None = None
    task: str | None = None
    """What its models are for: without one it is not there. None: it needs none."""
    takes_model: bool = False
    """Whether it has an argument for the model of that task."""
    beside: str | None = None
    """The task of a model that its endpoint uses by itself, whatever the key may use."""
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False

    def described(self, models: tuple[str, ...]) -> WireTool:
        """It as clients see it. `models` are those that the caller may name."""
        properties = dict(self.properties)
        if self.takes_model:
            text = "The model. By default one that is loaded, otherwise the first."
            properties["model"] = {"type": "string", "enum": [*models], "description": text}
        return WireTool(
            name=self.name,
            title=self.title,
            description=self.description,
            input_schema={
                "type": "object",
                "properties": properties,
                "required": [*self.required],
                "additionalProperties": False,
            },
            output_schema=self.output,
            annotations=ToolAnnotations(
                title=self.title,
                read_only_hint=self.read_only,
                destructive_hint=self.destructive,
                idempotent_hint=self.idempotent or self.read_only,
                open_world_hint=False,
            ),
        )

    def models(self, engine: Engine, access: Access) -> tuple[str, ...]:
        """The models and routes for its task that the key may use."""
        of_task = [model.id for model in engine.config.models if model.task == self.task]
        routes = [route.id for route in engine.config.routes if set(route.choose) & set(of_task)]
        return tuple(name for name in (*of_task, *routes) if access.may_use(name))

    def refusal(self, engine: Engine, access: Access) -> str | None:
        """Why the key may not use it, or None."""
        if not access.may_call(self.path):
            return f"This API key may not use {self.path}, and so not the tool {self.name}."
        if self.task is not None and not self.models(engine, access):
            return f"There is no model for the tool {self.name} that this API key may use."
        if self.beside is not None and not any(
            model.task == self.beside for model in engine.config.models
        ):
            return f"The tool {self.name} needs a model with the task {self.beside}."
        return None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    tool: Tool
    arguments: Mapping[str, Any]
    request: Request
    """The HTTP request that brought it."""
    engine: Engine
    outputs: Outputs
    files_url: str
    """What the URL of a kept file begins with."""
    videos_url: str
    """The same for videos."""
    report: Report
    began_s: float = field(default_factory=time.monotonic)

    def given(self, *left_out: str) -> dict[str, Any]:
        """The arguments for the endpoint, with a model, without those of the tool itself."""
        kept = {
            name: value
            for name, value in self.arguments.items()
            if value is not None and name not in left_out
        }
        if self.tool.takes_model:
            kept.setdefault("model", self._default_model())
        return kept

    def _default_model(self) -> str:
        names = self.tool.models(self.engine, access_of(self.request))
        # A provider's model is always there, and maybe costs: it is no reason to prefer it.
        configured = [
            name
            for name in names
            if name not in self.engine.router and self.engine.config.find(name).runtime != "remote"
        ]
        there = (name for name in configured if self.engine.model_status(name).tier == "device")
        return next(there, names[0])

    async def post(self, path: str, document: Mapping[str, Any]) -> Answer:
        """The answer to a JSON document.

        Raises:
            ToolFailure: the endpoint refused it, or failed.

        """
        return await self.send("POST", path, json.dumps(document).encode())

    async def get(self, path: str, query: str = "") -> Answer:
        """The answer to a GET.

        Raises:
            ToolFailure: the endpoint refused it, or failed.

        """
        return await self.send("GET", path, query=query)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        content_type: str = "application/json",
        query: str = "",
    ) -> Answer:
        """The answer of an endpoint. Until it is there, the client is told how things stand.

        Raises:
            ToolFailure: the endpoint refused it, or failed.

        """
        inner = InnerRequest(self.request, method, path, query, body, content_type)
        task = inner.start()
        try:
            await self._wait(task, inner.request_id)
        finally:
            inner.leave()  # ended or not: nobody waits for it any more
        answer = task.result()
        if answer.status >= 400:
            raise ToolFailure(_advice(answer))
        if not answer.complete:
            raise ToolFailure("It failed half-way; the log of the server says why. Try again.")
        return answer

    async def _wait(self, task: asyncio.Task[Answer], request_id: str) -> None:
        said, said_at = "", self.began_s
        while True:
            await asyncio.wait((task,), timeout=PROGRESS_INTERVAL_S)
            if task.done():
                return
            now = time.monotonic()
            words, eta_s = standing(self.engine.status(), request_id)
            if words != said or now - said_at >= HEARTBEAT_S:
                said, said_at = words, now
                elapsed_s = now - self.began_s
                await self.report(elapsed_s, None if eta_s is None else elapsed_s + eta_s, words)


def standing(status: EngineStatus, request_id: str) -> tuple[str, float | None]:
    """Where a request stands, in words, and the seconds until it runs."""
    ticket = next((each for each in status.queue if each.request_id == request_id), None)
    if ticket is None:
        return "running", None
    state = next((model.state for model in status.models if model.id == ticket.model), None)
    stage = Stage.QUEUED if state is None else _MOVING.get(state, Stage.QUEUED)
    return wait_words(WaitStatus(stage, ticket.position, ticket.eta_s), ticket.model), ticket.eta_s


def result(text: str, structured: Any = None, *others: Any) -> CallToolResult:
    """A result with a text at its end, and other contents before it."""
    content = [*others, TextContent(text=text)]
    return CallToolResult(content=content, structured_content=structured)


def as_text(document: Any) -> str:
    """A document as text, for clients that read no structured content."""
    return json.dumps(document, ensure_ascii=False)


def fields_of(body: type[Body], **descriptions: str) -> dict[str, Schema]:
    """The schemas of these fields of an endpoint, each with a description of ours."""
    schema = body.model_json_schema(schema_generator=SchemaGenerator)["properties"]
    return {name: _field(schema[name], text) for name, text in descriptions.items()}


def _field(schema: Schema, description: str) -> Schema:
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    kept = {key: value for key, value in schema.items() if key != "anyOf"}
    if len(kinds) == 1:
        kept |= kinds[0]
    elif kinds:
        kept["anyOf"] = kinds
    if kept.get("default", ...) is None:
        del kept["default"]
    return {**kept, "description": description}


def _advice(answer: Answer) -> str:
    """What went wrong, and what can be done."""
    error = answer.error
    text = str(error.get("message", ""))
    param = error.get("param")
    if param and str(param) not in text:
        text = f"{param}: {text}"
    code = error.get("code")
    words = f"{text} ({answer.status}, {code})" if code else f"{text} ({answer.status})"
    wait_s = answer.headers.get("retry-after")
    if wait_s is not None and wait_s.isdecimal():
        return f"{words} Try again in {math.ceil(float(wait_s))} seconds."
    if answer.status in (403, 404):
        return f"{words} The tool list_models says what there is."
    return words
