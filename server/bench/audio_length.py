"""How long a recording is."""

from __future__ import annotations

import io


def audio_seconds(data: bytes) -> float:
    """Seconds of an audio file by its samples: the header of a stream does not know them."""
    import av  # here, as every command would wait a quarter of a second for it

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        return float(sum(frame.samples for frame in container.decode(stream)) / stream.rate)
