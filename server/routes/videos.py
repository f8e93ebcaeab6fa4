"""OpenAI's Videos API. Jobs make the videos, and outlive the connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from engine.errors import ModelNotFound
from engine.requests import Priority
from server.file_answer import FileAnswer
from server.forms import query_fields, read_fields
from server.headers import weights_header
from server.image_io import decode_pictures
from server.router import Router, json_response
from server.schemas.scheduling_options import take_scheduling_options
from server.schemas.videos import VideoBody, VideoContentQuery, VideoListQuery, video_document
from server.settings import ServerSettings

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.jobs.queue import Jobs
    from engine.jobs.store import Job


def videos_router(engine: Engine, jobs: Jobs, settings: ServerSettings) -> Router:
    """`/v1/videos`: create, list, retrieve, content, delete; and cancel, an addition of ours."""
    router = Router("videos")

    def document(job: Job) -> dict[str, Any]:
        return video_document(job, jobs.place(job.id))

    def headers_of(job: Job) -> dict[str, str]:
        with suppress(ModelNotFound):  # the model may have left the configuration since
            return weights_header(engine.config.find(job.model).source)
        return {}

    @router.post("/v1/videos")
    async def create(request: Request) -> Response:
        fields = await read_fields(request, settings.max_body_bytes)
        scheduling = take_scheduling_options(request, fields, default=Priority.BATCH)
        body = VideoBody.of(fields)
        pictures = await asyncio.to_thread(
            decode_pictures, body.uploads(), settings.max_image_pixels
        )
        video_request = body.to_request(
            pictures, request_id=request.state.request_id, scheduling=scheduling
        )
        job = await jobs.submit(video_request)
        return json_response(document(job), headers_of(job))

    @router.get("/v1/videos")
    async def list_videos(request: Request) -> dict[str, Any]:
        query = VideoListQuery.of(query_fields(request))
        listed, has_more = jobs.list(limit=query.limit, after=query.after, order=query.order)
        return {
            "object": "list",
            "data": [document(job) for job in listed],
            "first_id": listed[0].id if listed else None,
            "last_id": listed[-1].id if listed else None,
            "has_more": has_more,
        }

    @router.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> Response:
        job = jobs.get(video_id)
        return json_response(document(job), headers_of(job))

    @router.route("/v1/videos/{video_id}/content", "GET", "HEAD")
    async def content(video_id: str, request: Request) -> Response:
        query = VideoContentQuery.of(query_fields(request))
        path = await asyncio.to_thread(jobs.content, video_id, query.variant)
        # `private`: a response that needed a key must not stay in a shared cache.
        headers = {"cache-control": "private", **headers_of(jobs.get(video_id))}
        return FileAnswer(path, headers=headers)

    @router.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> dict[str, Any]:
        await jobs.delete(video_id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @router.post("/v1/videos/{video_id}/cancel")
    async def cancel(video_id: str) -> dict[str, Any]:
        return document(await jobs.cancel(video_id))

    return router
