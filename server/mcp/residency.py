"""Tools that tell what is there: the models, the memory, and what a model would cost."""

from __future__ import annotations

from typing import Any

from mcp_types import CallToolResult

from server.mcp.tool import Call, Schema, Tool, as_text, result

_TOLD = (
    "id",
    "task",
    "state",
    "tier",
    "device_bytes",
    "host_bytes",
    "estimated_bytes",
    "estimated_load_s",
    "waiting",
    "pinned",
    "last_error",
    "alias_of",
    "choose",
)
_LEDGER = ("capacity_bytes", "granted_bytes", "free_bytes", "external_bytes")

_MODELS: Schema = {
    "type": "object",
    "properties": {
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "task": {"type": "string"},
                    "state": {"type": "string"},
                    "tier": {
                        "enum": ["device", "host", "disk"],
                        "description": "Where it is: loaded, parked in host memory, or not loaded.",
                    },
                },
                "required": ["id"],
            },
        }
    },
    "required": ["models"],
}
_STATUS: Schema = {
    "type": "object",
    "properties": {
        "state": {"type": "string"},
        "device": {"type": "string"},
        **{name: {"type": "integer"} for name in _LEDGER},
        "host": {"type": "object"},
        "loaded": {"type": "array", "items": {"type": "object"}},
        "queue": {"type": "array", "items": {"type": "object"}},
        "transition": {"type": ["string", "null"]},
    },
    "required": ["state", "free_bytes", "loaded", "queue"],
}
_PLAN: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "fits": {"type": "boolean"},
        "tier": {"type": "string"},
        "wanted_bytes": {"type": ["integer", "null"]},
        "free_bytes": {"type": "integer"},
        "evictions": {"type": "array", "items": {"type": "object"}},
        "move_s": {"type": ["number", "null"]},
        "eta_s": {"type": ["number", "null"]},
        "reason": {"type": "string"},
    },
    "required": ["model", "fits", "tier", "free_bytes", "evictions", "reason"],
}


async def _list(call: Call) -> CallToolResult:
    listed = (await call.get("/v1/models")).document()["data"]
    structured = {"models": [_told(each) for each in listed]}
    return result(as_text(structured), structured)


async def _status(call: Call) -> CallToolResult:
    status = (await call.get("/v1/engine")).document()
    structured = {
        "state": status["state"],
        "device": f"{status['device_kind']} {status['device_name']}".strip(),
        **{name: status["ledger"][name] for name in _LEDGER},
        "host": status["host"],
        "loaded": [_told(each) for each in status["models"] if each["state"] != "absent"],
        "queue": status["queue"],
        "transition": status["transition"],
    }
    return result(as_text(structured), structured)


async def _plan(call: Call) -> CallToolResult:
    structured = (await call.post("/v1/engine/plan", call.given())).document()
    return result(as_text(structured), structured)


def _told(model: dict[str, Any]) -> dict[str, Any]:
    return {name: model[name] for name in _TOLD if model.get(name) is not None}


RESIDENCY_TOOLS = (
    Tool(
        name="list_models",
        title="List the models",
        description=(
            "The models that this API key may use: what each is for, whether it is loaded, its"
            " bytes, and the seconds of a load."
        ),
        path="/v1/models",
        properties={},
        output=_MODELS,
        read_only=True,
        run=_list,
    ),
    Tool(
        name="engine_status",
        title="What is loaded",
        description=(
            "The device at this moment: its free bytes, the models there and in host memory, the"
            " queue, and the load or unload under way."
        ),
        path="/v1/engine",
        properties={},
        output=_STATUS,
        read_only=True,
        run=_status,
    ),
    Tool(
        name="plan_model",
        title="What a model would cost now",
        description=(
            "What a request for a model would cause now: whether it fits, which models would"
            " leave, and how many seconds it would wait. Changes nothing."
        ),
        path="/v1/engine/plan",
        properties={"model": {"type": "string", "description": "An id of list_models."}},
        required=("model",),
        output=_PLAN,
        read_only=True,
        run=_plan,
    ),
)
