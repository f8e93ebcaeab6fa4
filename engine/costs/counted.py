"""What the events of a run show of its usage: images, characters, seconds.

Text streams have many events, so their tokens are counted by the runtimes.
"""

from __future__ import annotations

from engine.events import Event, Heard, ImageResult, Speech, VideoResult
from engine.requests import Request, SpeechRequest
from engine.usage import Usage


def count_event(usage: Usage, request: Request, event: Event) -> None:
    """Add what an event shows. A second attempt of the same request counts its results once."""
    match event:
        case Speech():
            if isinstance(request, SpeechRequest):
                usage.characters = len(request.text)  # providers bill the text, not what was heard
            usage.spoken_s += event.samples.size / event.sample_rate
        case Heard():
            usage.heard_s = event.duration_s
        case ImageResult():
            usage.images = len(event.images)
            width, height = event.images[0].size if event.images else (0, 0)
            usage.pixels = width * height
        case VideoResult():
            frames, height, width, _ = event.frames.shape
            usage.video_s = frames / event.fps
            usage.pixels = width * height
        case _:
            pass
