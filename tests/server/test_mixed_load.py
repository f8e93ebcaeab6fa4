"""Every kind of model in one process with room for a third of them."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml

from tests.server.real import Server, starter_config

pytestmark = pytest.mark.slow

REQUESTS = 30
AT_ONCE = 12
MODELS = {
    "tiny-llama",
    "tiny-llama-2",
    "tiny-qwen",
    "tiny-embed",
    "tiny-sdxl-turbo",
    "tiny-flux-schnell",
    "tiny-whisper",
    "tiny-vits",
    "tiny-bark",
    "tiny-xtts",
}
MEMORY = "128MiB"
"""They take some 390 MiB together; the largest, `tiny-xtts` with a request, 125."""


def write_config(folder: Path) -> Path:
    path = starter_config(folder, MODELS - {"tiny-llama-2"})
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    llama = next(model for model in document["models"] if model["id"] == "tiny-llama")
    document["models"].append({**llama, "id": "tiny-llama-2", "aliases": []})
    document["engine"] = {"memory": MEMORY, "max_overtake_s": 2}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def tone() -> bytes:
    """Two seconds of a tone as WAV."""
    rate = 16_000
    samples = (8000 * np.sin(np.arange(2 * rate) * 0.1)).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def test_requests_of_every_kind_share_what_holds_a_third_of_their_models(tmp_path: Path) -> None:
    server = Server(tmp_path, "--config", str(write_config(tmp_path)))
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    audio = ("tone.wav", tone())

    def ask(model: str) -> None:
        match model:
            case "tiny-llama" | "tiny-llama-2" | "tiny-qwen":
                *_, last = sdk.completions.create(
                    model=model, prompt="Hello", max_tokens=16, stream=True,
                    stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
                )  # fmt: skip
                assert last.usage is not None and last.usage.completion_tokens == 16
            case "tiny-embed":
                assert sdk.embeddings.create(model=model, input="Hello").data[0].embedding
            case "tiny-sdxl-turbo" | "tiny-flux-schnell":
                body: Any = {"model": model, "prompt": "a red train", "size": "128x128"}
                assert sdk.images.generate(**body).data
            case "tiny-whisper":
                heard = sdk.audio.transcriptions.create(model=model, file=audio, language="en")
                assert heard.text is not None
            case _:
                spoken = sdk.audio.speech.create(
                    model=model, input="Hello there.", voice="alloy", response_format="wav"
                )
                assert len(spoken.content) > 1000

    def one(index: int) -> None:
        ask(sorted(MODELS)[(index * 7) % len(MODELS)])
        ledger = httpx.get(f"{server.url}/v1/engine", timeout=180).json()["ledger"]
        assert ledger["granted_bytes"] <= ledger["capacity_bytes"]
        assert ledger["peak_granted_bytes"] <= ledger["budget_bytes"]

    def unload_all() -> int:
        for model in httpx.get(f"{server.url}/v1/engine", timeout=180).json()["models"]:
            if model["state"] != "absent":
                url = f"{server.url}/v1/engine/models/{model['id']}/unload"
                httpx.post(url, timeout=180).raise_for_status()
        return int(psutil.Process(server.process.pid).memory_info().rss)

    try:
        server.wait_ready()
        for model in sorted(MODELS):  # what a library keeps after its first use is not a leak
            ask(model)
        before = unload_all()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(REQUESTS)))  # raises what the first that failed raised
        after = unload_all()
        ledger = httpx.get(f"{server.url}/v1/engine", timeout=180).json()["ledger"]
        assert ledger["granted_bytes"] == 0 and not ledger["entries"]
        assert after <= before * 1.05, (before, after)
    finally:
        assert server.stop() == 0
