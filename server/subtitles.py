"""A transcript as subtitles, in SubRip and WebVTT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.events import Segment


def srt(segments: Sequence[Segment]) -> str:
    """SubRip has no standard: these are numbered cues in the format of its own program."""
    return "".join(
        f"{number}\n{_time(start, ',')} --> {_time(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_cues(segments), 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1/)."""
    cues = (
        f"{_time(start, '.')} --> {_time(end, '.')}\n{_escaped(text)}\n\n"
        for start, end, text in _cues(segments)
    )
    return "".join(("WEBVTT\n\n", *cues))


def _cues(segments: Sequence[Segment]) -> Iterator[tuple[int, int, str]]:
    """Begin and end in milliseconds, and the text on one line, as an empty line would end a cue."""
    for segment in segments:
        # Players would read an arrow as the times of another cue.
        text = " ".join(segment.text.split()).replace("-->", "->")
        if text:
            start_ms = round(segment.start_s * 1000)
            # Players drop a cue without a duration.
            yield start_ms, max(round(segment.end_s * 1000), start_ms + 1), text


def _time(ms: int, point: str) -> str:
    minutes, ms = divmod(ms, 60_000)
    seconds, ms = divmod(ms, 1000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{point}{ms:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
