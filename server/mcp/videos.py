"""Tools for videos, which are jobs: start one, ask for it, cancel it."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import quote

from mcp_types import CallToolResult, ContentBlock

from server.mcp.media import MAX_INLINE_BYTES, link_to, shown_image
from server.mcp.tool import HEARTBEAT_S, Call, Schema, Tool, ToolFailure, as_text, fields_of, result
from server.schemas.videos import VideoBody

MAX_WAIT_S = 600
_LOOK_S = 1.0
_ENDED = ("completed", "failed")

_OUTPUT: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
        "progress": {"type": "integer", "description": "Percent."},
        "position": {"type": ["integer", "null"], "description": "In the queue; 1 is next."},
        "eta_s": {"type": ["number", "null"]},
    },
    "required": ["id", "status", "progress"],
}
_ID: Schema = {"type": "string", "minLength": 1, "description": "The id that start_video gave."}


async def _start(call: Call) -> CallToolResult:
    document = (await call.post("/v1/videos", call.given())).document()
    text = f"{as_text(document)}\nAsk get_video for it, with this id."
    return result(text, document)


async def _get(call: Call) -> CallToolResult:
    path = _path(call)
    wait_s = call.arguments.get("wait_seconds") or 0
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float):
        raise ToolFailure("wait_seconds: it is a number of seconds.")
    until = call.began_s + min(max(0.0, wait_s), MAX_WAIT_S)
    document = (await call.get(path)).document()
    told_at, told = 0.0, None
    while document["status"] not in _ENDED and (now := time.monotonic()) < until:
        if (standing := _standing(document)) != told or now - told_at >= HEARTBEAT_S:
            told_at, told = now, standing
            await call.report(now - call.began_s, None, standing)
        await asyncio.sleep(min(_LOOK_S, until - now))
        document = (await call.get(path)).document()
    return result(as_text(document), document, *await _contents(call, document))


async def _cancel(call: Call) -> CallToolResult:
    document = (await call.post(f"{_path(call)}/cancel", {})).document()
    return result(as_text(document), document)


def _path(call: Call) -> str:
    video_id = call.arguments.get("id")
    if not isinstance(video_id, str) or not video_id:
        raise ToolFailure("id: it is the id of a video, as start_video gave it.")
    return f"/v1/videos/{quote(video_id, safe='')}"


def _standing(document: dict[str, Any]) -> str:
    words = f"{document['status']} {document['progress']}%"
    return words if document["position"] is None else f"{words} position={document['position']}"


async def _contents(call: Call, document: dict[str, Any]) -> list[ContentBlock]:
    if document["status"] != "completed":
        return []
    video_id = document["id"]
    url = f"{call.videos_url}{video_id}/content"
    link = link_to(url, "Video").model_copy(
        update={"name": f"{video_id}.mp4", "mime_type": "video/mp4"}
    )
    thumbnail = await call.get(f"/v1/videos/{video_id}/content", "variant=thumbnail")
    shown = await asyncio.to_thread(shown_image, thumbnail.body, MAX_INLINE_BYTES)
    return [shown, link]


VIDEO_TOOLS = (
    Tool(
        name="start_video",
        title="Start a video",
        description=(
            "Start to make a video from a text. It takes minutes, as a job that goes on by itself."
            " Returns the id of the job; get_video tells its state and has the video."
        ),
        path="/v1/videos",
        task="video",
        takes_model=True,
        properties=fields_of(
            VideoBody,
            prompt="What the video shows.",
            size="WIDTHxHEIGHT in pixels, or auto.",
            seconds="How long the video is.",
            fps="Frames per second.",
            input_reference="The first frame, as base64 or a data: URL.",
            quality="Low is the fastest.",
            negative_prompt="What the video should not show.",
            seed="The same seed and prompt give the same video.",
            steps="Denoising steps. By default those of the quality.",
            guidance="How closely the prompt is followed.",
        ),
        required=("prompt",),
        output=_OUTPUT,
        run=_start,
    ),
    Tool(
        name="get_video",
        title="The state of a video",
        description=(
            "The state of a video job. Of a finished one also a thumbnail, and a link to the file,"
            " which needs the API key."
        ),
        path="/v1/videos/",
        task="video",
        properties={
            "id": _ID,
            "wait_seconds": {
                "type": "number",
                "minimum": 0,
                "maximum": MAX_WAIT_S,
                "default": 0,
                "description": "Wait for its end, so many seconds at most.",
            },
        },
        required=("id",),
        output=_OUTPUT,
        read_only=True,
        run=_get,
    ),
    Tool(
        name="cancel_video",
        title="Cancel a video",
        description="Cancel a video job that waits or runs.",
        path="/v1/videos/",
        task="video",
        properties={"id": _ID},
        required=("id",),
        output=_OUTPUT,
        destructive=True,
        idempotent=True,
        run=_cancel,
    ),
)
