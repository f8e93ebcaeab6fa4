"""What the programs that talk know: the models of the samples, a spoken question, and words."""

from __future__ import annotations

import io
import os
import re
import wave

from openai import OpenAI

URL = os.environ["ROUNDHOUSE_URL"]
MODEL = "gpt-realtime"
RATE = 24_000
CHUNK = RATE // 10 * 2
"""Bytes of a tenth of a second."""
SILENCE_S = 5
"""After a turn. The longest that a turn waits for more of a sentence is shorter."""
QUESTION = "What is the capital of France?"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


def question() -> bytes:
    """The question, spoken, and silence that ends any turn: PCM of 16 bits."""
    spoken = client.audio.speech.create(
        model="tts-1", voice="alloy", input=QUESTION, response_format="pcm"
    )
    return spoken.content + bytes(2 * RATE * SILENCE_S)


def pieces(pcm: bytes) -> list[bytes]:
    """As a microphone gives it."""
    return [pcm[begin : begin + CHUNK] for begin in range(0, len(pcm), CHUNK)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def heard(pcm: bytes) -> list[str]:
    """The words of the audio."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(pcm)
    answer = client.audio.transcriptions.create(
        model="whisper-1", file=("answer.wav", file.getvalue()), language="en"
    )
    return words(answer.text)


def check_spoken(transcript: str, pcm: bytes) -> None:
    """The audio has the words of the transcript."""
    said = words(transcript)
    found = heard(pcm)
    assert "paris" in found, (transcript, found)
    assert sum(word in found for word in said) >= 0.8 * len(said), (transcript, found)
