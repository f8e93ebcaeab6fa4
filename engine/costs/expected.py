"""What a request may take, before it runs: at most, and most likely."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.requests import (
    READING,
    DiarizationRequest,
    ImageRequest,
    Request,
    SpeechRequest,
    TextOperation,
    TextRequest,
    TranscriptionRequest,
    VideoRequest,
)
from engine.usage import Usage

MOST_OUTPUT_TOKENS = 32_768
"""Of a request that names no limit, unless the model's context is shorter."""

MOST_ATTACHED_TOKENS = 16_384
"""Of an image or recording in a prompt. Its bytes in base64 would say a hundred times more."""

_ATTACHED = ("data:image/", "data:audio/", "data:video/")
_ADDRESSES = frozenset({"image_url", "input_audio", "audio_url", "video_url", "source"})
"""The fields of a part whose content is elsewhere, or in base64 below `data`."""
_CONTENTS = _ADDRESSES | {"url", "file_data", "data"}
"""The fields that may be a `data:` URL. A text that begins as one is read as a text."""
_FORMATS = frozenset({"format", "media_type"})
"""Beside `data` one of them says that it is base64."""

_NODE_TOKENS = 4
"""Of a part of the body beside its texts: the templates of models mark each message and field."""

_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_COMPARED = ("documents", "items", "text_2", "data_2")
"""Texts that are ranked or scored."""
_READ_AGAIN = ("query", "queries", "text_1", "data_1")
"""What they are compared with."""

_WITHOUT_ANSWER = frozenset({
    TextOperation.COUNT_TOKENS, TextOperation.INPUT_TOKENS,
    TextOperation.TOKENIZE, TextOperation.DETOKENIZE,
})  # fmt: skip

MOST_SECONDS_PER_BYTE = 1 / 1_000
"""Of a recording: nobody codes speech with less than 8 kbit/s."""
SECONDS_PER_BYTE = 1 / 16_000
"""128 kbit/s, until there are recordings to learn from."""
MOST_SECONDS_PER_CHARACTER = 0.2
SECONDS_PER_CHARACTER = 1 / 15
MOST_VIDEO_S = 12.0
VIDEO_S = 5.0
"""Of a request that names no length."""

TOKENS_PER_BYTE = 0.25
OUTPUT_TOKENS = 256.0
DEVICE_S = 1.0
MOST_DEVICE_S = 10.0
"""Of a run on this machine, until there is a longer one."""

LEAST_WEIGHT = 0.05
"""The weight of the newest in a running mean: about the last twenty count."""


def most(request: Request, context: int | None) -> Usage:
    """What a request may take at most. `context` bounds the tokens of prompt and answer."""
    match request:
        case TextRequest():
            size = _text_size(request)
            limit = size.answer_tokens
            if limit is None:
                limit = MOST_OUTPUT_TOKENS
            prompt = size.prompt_bytes
            if context is not None:
                limit, prompt = min(limit, context), min(prompt, context * size.prompts)
            return Usage(
                input_tokens=prompt,
                output_tokens=limit * size.answers,
            )
        case ImageRequest():
            return Usage(images=request.n)
        case SpeechRequest():
            seconds = len(request.text) * MOST_SECONDS_PER_CHARACTER / request.speed
            return Usage(characters=len(request.text), spoken_s=seconds)
        case TranscriptionRequest():
            return Usage(heard_s=len(request.audio) * MOST_SECONDS_PER_BYTE)
        case DiarizationRequest():
            return Usage()  # the transcript of the recording counts its seconds
        case VideoRequest():
            return Usage(video_s=_video_s(request) or MOST_VIDEO_S)


