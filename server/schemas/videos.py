"""OpenAI's Videos API: requests and answers, with additions of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from engine.errors import InvalidRequest
from engine.jobs.store import Job, JobState
from engine.requests import Quality, SchedulingOptions, VideoRequest
from server.image_io import Picture, Upload
from server.schemas.fields import (
    Body,
    Guidance,
    Loras,
    ModelName,
    PictureField,
    Prompt,
    Seed,
    Size,
    Steps,
)

if TYPE_CHECKING:
    from engine.jobs.queue_place import QueuePlace

MAX_SECONDS = 600.0
"""More than any video model can do. A model refuses what is too long for it."""
MAX_FPS = 120
MAX_FRAMES = int(MAX_SECONDS * MAX_FPS)

MOTION_BUCKETS = {"slow": 60, "medium": 127, "fast": 180}
"""SVD was trained with 0 to 255. 127 is the default of its pipeline."""

_CANCELLED = {"code": "cancelled", "message": "The job was cancelled."}


def _read_number(value: Any) -> Any:
    # OpenAI writes seconds as a string, in JSON too.
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise ValueError("it is a number of seconds") from error


MAX_MOTION = 255
_MOTION_RULE = f"it is one of {', '.join(MOTION_BUCKETS)}, or a number from 0 to {MAX_MOTION}"


def _read_motion(value: Any) -> Any:
    if isinstance(value, str) and value in MOTION_BUCKETS:
        return MOTION_BUCKETS[value]
    if isinstance(value, bool) or not (isinstance(value, int) or str(value).isdecimal()):
        raise ValueError(_MOTION_RULE)
    if not 0 <= int(value) <= MAX_MOTION:
        raise ValueError(_MOTION_RULE)
    return int(value)


_SECONDS_SCHEMA = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS},
        {"type": "string", "pattern": r"^\d+(\.\d+)?$", "examples": ["4"]},
    ]
}
_MOTION_SCHEMA = {
    "anyOf": [{"enum": [*MOTION_BUCKETS]}, {"type": "integer", "minimum": 0, "maximum": MAX_MOTION}]
}

Seconds: TypeAlias = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(gt=0, le=MAX_SECONDS),
    WithJsonSchema(_SECONDS_SCHEMA),
]
Motion: TypeAlias = Annotated[int, BeforeValidator(_read_motion), WithJsonSchema(_MOTION_SCHEMA)]


class VideoBody(Body):
    """`POST /v1/videos`."""

    model: ModelName
    prompt: Prompt = ""
    size: Size = None
    seconds: Seconds | None = None
    input_reference: PictureField | None = None
    """The first frame."""
    # Additions of ours:
    fps: int | None = Field(default=None, ge=1, le=MAX_FPS)
    num_frames: int | None = Field(default=None, ge=1, le=MAX_FRAMES)
    seed: Seed | None = None
    motion: Motion | None = None
    negative_prompt: Prompt | None = None
    quality: Literal["low", "medium", "high", "auto"] = "auto"
    steps: Steps | None = None
    guidance: Guidance | None = None
    loras: Loras = Field(default_factory=list)

    @field_validator("num_frames")
    @classmethod
    def _length_is_given_once(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("seconds") is not None:
            raise ValueError("give seconds or num_frames, not both")
        return value

    def uploads(self) -> list[Upload]:
        """Every picture of the request."""
        if self.input_reference is None:
            return []
        return [Upload("input_reference", self.input_reference)]

    def to_request(
        self, pictures: list[Picture], *, request_id: str, scheduling: SchedulingOptions
    ) -> VideoRequest:
        """The engine's form of it. `pictures` are the decoded `uploads()`.

        Raises:
            InvalidRequest: there is neither a prompt nor a first frame.

        """
        if not self.prompt and not pictures:
            raise InvalidRequest("Missing required parameter: 'prompt'.", param="prompt")
        width, height = self.size or (None, None)
        return VideoRequest(
            model=self.model,
            request_id=request_id,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            image=pictures[0].rgb if pictures else None,
            width=width,
            height=height,
            num_frames=self.num_frames,
            seconds=self.seconds,
            fps=self.fps,
            quality=Quality(self.quality),
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            motion=self.motion,
            loras=tuple(lora.choice() for lora in self.loras),
            scheduling=scheduling,
        )


class VideoListQuery(Body):
    """The query of `GET /v1/videos`."""

    limit: int = Field(default=20, ge=0, le=100)
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


class VideoContentQuery(Body):
    """The query of `GET /v1/videos/{id}/content`."""

    variant: Literal["video", "thumbnail"] = "video"


def video_document(job: Job, place: QueuePlace | None) -> dict[str, Any]:
    """OpenAI's video object, with additions: frames, seed, position in the queue."""
    asked = job.request
    cancelled = job.state is JobState.CANCELLED
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        # OpenAI's contract has no status for a cancelled job.
        "status": JobState.FAILED.value if cancelled else job.state.value,
        "progress": int(job.progress * 100),
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "prompt": asked["prompt"] or None,
        "size": f"{asked['width']}x{asked['height']}",
        "seconds": f"{asked['num_frames'] / asked['fps']:g}",
        "remixed_from_video_id": None,
        "error": _error(job),
        "fps": asked["fps"],
        "num_frames": asked["num_frames"],
        "seed": asked["seed"],
        "cut": asked.get("cut", []),
        "position": place and place.position,
        "eta_s": place and place.eta_s,
    }


def _error(job: Job) -> dict[str, str] | None:
    if job.state is JobState.CANCELLED:
        return _CANCELLED
    if job.error is None:
        return None
    return {"code": job.error.code, "message": job.error.message}
