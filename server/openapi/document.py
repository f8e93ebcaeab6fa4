"""The OpenAPI document of all routes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic.json_schema import JsonSchemaValue
from starlette.routing import BaseRoute

from engine.config import EngineConfig
from server.auth import is_admin, is_open
from server.errors import is_anthropic, is_mcp, is_ollama
from server.json_schema import SchemaGenerator
from server.openapi.components import TEMPLATE, components
from server.openapi.operation import BINARY, JSON, Operation, Schema, nullable, reference
from server.openapi.operations import MODEL, OPERATIONS
from server.packages import installed_version
from server.router import ServedRoute
from server.schemas.fields import FILE_MARK, Body, as_list
from server.schemas.scheduling_options import SchedulingBody, SchedulingHeaders
from server.settings import ServerSettings

FORM = "multipart/form-data"
ADMIN_NOTE = "Needs an admin key."
FORM_NOTE = (
    "A form may write structure into names, as in `image[]`, `loras[][name]` and"
    " `input_reference[image_url]`."
)

DESCRIPTION = """\
One server for language, image, video, speech and transcription models on one device.

Bodies and answers are those of OpenAI, Anthropic and Ollama, with additions. An answer says in its
headers how long it waited and ran: `x-roundhouse-queue-ms`, `x-roundhouse-load-ms`,
`x-roundhouse-run-ms`, `x-roundhouse-tier` and `x-roundhouse-peak-bytes`. `x-roundhouse-cut`
names texts that were too long. `x-roundhouse-weights: random` says that the answer means nothing.
"""

_REQUEST_ID = {
    "name": "x-request-id",
    "in": "header",
    "description": "An id of the request, which the answer repeats. By default a new one.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
}


def openapi_document(
    routes: Iterable[BaseRoute], config: EngineConfig, settings: ServerSettings
) -> dict[str, Any]:
    """The document of the routes, as OpenAPI 3.1 has it.

    Raises:
        KeyError: a route is not described.

    """
    schemas = components()
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, ServedRoute) and route.include_in_schema:
            path = route.path.replace(":path}", "}")
            for method in sorted(route.methods):
                operation = OPERATIONS[path][method.lower()]
                built = _Builder(path, method, operation, schemas, config).build()
                paths.setdefault(path, {})[method.lower()] = {"tags": route.tags, **built}
    security: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Roundhouse",
            "version": installed_version("roundhouse") or "unknown",
            "description": DESCRIPTION,
        },
        "servers": [{"url": settings.public_url or settings.root_path or "/"}],
        # Without configured keys none is needed.
        "security": security if settings.has_keys else [*security, {}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": {"RequestId": _REQUEST_ID},
            "responses": {
                name: {
                    "description": "An error. Its status says what kind of error.",
                    "content": {JSON: {"schema": reference(name)}},
                }
                for name in ("Error", "AnthropicError", "OllamaError", "McpError")
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


class _Builder:
    """Builds one operation. Schemas of bodies go into `schemas`, the document's components."""

    def __init__(
        self,
        path: str,
        method: str,
        operation: Operation,
        schemas: dict[str, Any],
        config: EngineConfig,
    ) -> None:
        self._path = path
        self._method = method
        self._operation = operation
        self._schemas = schemas
        self._config = config

    def build(self) -> dict[str, Any]:
        operation = self._operation
        notes = [operation.description] if operation.description else []
        if operation.form is not None and operation.json is not None:
            notes.append(FORM_NOTE)
        if is_admin(self._method, self._path):
            notes.append(ADMIN_NOTE)
        words = self._path.replace("{", "").replace("}", "").strip("/").split("/")
        document: dict[str, Any] = {
            "operationId": "_".join([self._method.lower(), *words]).replace(".", "_"),
            "summary": operation.summary,
            "parameters": [*self._parameters(), {"$ref": "#/components/parameters/RequestId"}],
            "responses": self._responses(),
        }
        if notes:
            document["description"] = " ".join(notes)
        if operation.link is not None:
            document["externalDocs"] = {"url": operation.link}
        if is_open(self._method, self._path):
            document["security"] = []
        body = self._body()
        if body:
            document["requestBody"] = {"required": True, "content": body}
        return document

    def _parameters(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
            for part in self._path.split("/")
            if part.startswith("{")
        ]
        if self._operation.query is not None:
            found += _as_parameters(self._operation.query, "query")
        if self._operation.scheduled:
            found += _as_parameters(SchedulingHeaders, "header")
        for name, text in self._operation.headers.items():
            schema = {"type": "string"}
            found.append({"name": name, "in": "header", "description": text, "schema": schema})
        return found

    def _body(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if self._operation.json is not None:
            content[JSON] = {"schema": self._schema_of(self._operation.json, form=False)}
            if self._operation.example is not None:
                content[JSON]["example"] = self._example(self._operation.example)
        if self._operation.form is not None:
            content[FORM] = {"schema": self._schema_of(self._operation.form, form=True)}
        return content

    def _schema_of(self, kind: type[Body] | Schema, *, form: bool) -> Schema:
        if not isinstance(kind, type):
            schema = copy.deepcopy(dict(kind))
            if self._operation.scheduled:
                fields = _fields(SchedulingBody, form=form)
                schema["properties"] = {**schema["properties"], **fields}
            return schema
        name = kind.__name__.removesuffix("Body") + ("Form" if form else "Request")
        if name not in self._schemas:
            schema = _body_schema(kind, form=form)
            self._schemas |= schema.pop("$defs", {})
            if self._operation.scheduled:
                schema["properties"] |= _fields(SchedulingBody, form=form)
            self._schemas[name] = _with_files(schema, form=form)
        return reference(name)

    def _example(self, example: Mapping[str, Any]) -> dict[str, Any]:
        task = self._operation.task
        fitting = (each.id for each in self._config.models if task in (None, each.task))
        model = next(fitting, self._config.models[0].id)
        return {key: model if value == MODEL else value for key, value in example.items()}

    def _responses(self) -> dict[str, Any]:
        error = "Error"
        if is_anthropic(self._path):
            error = "AnthropicError"
        elif is_ollama(self._path):
            error = "OllamaError"
        elif is_mcp(self._path):
            error = "McpError"
        answers = {} if self._method == "HEAD" else self._operation.answers
        content = {media_type: {"schema": schema} for media_type, schema in answers.items()}
        success = {"description": self._operation.summary, "content": content}
        if not content:
            del success["content"]
        others: dict[str, Any] = {}
        for status, text in self._operation.others.items():
            others[str(status)] = {"description": text}
            if status != 204 and content:
                others[str(status)]["content"] = content
        failure: dict[str, Any] = {"$ref": f"#/components/responses/{error}"}
        if self._method == "HEAD":
            failure = {"description": "An error. Its status says what kind of error."}
        return {"200": success, **others, "default": failure}


def _one_or_many(items: Mapping[str, Any]) -> JsonSchemaValue:
    return {"anyOf": [items["items"], dict(items)]}


class _BodyGenerator(SchemaGenerator):
    parsers = MappingProxyType({**SchemaGenerator.parsers, as_list: _one_or_many})


def _body_schema(kind: type[Body], *, form: bool) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template=TEMPLATE, schema_generator=_BodyGenerator)
    for name, field in schema["properties"].items():
        notes = {key: field.pop(key) for key in ("description", "default") if key in field}
        if notes.get("default", ...) is None:
            del notes["default"]
        if form:
            inner = _not_null(field)
        else:
            # Null means the default, whatever the field takes.
            inner = field if name in schema.get("required", ()) else nullable(field)
        schema["properties"][name] = {**inner, **notes}
    return schema


