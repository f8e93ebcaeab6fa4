"""The scenarios by name."""

from __future__ import annotations

from server.bench.scenarios.images import Images
from server.bench.scenarios.llm import Llm
from server.bench.scenarios.memory import MemoryUse
from server.bench.scenarios.mixed import Mixed
from server.bench.scenarios.scenario import Scenario
from server.bench.scenarios.speech import Speech
from server.bench.scenarios.startup import Startup
from server.bench.scenarios.swap import Swap
from server.bench.scenarios.transcription import Transcription
from server.bench.scenarios.video import Video

SCENARIOS: dict[str, type[Scenario]] = {
    kind.name: kind
    for kind in (
        Llm,
        Images,
        Video,
        Speech,
        Transcription,
        Swap,
        Mixed,
        Startup,
        MemoryUse,
    )
}
