"""Tools that make images."""

from __future__ import annotations

import base64
from typing import Any

from mcp_types import CallToolResult

from server.mcp.media import FILE_FORMS, LINK_ONLY, given_file, image_contents
from server.mcp.tool import Call, Schema, Tool, as_text, fields_of, result
from server.schemas.images import EditBody, GenerationBody

_OUTPUT: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"url": {"type": "string"}},
                "required": ["url"],
            },
        },
        "seed": {"type": ["integer", "null"], "description": "Of the first image."},
    },
    "required": ["model", "images"],
}

_COMMON = {
    "n": "How many images.",
    "size": "WIDTHxHEIGHT in pixels, or auto.",
    "quality": "Low is the fastest.",
    "negative_prompt": "What the image should not show.",
    "seed": "The same seed and prompt give the same image.",
    "steps": "Denoising steps. By default those of the quality.",
    "guidance": "How closely the prompt is followed.",
    "output_format": "The format of the files.",
}


async def _generate(call: Call) -> CallToolResult:
    return await _make(call, "/v1/images/generations", call.given("link_only"))


async def _edit(call: Call) -> CallToolResult:
    document = call.given("link_only")
    for name in ("image", "mask"):
        if name in document:
            document[name] = base64.b64encode(await given_file(call, name)).decode()
    return await _make(call, "/v1/images/edits", document)


async def _make(call: Call, path: str, document: dict[str, Any]) -> CallToolResult:
    answer = (await call.post(path, {**document, "response_format": "url"})).document()
    urls = [each["url"] for each in answer["data"]]
    structured = {
        "model": document["model"],
        "images": [{"url": url} for url in urls],
        "seed": answer.get("seed"),
    }
    return result(as_text(structured), structured, *await image_contents(call, urls))


IMAGE_TOOLS = (
    Tool(
        name="generate_image",
        title="Generate an image",
        description=(
            "Make images from a text. Returns the images, and links to the files in full quality."
            " The links work without a key, for a day or as the server is configured."
        ),
        path="/v1/images/generations",
        task="image",
        takes_model=True,
        properties={
            **fields_of(GenerationBody, prompt="What the image shows.", **_COMMON),
            "link_only": LINK_ONLY,
        },
        required=("prompt",),
        output=_OUTPUT,
        run=_generate,
    ),
    Tool(
        name="edit_image",
        title="Edit an image",
        description="Make a new image from an image and a text.",
        path="/v1/images/edits",
        task="image",
        takes_model=True,
        properties={
            "image": {"type": "string", "description": f"The image, {FILE_FORMS}."},
            "mask": {
                "type": "string",
                "description": f"What is transparent here is painted anew; {FILE_FORMS}.",
            },
            **fields_of(
                EditBody,
                prompt="What the new image shows.",
                **_COMMON,
                strength="How far it may leave the image: above 0, at most 1.",
            ),
            "link_only": LINK_ONLY,
        },
        required=("image", "prompt"),
        output=_OUTPUT,
        run=_edit,
    ),
)
