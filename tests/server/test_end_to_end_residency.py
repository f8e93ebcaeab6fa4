"""A real language model leaves and comes back as its requests say, and the server tells of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.real import Server

pytestmark = pytest.mark.slow

MODEL = "tiny-llama"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TIMEOUT_S = 120


@pytest.fixture
def http(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=TIMEOUT_S)


def test_a_cold_load_from_the_question_to_the_log(http: httpx.Client, sdk: openai.OpenAI) -> None:
    http.post(f"/v1/engine/models/{MODEL}/unload").raise_for_status()
    plan = http.post("/v1/engine/plan", json={"model": MODEL}).json()
    assert (plan["fits"], plan["tier"]) == (True, "disk") and plan["move_s"] > 0
    with pytest.raises(openai.ConflictError) as refused:
        sdk.chat.completions.create(
            model=MODEL, messages=HELLO, extra_body={"if_loaded_only": True}
        )
    assert refused.value.code == "model_not_loaded"
    begin = http.get("/v1/engine/events", params={"limit": 1}).json()["last_id"]

    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "stream": True, "keep_alive": 0}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        text = response.read().decode()
    # In a comment, where the load took longer than the grace; test_waiting.py has those.
    assert response.headers.get("x-roundhouse-tier") == "disk" or "tier=disk" in text
    assert text.endswith("data: [DONE]\n\n")

    kinds: list[str] = []
    headers = {"last-event-id": str(begin)}
    with http.stream("GET", "/v1/engine/events?stream=true", headers=headers) as events:
        for line in events.iter_lines():
            if line.startswith("data: ") and json.loads(line[6:])["model"] == MODEL:
                kinds.append(json.loads(line[6:])["type"])
            if kinds[-1:] in (["parked"], ["unloaded"]):
                break
    assert kinds[:3] == ["load", "loaded", "grant"]
    assert kinds[3] in ("park", "unload"), "keep_alive 0 did not let it leave"


def test_a_warm_answer_tells_where_the_model_was(sdk: openai.OpenAI) -> None:
    for _ in range(2):
        answer = sdk.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=2,
            extra_body={"keep_alive": "10m", "priority": "interactive", "timeout": 60},
        )
    assert answer.headers["x-roundhouse-tier"] == "device"
