"""Transcripts from a provider."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Event, Heard, Segment, Word
from engine.requests import TranscriptionOperation, TranscriptionRequest
from engine.runtimes.remote.counts import MOST_SECONDS, token_count
from engine.runtimes.remote.failures import garbage
from engine.runtimes.remote.fields import extra_fields
from engine.runtimes.remote.options import RemoteOptions
from engine.runtimes.remote.provider import Call, Provider
from engine.runtimes.remote.reply import Reply
from engine.runtimes.remote.target import Target
from engine.usage import Usage

PATHS = {
    TranscriptionOperation.TRANSCRIPTION: "/audio/transcriptions",
    TranscriptionOperation.TRANSLATION: "/audio/translations",
}

MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"RIFF", "wav"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"\x1aE\xdf\xa3", "webm"),
    (4, b"ftyp", "m4a"),
    (0, b"ID3", "mp3"),
)
"""What stands where in a file, and the ending that OpenAI wants to see. Anything else is MP3."""


@dataclass(frozen=True, slots=True)
class TranscriptionCall:
    """A transcription request for a provider."""

    form: Mapping[str, Any]


def prepare_transcription(
    model: ModelConfig, request: TranscriptionRequest, options: RemoteOptions
) -> TranscriptionCall:
    """The form for the provider.

    Raises:
        InvalidRequest: naming a field that the provider does not take.

    """
    if not request.audio:
        raise InvalidRequest("The file is empty.", param="file")
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= 1):
        raise InvalidRequest("temperature must be from 0 to 1.", param="temperature")
    form: dict[str, Any] = {"model": options.model, "response_format": options.transcript}
    if request.operation is TranscriptionOperation.TRANSCRIPTION and request.language:
        form["language"] = request.language
    if request.prompt:
        form["prompt"] = request.prompt
    if request.temperature:
        form["temperature"] = f"{request.temperature:g}"
    if request.word_times:
        if options.transcript != "verbose_json":
            raise InvalidRequest(
                f"timestamp_granularities: the model {model.id!r} gives no times.",
                param="timestamp_granularities",
            )
        form["timestamp_granularities[]"] = ["word", "segment"]
    form |= extra_fields(
        model.id,
        options,
        {"vad": "true" if request.vad else None, "hotwords": request.hotwords},
    )
    return TranscriptionCall(form)


async def run_transcription(
    provider: Provider,
    target: Target,
    request: TranscriptionRequest,
    call: TranscriptionCall,
    usage: Usage,
) -> AsyncGenerator[Event, None]:
    """What was heard, then each segment.

    Raises:
        EngineError: see `Provider.answer`.

    """
    name = f"audio.{ending(request.audio)}"
    sent = Call(
        target=target,
        path=PATHS[request.operation],
        kind=request.operation.value,
        request_id=request.request_id,
        form=call.form,
        files={"file": (name, request.audio)},
    )

    async def transcript(reply: Reply) -> dict[str, Any]:
        document = await reply.document()
        if not isinstance(document.get("text"), str):
            raise garbage(provider.name, "no transcript")
        return document

    async with await provider.answer(sent, transcript) as answer:
        document = answer.first
    duration_s = _duration_s(document)
    if duration_s is None:
        duration_s = await asyncio.to_thread(measured_s, request.audio)
    usage.heard_s = duration_s
    counts = document.get("usage")
    if isinstance(counts, Mapping):
        usage.input_tokens = token_count(counts.get("input_tokens")) or 0
        usage.output_tokens = token_count(counts.get("output_tokens")) or 0
    language = document.get("language")
    if not isinstance(language, str) or not language:
        language = request.language or "unknown"
    yield Heard(language, duration_s)
    for segment in _segments(document, duration_s):
        yield segment


def ending(audio: bytes) -> str:
    """The ending of the file's name. OpenAI chooses the decoder by it."""
    for place, mark, found in MAGIC:
        if audio[place : place + len(mark)] == mark:
            return found
    return "mp3"


def measured_s(audio: bytes) -> float:
    """Seconds of a recording by its own header; 0 if it does not say."""
    import av

    try:
        with av.open(
            io.BytesIO(audio), metadata_errors="ignore", options={"protocol_whitelist": "none"}
        ) as container:
            return max(0.0, float((container.duration or 0) / av.time_base))
    except (av.error.FFmpegError, ValueError):
        return 0.0


def _duration_s(document: Mapping[str, Any]) -> float | None:
    counts = document.get("usage")
    seconds = counts.get("seconds") if isinstance(counts, Mapping) else None
    for value in (document.get("duration"), seconds):
        number = _number(value, -1.0)
        if 0 <= number <= MOST_SECONDS:
            return number
    return None


def _segments(document: Mapping[str, Any], duration_s: float) -> list[Segment]:
    text = document["text"]
    parts = document.get("segments")
    found = [each for each in parts if isinstance(each, Mapping)] if isinstance(parts, list) else []
    if not found:
        found = [{"text": text, "start": 0.0, "end": duration_s}] if text.strip() else []
    texts = [str(each.get("text") or "") for each in found]
    if "".join(texts).strip() != text.strip() and _joined(texts) == " ".join(text.split()):
        texts = [f" {each.strip()}" for each in texts]  # the whole is joined without spaces here
    words = _words(document.get("words"))
    segments = []
    for index, (part, own) in enumerate(zip(found, texts, strict=True)):
        start_s, end_s = _number(part.get("start")), _number(part.get("end"))
        last = index == len(found) - 1
        count = len(words)
        if not last:
            count = next((i for i, each in enumerate(words) if each.start_s >= end_s), count)
        mine, words = words[:count], words[count:]
        tokens = part.get("tokens")
        segments.append(
            Segment(
                id=index,
                start_s=start_s,
                end_s=end_s,
                text=own,
                seek=_whole(part.get("seek")),
                tokens=tuple(map(_whole, tokens)) if isinstance(tokens, list) else (),
                temperature=_number(part.get("temperature")),
                avg_logprob=_number(part.get("avg_logprob")),
                compression_ratio=_number(part.get("compression_ratio")),
                no_speech_prob=_number(part.get("no_speech_prob")),
                words=tuple(mine),
            )
        )
    return segments


def _joined(texts: Sequence[str]) -> str:
    return " ".join(" ".join(texts).split())


def _words(found: Any) -> list[Word]:
    if not isinstance(found, list):
        return []
    return [
        Word(str(each["word"]), _number(each.get("start")), _number(each.get("end")))
        for each in found
        if isinstance(each, Mapping) and "word" in each
    ]


def _number(value: Any, otherwise: float = 0.0) -> float:
    if isinstance(value, str):  # OpenAI's documentation has a duration as a string
        try:
            value = float(value)
        except ValueError:
            return otherwise
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else otherwise


def _whole(value: Any) -> int:
    return int(_number(value))
