"""Converts the request of a job to JSON for its record, and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from PIL.Image import Image

from engine.caller import Caller
from engine.jobs.store import Job
from engine.requests import LoraChoice, Quality, SchedulingOptions, VideoRequest

_SCHEDULING = "terms"
"""The key of the scheduling options; records of earlier versions have it as well."""
_SEPARATE = frozenset(
    {"model", "request_id", "operation", "image", "loras", "scheduling", _SCHEDULING}
)
"""Fields of a request and keys of a record that are not copied as they are."""


def to_json(request: VideoRequest) -> dict[str, Any]:
    """What `Job.request` stores of a request."""
    fields = [field.name for field in dataclasses.fields(request)]
    values = {name: getattr(request, name) for name in fields if name not in _SEPARATE}
    if values["seconds"] is None and request.num_frames and request.fps:
        values["seconds"] = request.num_frames / request.fps
    loras = [dataclasses.asdict(lora) for lora in request.loras]
    scheduling = dataclasses.asdict(request.scheduling)
    del scheduling["priority"]  # has a column of its own
    return {**values, "loras": loras, _SCHEDULING: scheduling, "image": request.image is not None}


def from_json(job: Job, image: Image | None, now: float) -> VideoRequest:
    """The request of a stored job, with what is left of its timeout; `now` in Unix seconds."""
    values = {name: value for name, value in job.request.items() if name not in _SEPARATE}
    if values["num_frames"] is not None:  # `seconds` only says the same in another way
        values["seconds"] = None
    values["quality"] = Quality(values["quality"])
    return VideoRequest(
        **values,
        model=job.model,
        request_id=job.id,
        image=image,
        loras=tuple(LoraChoice(**lora) for lora in job.request["loras"]),
        scheduling=SchedulingOptions(
            **{**_scheduling(job), "priority": job.priority, "timeout_s": left_s(job, now)}
        ),
    )


def left_s(job: Job, now: float) -> float:
    """Seconds that are left of the job's timeout, 0 at least; `now` in Unix seconds."""
    timeout_s = _scheduling(job).get("timeout_s")
    return math.inf if timeout_s is None else max(0.0, job.created_at + timeout_s - now)


def _scheduling(job: Job) -> dict[str, Any]:
    scheduling: dict[str, Any] = dict(job.request.get(_SCHEDULING, {}))  # early records have none
    if "caller" in scheduling:
        scheduling["caller"] = Caller(**scheduling["caller"])
    return scheduling
