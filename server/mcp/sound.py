"""Tools for sound: speech from a text, and a text from speech."""

from __future__ import annotations

import uuid
from typing import Any

from mcp_types import CallToolResult

from server.mcp.media import FILE_FORMS, LINK_ONLY, given_file, keep, sound_contents
from server.mcp.tool import Call, Schema, Tool, ToolFailure, as_text, fields_of, result
from server.schemas.audio import SpeechBody, TranscriptionBody

_FORMATS = ("mp3", "wav", "flac", "opus", "aac")
WAV_HEADER = 44
"""Bytes before the samples in what the server writes."""
"""Those whose files say what they are."""

_SPEECH: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "url": {"type": "string"},
        "bytes": {"type": "integer"},
    },
    "required": ["model", "url", "bytes"],
}
_TRANSCRIPT: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "text": {"type": "string"},
        "language": {"type": ["string", "null"]},
        "duration": {"type": ["number", "null"], "description": "Seconds."},
    },
    "required": ["model", "text"],
}


async def _speak(call: Call) -> CallToolResult:
    document = call.given("link_only")
    suffix = document.setdefault("response_format", "mp3")
    if suffix not in _FORMATS:
        raise ToolFailure(f"response_format: it is one of {', '.join(_FORMATS)}.")
    answer = await call.post("/v1/audio/speech", document)
    audio = _with_length(answer.body) if suffix == "wav" else answer.body
    url = await keep(call.outputs, audio, f".{suffix}", call.files_url)
    structured = {"model": document["model"], "url": url, "bytes": len(audio)}
    media_type = answer.headers["content-type"].partition(";")[0]
    contents = sound_contents(call, url, audio, media_type)
    return result(as_text(structured), structured, *contents)


def _with_length(wav: bytes) -> bytes:
    """The file with its sizes. Its header was sent before anybody knew them, and says 4 GiB."""
    if wav[36:44] != b"data\xff\xff\xff\xff":
        return wav
    sizes = len(wav) - 8, len(wav) - WAV_HEADER
    riff, data = (each.to_bytes(4, "little") for each in sizes)
    return wav[:4] + riff + wav[8:40] + data + wav[WAV_HEADER:]


async def _transcribe(call: Call) -> CallToolResult:
    audio = await given_file(call, "audio")
    fields = {**call.given("audio"), "response_format": "verbose_json"}
    body, content_type = _form(fields, audio)
    answer = await call.send("POST", "/v1/audio/transcriptions", body, content_type)
    heard = answer.document()
    structured = {
        "model": fields["model"],
        "text": heard["text"],
        "language": heard.get("language"),
        "duration": heard.get("duration"),
    }
    return result(heard["text"], structured)


def _form(fields: dict[str, Any], audio: bytes) -> tuple[bytes, str]:
    """A form with a file, and its content type."""
    mark = uuid.uuid4().hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = (
        f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="audio"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = b"".join([*parts, head.encode(), audio, f"\r\n--{mark}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={mark}"


SOUND_TOOLS = (
    Tool(
        name="speak",
        title="Speak a text",
        description=(
            "Make speech from a text. Returns the sound if it is short, and a link to the file."
            " The link works without a key, and transcribe takes it."
        ),
        path="/v1/audio/speech",
        task="speech",
        takes_model=True,
        properties={
            **fields_of(
                SpeechBody,
                input="The text.",
                voice="A voice of the model, or one that was uploaded.",
                speed="0.25 to 4; 1 is the voice's own.",
                language="A code, as in en. By default the voice's own.",
            ),
            "response_format": {
                "enum": [*_FORMATS],
                "default": "mp3",
                "description": "The format of the file.",
            },
            "link_only": LINK_ONLY,
        },
        required=("input",),
        output=_SPEECH,
        run=_speak,
    ),
    Tool(
        name="transcribe",
        title="Transcribe speech",
        description="Write down what is said in a recording.",
        path="/v1/audio/transcriptions",
        task="transcribe",
        takes_model=True,
        properties={
            "audio": {
                "type": "string",
                "description": f"The recording, in any common format, {FILE_FORMS}.",
            },
            **fields_of(
                TranscriptionBody,
                language="A code, as in en. By default the model detects it.",
                prompt="Text before the recording, as context.",
            ),
        },
        required=("audio",),
        output=_TRANSCRIPT,
        read_only=True,
        run=_transcribe,
    ),
)
