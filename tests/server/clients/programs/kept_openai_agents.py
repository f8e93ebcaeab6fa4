"""Turns of an agent with a tool, by OpenAI's Agents SDK; each goes on from what the server keeps.

The first argument is `previous` (the agent sends the id of the last response) or `conversation`.
The second is the file of a former call: this one goes on from there. The third is the number of
turns. Each ends with the number of tokens that the model read, on a line of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from starter import MODEL, URL

FILE = Path(sys.argv[2])
set_tracing_disabled(True)
called = []


@function_tool
def get_weather(day: Literal["today", "tomorrow"]) -> str:
    """The weather of a day"""
    called.append(day)
    return "Rain"


def note(known: dict[str, Any], tokens: int) -> None:
    """Keep what the next turn needs, and report the turn."""
    FILE.write_text(json.dumps(known))
    sys.stdout.write(f"{tokens}\n")


async def main(known: dict[str, Any], kind: str, turns: int) -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    agent = Agent(
        name="Agent",
        instructions="Be brief",
        model=OpenAIResponsesModel(model=MODEL, openai_client=client),
        # The tool is called in each turn. Its result then goes to a text, which is bounded.
        model_settings=ModelSettings(
            max_tokens=100, tool_choice="required", parallel_tool_calls=False
        ),
        tools=[get_weather],
    )
    for _ in range(turns):
        called.clear()
        more: dict[str, Any] = {}
        if kind == "previous":
            more["previous_response_id"] = known.get("id")
        else:
            more["session"] = session = OpenAIConversationsSession(
                conversation_id=known.get("id"), openai_client=client
            )
        answer = await Runner.run(agent, "What is the weather?", **more)
        assert called
        assert len(answer.raw_responses) >= 2
        if kind == "previous":
            known["id"] = answer.last_response_id
        else:
            known["id"] = await session._get_session_id()
        note(known, answer.raw_responses[0].usage.input_tokens)


before = json.loads(FILE.read_text()) if FILE.exists() else {}
asyncio.run(main(before, sys.argv[1], int(sys.argv[3])))
