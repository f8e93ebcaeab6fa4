"""OpenAI's image requests and answers, with additions of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from PIL.Image import Image
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from engine.errors import InvalidRequest
from engine.requests import ImageOperation, ImageRequest, Quality, SchedulingOptions
from server.image_io import Picture, PictureFormat, Upload
from server.schemas.fields import (
    Body,
    Guidance,
    Loras,
    ModelName,
    PictureField,
    Prompt,
    RequiredPrompt,
    Seed,
    Size,
    Steps,
    as_list,
)

MAX_IMAGES = 10
"""Images of a request (OpenAI's limit)."""
MAX_SOURCES = 16
"""Sources of an edit (OpenAI's limit)."""

_LISTED_SIZES = frozenset({"1024x1024", "1024x1536", "1536x1024"})
"""The sizes in answers by OpenAI's contract."""

_LISTED_QUALITIES = frozenset({Quality.LOW, Quality.MEDIUM, Quality.HIGH})

_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""OpenAI's stream ends with token counts. Diffusion models have no tokens."""

URL_MODELS = frozenset({"dall-e-2", "dall-e-3"})
"""OpenAI's names whose clients expect a URL from a request that names no format."""

_DALL_E_QUALITIES = {"standard": "medium", "hd": "high"}


Sources: TypeAlias = Annotated[
    list[PictureField], BeforeValidator(as_list), Field(min_length=1, max_length=MAX_SOURCES)
]


class ImageBody(Body):
    """The fields of all three endpoints."""

    kind: ClassVar[str] = "image_generation"
    """The first word in the names of the stream's events."""
    operation: ClassVar[ImageOperation]

    model: ModelName
    prompt: Prompt = ""
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    size: Size = None
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] = "auto"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)
    response_format: Literal["b64_json", "url"] | None = None
    """By default a URL for the names of `URL_MODELS`, and base64 for all others and in streams."""
    output_format: PictureFormat = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: Literal["auto", "opaque", "transparent"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    """Without effect, as is `user`."""
    user: str = ""
    # Additions of ours:
    seed: Seed | None = None
    negative_prompt: Prompt | None = None
    steps: Steps | None = None
    guidance: Guidance | None = None
    strength: float | None = Field(default=None, gt=0, le=1)
    loras: Loras = Field(default_factory=list)
    control_image: PictureField | None = None
    reference_image: PictureField | None = None

    @field_validator("partial_images")
    @classmethod
    def _previews_are_streamed(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("stream"):
            raise ValueError("previews are events of a stream; ask for stream")
        return value

    @field_validator("response_format")
    @classmethod
    def _streams_carry_images(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == "url" and info.data.get("stream"):
            raise ValueError("the events of a stream carry the images themselves, as b64_json")
        return value

    @field_validator("output_compression")
    @classmethod
    def _png_is_lossless(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 100) and info.data.get("output_format") == "png":
            raise ValueError("PNG is lossless; this is for output_format jpeg and webp")
        return value

    @field_validator("background")
    @classmethod
    def _background_is_opaque(cls, value: str) -> str:
        if value == "transparent":
            raise ValueError("a transparent background is not supported")
        return value

    @property
    def answers_with_url(self) -> bool:
        """Whether the answer has URLs of the images in their place."""
        if self.response_format is None:
            return self.model in URL_MODELS and not self.stream
        return self.response_format == "url"

    @property
    def engine_quality(self) -> Quality:
        """The quality by the engine's names."""
        return Quality(_DALL_E_QUALITIES.get(self.quality, self.quality))

    def sources(self) -> list[Upload]:
        """The pictures to start from."""
        return []

    def uploads(self) -> list[Upload]:
        """Every picture of the request."""
        named = {"control_image": self.control_image, "reference_image": self.reference_image}
        others = [Upload(name, value) for name, value in named.items() if value is not None]
        return [*self.sources(), *others]

    def repaint_mask(self, pictures: Mapping[str, Picture]) -> Image | None:  # noqa: ARG002
        """The mask of an edit, from the decoded pictures by field."""
        return None

    def to_request(
        self, pictures: Sequence[Picture], *, request_id: str, scheduling: SchedulingOptions
    ) -> ImageRequest:
        """The engine's form of it. `pictures` are the decoded `uploads()`.

        Raises:
            InvalidRequest: the mask does not fit its image.

        """
        by_field = {
            upload.param: picture for upload, picture in zip(self.uploads(), pictures, strict=True)
        }
        sources = tuple(by_field[source.param].rgb for source in self.sources())
        control, reference = by_field.get("control_image"), by_field.get("reference_image")
        width, height = self.size or (None, None)
        operation = self.operation
        if operation is ImageOperation.GENERATION and sources:
            operation = ImageOperation.EDIT
        return ImageRequest(
            model=self.model,
            operation=operation,
            request_id=request_id,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            n=self.n,
            width=width,
            height=height,
            quality=self.engine_quality,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            images=sources,
            mask=self.repaint_mask(by_field),
            strength=self.strength,
            control_image=None if control is None else control.rgb,
            reference_image=None if reference is None else reference.rgb,
            loras=tuple(lora.choice() for lora in self.loras),
            partial_images=self.partial_images,
            scheduling=scheduling,
        )

    def document(
        self, data: list[dict[str, str]], image: Image, seed: int | None, now: int
    ) -> dict[str, Any]:
        """OpenAI's ImagesResponse and the seed of the first `image`; `now` in unix seconds."""
        document: dict[str, Any] = {
            "created": now,
            "data": data,
            "background": "opaque",
            "output_format": self.output_format,
        }
        if seed is not None:
            document["seed"] = seed
        if (size := _size_of(image)) in _LISTED_SIZES:
            document["size"] = size
        if self.engine_quality in _LISTED_QUALITIES:
            document["quality"] = self.engine_quality.value
        return document

    def partial_event(self, b64_json: str, image: Image, index: int, now: int) -> dict[str, Any]:
        """A preview of an unfinished image."""
        event = self._event("partial_image", b64_json, image, now)
        return {**event, "partial_image_index": index}

    def completed_event(
        self, b64_json: str, image: Image, seed: int | None, now: int
    ) -> dict[str, Any]:
        """One finished image, with its seed if that is known."""
        event = self._event("completed", b64_json, image, now)
        event = {**event, "usage": _NO_USAGE}
        return event if seed is None else {**event, "seed": seed}

    def _event(self, name: str, b64_json: str, image: Image, now: int) -> dict[str, Any]:
        size = _size_of(image)
        return {
            "type": f"{self.kind}.{name}",
            "b64_json": b64_json,
            "created_at": now,
            "size": size if size in _LISTED_SIZES else "auto",
            "quality": self.engine_quality.value,
            "background": "opaque",
            "output_format": self.output_format,
        }


class GenerationBody(ImageBody):
    """`POST /v1/images/generations`."""

    operation = ImageOperation.GENERATION

    prompt: RequiredPrompt
    style: Literal["vivid", "natural"] = "vivid"
    """DALL·E's, without effect."""
    image: PictureField | None = None
    """An addition of ours: a picture to start from."""

    def sources(self) -> list[Upload]:
        """The pictures to start from."""
        return [] if self.image is None else [Upload("image", self.image)]


class EditBody(ImageBody):
    """`POST /v1/images/edits`. `image` in a form is `images` in JSON."""

    kind = "image_edit"
    operation = ImageOperation.EDIT

    prompt: RequiredPrompt
    image: Sources | None = None
    images: Sources | None = None
    mask: PictureField | None = None
    input_fidelity: Literal["low", "high"] = "low"
    """Without effect. Diffusion models have `strength`."""

    def sources(self) -> list[Upload]:
        """The pictures to start from.

        Raises:
            InvalidRequest: there are none, or both names have some.

        """
        if self.image is not None and self.images is not None:
            raise InvalidRequest("Give 'image' or 'images', not both.", param="images")
        name = "image" if self.images is None else "images"
        sources = self.image or self.images
        if sources is None:
            raise InvalidRequest("Missing required parameter: 'image'.", param="image")
        if len(sources) == 1:
            return [Upload(name, sources[0])]
        return [Upload(f"{name}[{index}]", source) for index, source in enumerate(sources)]

    def uploads(self) -> list[Upload]:
        """Every picture of the request."""
        uploads = super().uploads()
        return uploads if self.mask is None else [*uploads, Upload("mask", self.mask)]

    def repaint_mask(self, pictures: Mapping[str, Picture]) -> Image | None:
        """The mask, otherwise what is transparent in the first image.

        Raises:
            InvalidRequest: the mask has another size than the first image.

        """
        first = pictures[self.sources()[0].param]
        if "mask" not in pictures:
            return None if first.alpha is None else first.mask
        mask = pictures["mask"].mask
        if mask.size != first.rgb.size:
            raise InvalidRequest(
                f"The mask is {_size_of(mask)}, its image {_size_of(first.rgb)};"
                " they must have the same size.",
                param="mask",
            )
        return mask


class VariationBody(ImageBody):
    """`POST /v1/images/variations`."""

    operation = ImageOperation.VARIATION

    image: PictureField

    @field_validator("stream")
    @classmethod
    def _has_no_events(cls, value: bool) -> bool:
        if value:
            raise ValueError("variations cannot be streamed")
        return value

    def sources(self) -> list[Upload]:
        """The pictures to start from."""
        return [Upload("image", self.image)]


def _size_of(image: Image) -> str:
    return f"{image.width}x{image.height}"