def _not_null(field: Schema) -> Schema:
    """The field of a form, which cannot be null."""
    kinds = [each for each in field.get("anyOf", ()) if each != {"type": "null"}]
    if not kinds:
        return field
    return kinds[0] if len(kinds) == 1 else {**field, "anyOf": kinds}


def _fields(kind: type[Body], *, form: bool) -> dict[str, Any]:
    properties: dict[str, Any] = _body_schema(kind, form=form)["properties"]
    return properties


def _as_parameters(kind: type[Body], place: str) -> list[dict[str, Any]]:
    schema = kind.model_json_schema(schema_generator=_BodyGenerator)
    found = []
    for name, field in schema["properties"].items():
        if field.get("default", ...) is None:
            del field["default"]
        parameter = {"name": name, "in": place, "schema": field}
        if "description" in field:
            parameter["description"] = field.pop("description")
        found.append(parameter)
    return found


def _with_files(schema: Any, *, form: bool) -> Any:
    """The schema without marks of files. In a form a file is its bytes."""
    if isinstance(schema, list):
        return [_with_files(each, form=form) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if FILE_MARK not in schema:
        return {key: _with_files(value, form=form) for key, value in schema.items()}
    kept = {key: value for key, value in schema.items() if key != FILE_MARK}
    if not form:
        return kept
    bare = {key: value for key, value in kept.items() if key in ("description", "title")}
    return {**bare, **BINARY}


def document_text(
    routes: Iterable[BaseRoute], config: EngineConfig, settings: ServerSettings
) -> bytes:
    """The document as JSON."""
    return json.dumps(openapi_document(routes, config, settings), ensure_ascii=False).encode()
