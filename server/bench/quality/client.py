"""Requests to a server for what its models say, one at a time or several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt

from server.bench.audio_length import audio_seconds
from server.bench.errors import BadServer

Vectors = npt.NDArray[np.float64]
"""A row for each text, of length 1."""
Item = TypeVar("Item")
Result = TypeVar("Result")

EXCERPT = 300
"""Characters of an error's body to show."""


@dataclass(frozen=True, slots=True)
class Said:
    """The answer of a language model."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model transcribed, and how long that took."""

    text: str
    words: tuple[tuple[str, float], ...]
    """Each with its start in seconds; none if they were not asked for."""
    took_s: float


@dataclass(frozen=True, slots=True)
class Spoken:
    """A recording that a model made, and how long that took."""

    wav: bytes
    seconds: float
    took_s: float


class Client:
    """A server that speaks OpenAI's interface. Any error of it ends the measurement."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def at_once(
        self, number: int, act: Callable[[Item], Result], items: Iterable[Item]
    ) -> list[Result]:
        """The results of `act`, `number` of which run at the same time."""
        with ThreadPoolExecutor(number) as pool:
            return list(pool.map(act, items))

    def device_kind(self) -> str:
        """`cpu` or `cuda`; empty where the server does not say, or not to this key."""
        try:
            response = self._http.get("/v1/engine")
            return str(response.json()["device_kind"]) if response.status_code == 200 else ""
        except (httpx.HTTPError, ValueError, KeyError):
            return ""

    def ask(self, model: str, question: str, tokens: int) -> Said:
        """The likeliest answer to a question, of at most so many tokens."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_completion_tokens": tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        choice = self._post("/v1/chat/completions", json=body).json()["choices"][0]
        return Said(choice["message"]["content"] or "", tuple(choice.get("token_ids") or ()))

    def log_probabilities(self, model: str, text: str) -> list[float]:
        """The natural logarithm of the probability of each token of a text but the first."""
        body = {
            "model": model,
            "prompt": text,
            "echo": True,
            "logprobs": 0,
            "max_tokens": 0,
            "temperature": 0,
        }
        choice = self._post("/v1/completions", json=body).json()["choices"][0]
        return [each for each in choice["logprobs"]["token_logprobs"] if each is not None]

    def embed(self, model: str, texts: Sequence[str]) -> Vectors:
        """The vector of each text."""
        body = {"model": model, "input": list(texts), "encoding_format": "float"}
        data = self._post("/v1/embeddings", json=body).json()["data"]
        return unit_vectors([each["embedding"] for each in data])

    def transcribe(self, model: str, wav: bytes, *, words: bool) -> Heard:
        """The likeliest transcript of English speech; `words`: with the time of each word."""
        form: dict[str, Any] = {
            "model": model,
            "response_format": "verbose_json" if words else "json",
            "temperature": "0",
            "language": "en",
        }
        if words:
            form["timestamp_granularities[]"] = "word"
        began_s = time.perf_counter()
        response = self._post(
            "/v1/audio/transcriptions", data=form, files={"file": ("speech.wav", wav)}
        )
        took_s = time.perf_counter() - began_s
        answer = response.json()
        starts = tuple((each["word"], each["start"]) for each in answer.get("words") or ())
        return Heard(answer["text"], starts, took_s)

    def voices(self, model: str) -> list[str]:
        """The voices of a model that speak English, or that do not say what they speak."""
        response = self._checked(self._http.get("/v1/audio/voices", params={"model": model}))
        return [
            each["id"]
            for each in response.json()["data"]
            if each["model"] == model and (each["language"] or "en").startswith("en")
        ]

    def speak(self, model: str, voice: str, text: str) -> Spoken:
        """A recording of a text."""
        body = {"model": model, "voice": voice, "input": text, "response_format": "wav"}
        began_s = time.perf_counter()
        wav = self._post("/v1/audio/speech", json=body).content
        took_s = time.perf_counter() - began_s
        return Spoken(wav, audio_seconds(wav), took_s)

    def _post(self, path: str, **content: Any) -> httpx.Response:
        try:
            return self._checked(self._http.post(path, **content))
        except httpx.TransportError as error:
            raise BadServer(f"{path}: {type(error).__name__}: {error}") from error

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.status_code != 200:
            raise BadServer(
                f"{response.request.url.path}: status {response.status_code}:"
                f" {response.text[:EXCERPT]}"
            )
        return response


def unit_vectors(rows: Sequence[Sequence[float]]) -> Vectors:
    """Rows of numbers, each scaled to the length 1."""
    vectors = np.asarray(rows, dtype=np.float64)
    scaled: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled
