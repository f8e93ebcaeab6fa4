"""Sends requests to an OpenAI-compatible server and reads the answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from PIL import Image

from server.bench.audio_length import audio_seconds
from server.bench.exchange import BadAnswer, Exchange, Response, events, exchange, read_response
from server.bench.work import (
    COMPLETIONS,
    IMAGES,
    SPEECH,
    TRANSCRIPTIONS,
    VIDEOS,
    Answer,
    Answers,
    Streams,
    Work,
)

if TYPE_CHECKING:
    import httpx

POLL_S = 0.02
"""How often a video's job is polled, which is how much too long its time may be."""
EXCERPT = 200
"""Characters of a wrong answer that its error shows."""


def unchanged(work: Work) -> Work:
    """The request in OpenAI's format."""
    return work


class HttpCaller:
    """A client of a server. Each request has a connection of its own."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        adapt: Callable[[Work], Work] = unchanged,
    ) -> None:
        """`adapt` translates a request for a server with fields of its own."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._adapt = adapt

    async def call(self, streams: Streams) -> Answers:
        """As `Caller.call`. Answers are parsed when all have come, so none delays another.

        All requests are prepared before the first is sent, for the same reason.
        """
        ready = [[(work, self._request(self._adapt(work))) for work in each] for each in streams]
        began_cpu_s = time.process_time()
        series = await asyncio.gather(*(self._series(each) for each in ready))
        cpu_s = time.process_time() - began_cpu_s
        return Answers([read_answer(*each) for each in chain.from_iterable(series)], cpu_s)

    async def _series(
        self, series: Sequence[tuple[Work, httpx.Request]]
    ) -> list[tuple[Work, Exchange]]:
        done = []
        for work, request in series:
            if work.path == VIDEOS:
                seen = await self._video(request)
            else:
                seen = await exchange(request, self._timeout_s)
            done.append((work, seen))
        return done

    def _request(self, work: Work) -> httpx.Request:
        import httpx

        url = self.url + work.path
        if work.file:
            files = {"file": ("recording.wav", work.file)}
            request = httpx.Request("POST", url, data=work.body, files=files, headers=self._headers)
        else:
            request = httpx.Request("POST", url, json=work.body, headers=self._headers)
        request.read()
        return request

    async def _video(self, request: httpx.Request) -> Exchange:
        """Request a video, wait for its job and fetch the file, as one exchange."""
        sent_s = time.perf_counter()
        seen = await exchange(request, self._timeout_s)
        try:
            job = _document(read_response(seen))
            while job["status"] in ("queued", "in_progress"):
                if time.perf_counter() - sent_s > self._timeout_s:
                    return Exchange(sent_s, (), f"no end within {self._timeout_s:g} s")
                await asyncio.sleep(POLL_S)
                job = _document(read_response(await self._get(f"{VIDEOS}/{job['id']}")))
            if job["status"] != "completed":
                return Exchange(sent_s, (), f"the job is {job['status']}: {job.get('error')}")
            seen = await self._get(f"{VIDEOS}/{job['id']}/content")
        except BadAnswer as error:
            return Exchange(sent_s, (), str(error))
        late_s = seen.sent_s - sent_s
        return Exchange(sent_s, tuple((s + late_s, data) for s, data in seen.pieces), seen.error)

    async def _get(self, path: str) -> Exchange:
        import httpx

        request = httpx.Request("GET", self.url + path, headers=self._headers)
        request.read()
        return await exchange(request, self._timeout_s)


def read_answer(work: Work, seen: Exchange) -> Answer:
    """Parse an exchange. The answer's error says why that is not possible."""
    try:
        return _read(work, seen)
    except BadAnswer as error:
        return Answer(seen.sent_s, seen.end_s, error=str(error))
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:  # av's are OSErrors
        reason = f"not understood: {type(error).__name__}: {error}"
        return Answer(seen.sent_s, seen.end_s, error=reason[:EXCERPT])


def _read(work: Work, seen: Exchange) -> Answer:
    response = read_response(seen)
    _check_status(response)
    if work.path == COMPLETIONS:
        return _text(response, seen)
    times_s = tuple(at_s for at_s, _ in response.pieces)
    audio_s, output = 0.0, ""
    if work.path == SPEECH:
        audio_s = audio_seconds(response.body)
        output = str(audio_s)
    elif work.path == TRANSCRIPTIONS:
        document = _document(response)
        audio_s, output = float(document["duration"]), str(document["text"])
    elif work.path == IMAGES:
        output = _pixels(_document(response)["data"][0]["b64_json"])
    return Answer(seen.sent_s, seen.end_s, times_s, audio_s=audio_s, output=output)


def _text(response: Response, seen: Exchange) -> Answer:
    times_s: list[float] = []
    text: list[str] = []
    tokens, ended = 0, False
    for at_s, data in events(response):
        if data == b"[DONE]":
            ended = True
            continue
        document = json.loads(data)
        if "error" in document:
            raise BadAnswer(f"the stream says: {data.decode(errors='replace')}"[:EXCERPT])
        tokens = (document.get("usage") or {}).get("completion_tokens", tokens)
        for choice in document["choices"]:
            ended = ended or choice.get("finish_reason") is not None
            if choice["text"]:
                text.append(choice["text"])
                if at_s not in times_s[-1:]:  # the data of one read is one piece
                    times_s.append(at_s)
    if not ended:
        raise BadAnswer("the stream ended without saying so")
    tokens = tokens or len(text)  # one token per event, if the server sends no count
    return Answer(seen.sent_s, seen.end_s, tuple(times_s), tokens, output="".join(text))


def _check_status(response: Response) -> None:
    if response.status != 200:
        said = response.body.decode(errors="replace").strip()
        raise BadAnswer(f"status {response.status}: {said}"[:EXCERPT])


def _document(response: Response) -> dict[str, Any]:
    _check_status(response)
    document = json.loads(response.body)
    if not isinstance(document, dict):
        raise BadAnswer("the answer is not a JSON object")
    return document


def _pixels(encoded: str) -> str:
    """The RGB bytes of an image file, both in base64."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return base64.b64encode(image.convert("RGB").tobytes()).decode()