class Expectations:
    """What requests to one model took so far, and so what the next will take."""

    def __init__(self) -> None:
        self._output_tokens = _Mean(OUTPUT_TOKENS)
        self._tokens_per_byte = _Mean(TOKENS_PER_BYTE)
        self._seconds_per_byte = _Mean(SECONDS_PER_BYTE)
        self._device_s = _Mean(DEVICE_S)
        self.most_device_s = MOST_DEVICE_S
        """The longest run so far."""

    @property
    def device_s(self) -> float:
        """The device time of a run."""
        return self._device_s.value

    def seed(self, output_tokens: float, device_s: float) -> None:
        """Begin with the means of an earlier process."""
        self._output_tokens.learn(output_tokens)
        self._device_s.learn(device_s)

    def learn(self, request: Request, usage: Usage, device_s: float, *, remote: bool) -> None:
        """Take what an answered request took. Only for remote models its size is looked at."""
        self._device_s.learn(device_s)
        self.most_device_s = max(self.most_device_s, device_s)
        match request:
            case TextRequest() if usage.input_tokens or usage.output_tokens:
                self._output_tokens.learn(usage.output_tokens)
                if remote and (nbytes := _text_size(request).prompt_bytes):
                    self._tokens_per_byte.learn(usage.input_tokens / nbytes)
            case TranscriptionRequest() if usage.heard_s and request.audio:
                self._seconds_per_byte.learn(usage.heard_s / len(request.audio))
            case _:
                pass

    def usage(self, request: Request, context: int | None) -> Usage:
        """What a request will most likely take."""
        usage = most(request, context)
        match request:
            case TextRequest():
                usage.input_tokens = math.ceil(usage.input_tokens * self._tokens_per_byte.value)
                answers = _text_size(request).answers
                mean = math.ceil(self._output_tokens.value * answers)
                usage.output_tokens = min(usage.output_tokens, mean)
            case SpeechRequest():
                usage.spoken_s = len(request.text) * SECONDS_PER_CHARACTER / request.speed
            case TranscriptionRequest():
                usage.heard_s = len(request.audio) * self._seconds_per_byte.value
            case VideoRequest():
                usage.video_s = _video_s(request) or VIDEO_S
            case _:
                pass
        return usage


class _Mean:
    """A mean that forgets slowly."""

    __slots__ = ("_count", "value")

    def __init__(self, first: float) -> None:
        self.value = first
        self._count = 0

    def learn(self, value: float) -> None:
        self._count += 1
        self.value += max(LEAST_WEIGHT, 1 / self._count) * (value - self.value)


@dataclass(frozen=True, slots=True)
class _TextSize:
    prompt_bytes: int
    prompts: int
    answers: int
    """Of all prompts."""
    answer_tokens: int | None
    """Of each answer; None: the request names no limit."""


def _text_size(request: TextRequest) -> _TextSize:
    """The size of a text request. Its body may be wrong: nobody has checked it yet."""
    body = request.body
    if request.operation in _WITHOUT_ANSWER:
        return _TextSize(0, 0, 0, 0)
    prompt_bytes = _prompt_bytes(body)
    if request.operation in READING:
        compared = next((body[name] for name in _COMPARED if name in body), None)
        if compared is None:
            compared = body.get("input", body.get("inputs"))
        prompts = _prompts(compared)
        # A reranker reads the one text anew with each of the others.
        again = _prompt_bytes({name: body[name] for name in _READ_AGAIN if name in body})
        return _TextSize(prompt_bytes + again * (prompts - 1), prompts, 0, 0)
    limits = [limit for name in _LIMITS if (limit := _count(body.get(name))) is not None]
    answers = max(1, _count(body.get("n")) or 1, _count(body.get("best_of")) or 1)
    prompts = _prompts(body.get("prompt"))
    return _TextSize(prompt_bytes, prompts, prompts * answers, max(limits) if limits else None)


def _prompts(value: Any) -> int:
    several = isinstance(value, list) and value and isinstance(value[0], str | list | Mapping)
    return len(value) if several else 1


def _count(value: Any) -> int | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return int(value)
    return None


def _prompt_bytes(body: Mapping[str, Any]) -> int:
    """The bytes of all texts in a body: no tokenizer makes more tokens of them."""
    found = 0
    todo: list[Any] = [body]
    while todo:
        part = todo.pop()
        match part:
            case str():
                found += len(part) if part.isascii() else len(part.encode(errors="replace"))
            case Mapping():
                found += _NODE_TOKENS + sum(map(len, filter(_is_text, part)))
                for name, value in part.items():
                    if name in _ADDRESSES:
                        found += MOST_ATTACHED_TOKENS  # an address is short, its image is not
                    coded = name == "data" and not part.keys().isdisjoint(_FORMATS)
                    if isinstance(value, str) and (coded or _is_attached(name, value)):
                        found += min(len(value), MOST_ATTACHED_TOKENS)
                    else:
                        todo.append(value)
            case list() | tuple():
                todo += part
            case _:
                found += 1  # a token by its number, or a setting
    return found


def _is_attached(name: str, value: str) -> bool:
    return name in _CONTENTS and value.startswith(_ATTACHED)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _video_s(request: VideoRequest) -> float | None:
    if request.seconds is not None:
        return request.seconds
    if request.num_frames is not None and request.fps:
        return request.num_frames / request.fps
    return None
