"""The tools with real models: somebody looks at the image, and hears the speech."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from mcp.client.client import Client
from mcp_types import ImageContent
from PIL import Image

from tests.server.real import Server

pytestmark = pytest.mark.slow


async def call(client: Client, name: str, arguments: dict[str, Any]) -> Any:
    result = await client.call_tool(name, arguments)
    assert not result.is_error, result.content
    return result


async def test_an_agent_uses_the_device(server: Server) -> None:
    told: list[str] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        told.append(message or "")

    async with Client(f"{server.url}/mcp") as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert {"generate_image", "speak", "transcribe", "chat", "embed", "start_video"} <= names
        arguments = {"prompt": "a red circle", "size": "128x128", "seed": 1}
        made = await client.call_tool("generate_image", arguments, progress_callback=on_progress)
        assert not made.is_error, made.content
        shown = made.content[0]
        assert isinstance(shown, ImageContent)
        image = Image.open(io.BytesIO(base64.b64decode(shown.data)))
        assert image.size == (128, 128)
        assert np.asarray(image.convert("L")).std() > 1, "it shows nothing"
        again = await call(client, "generate_image", arguments)
        assert again.content[0].data == shown.data, "the same seed gives the same image"

        spoken = await call(client, "speak", {"input": "Hello there.", "response_format": "wav"})
        url = spoken.structured_content["url"]
        heard = (await call(client, "transcribe", {"audio": url})).structured_content
        assert isinstance(heard["text"], str) and heard["duration"] > 0.2

        answer = await call(client, "chat", {"prompt": "Hello", "max_tokens": 8})
        assert answer.structured_content["usage"]["completion_tokens"] <= 8
        vectors = await call(client, "embed", {"input": ["a cat", "a kitten"]})
        assert len(vectors.structured_content["embeddings"]) == 2
        status = (await call(client, "engine_status", {})).structured_content
        assert status["loaded"] and status["free_bytes"] >= 0
