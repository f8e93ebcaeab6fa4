"""Answers with a file on the disk, or with a range of its bytes."""

from __future__ import annotations

from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send


class _RangeRefused(Exception):
    def __init__(self, start: Message) -> None:
        super().__init__()
        self.start = start


class FileAnswer(FileResponse):
    """A file. Ranges that are none get the whole file, as HTTP says; others the usual envelope."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""

        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                raise _RangeRefused(message)
            await send(message)

        try:
            await super().__call__(scope, receive, checked)
        except _RangeRefused as refused:
            if refused.start["status"] == 416:
                sizes = {
                    name.decode(): value.decode()
                    for name, value in refused.start["headers"]
                    if name == b"content-range"
                }
                message = "The header 'range' asks for bytes that the file does not have."
                raise HTTPException(416, message, sizes) from None
            headers = [each for each in scope["headers"] if each[0] != b"range"]
            await super().__call__({**scope, "headers": headers}, receive, send)
