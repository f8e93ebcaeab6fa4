"""The engine's answers, as Ollama's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from engine.errors import RuntimeFailed
from engine.events import Document, Event, Frame
from server.ollama.clock import written

if TYPE_CHECKING:
    from engine.session import Session

DATA = "data:"
DONE = "[DONE]"
STOP = "stop"
REASONS = {"length": "length"}
"""Reasons of the end that Ollama tells apart from `stop`. To it a call is a stop as well."""


class Shape(Enum):
    """Where an answer has its text."""

    CHAT = "message"
    GENERATE = "response"


@dataclass(slots=True)
class _Call:
    """A call of a tool, as far as it has come."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Piece:
    """A part of an answer, or the whole."""

    content: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Piece) -> None:
        """Append a later part."""
        self.content += other.content
        self.thinking += other.thinking
        self.tool_calls += other.tool_calls
        self.logprobs += other.logprobs

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.tool_calls or self.logprobs)


class Reply:
    """One answer, from the events of its session."""

    def __init__(self, model: str, shape: Shape) -> None:
        """`model` is the name that the client used."""
        self._model = model
        self._shape = shape
        self._began_s = time.perf_counter()
        self._calls: dict[int, _Call] = {}
        self._reason = STOP
        self._usage: Mapping[str, Any] = {}
        self.whole = Piece()

    def take(self, event: Event) -> Iterator[Piece]:
        """The parts of the answer in an event.

        Raises:
            RuntimeFailed: the event is an error.

        """
        if isinstance(event, Frame):
            texts = [
                line.removeprefix(DATA).strip()
                for line in event.data.split("\n")  # not splitlines: JSON may hold U+2028
                if line.startswith(DATA)
            ]
            documents = [from_json(text) for text in texts if text != DONE]
        elif isinstance(event, Document):
            documents = [from_json(event.body)]
        else:
            return
        for document in documents:
            piece = self._piece(document)
            if piece:
                self.whole.add(piece)
                yield piece

    def rest(self) -> Piece:
        """What is known once the answer has ended: its calls of tools."""
        piece = Piece()
        for call in self._calls.values():
            arguments = _object(call.arguments)
            if arguments is not None:
                function = {
                    "index": len(piece.tool_calls),
                    "name": call.name,
                    "arguments": arguments,
                }
                each: dict[str, Any] = {"function": function}
                piece.tool_calls.append({"id": call.id, **each} if call.id else each)
            elif not self.whole.content:
                piece.content += call.arguments  # of a call that was cut: nobody could run it
        self.whole.add(piece)
        return piece

    def document(self, piece: Piece) -> dict[str, Any]:
        """A part of the answer as Ollama's document."""
        document: dict[str, Any] = {"model": self._model, "created_at": written(time.time())}
        thinking = {"thinking": piece.thinking} if piece.thinking else {}
        if self._shape is Shape.CHAT:
            message: dict[str, Any] = {"role": "assistant", "content": piece.content, **thinking}
            if piece.tool_calls:
                message["tool_calls"] = piece.tool_calls
            document["message"] = message
        else:
            document |= {"response": piece.content, **thinking}
        document["done"] = False
        if piece.logprobs:
            document["logprobs"] = piece.logprobs
        return document

    def end(self, piece: Piece, session: Session) -> dict[str, Any]:
        """The last document, with the counts and the times of the session."""
        timings, usage = session.timings, session.usage
        total_s = time.perf_counter() - self._began_s
        document = self.document(piece)
        logprobs = document.pop("logprobs", None)
        before_ms = timings.fetch_ms + timings.queue_ms + timings.load_ms
        answer_ns = max(1, _ns(total_s * 1e3 - before_ms - timings.run_ms))
        prompt_ns = _ns(timings.run_ms)
        if isinstance(session.first, Document):  # the time of its first token is not known
            prompt_ns, answer_ns = 0, max(1, _ns(timings.run_ms))
        return {
            **document,
            "done": True,
            "done_reason": self._reason,
            "total_duration": _ns(total_s * 1e3),
            "load_duration": _ns(timings.fetch_ms + timings.load_ms),
            "prompt_eval_count": int(self._usage.get("prompt_tokens") or usage.input_tokens),
            "prompt_eval_duration": prompt_ns,
            "eval_count": int(self._usage.get("completion_tokens") or usage.output_tokens),
            "eval_duration": answer_ns,
            **({"logprobs": logprobs} if logprobs else {}),
        }

    def _piece(self, document: Any) -> Piece:
        if not isinstance(document, dict):
            raise RuntimeFailed("The model gave no answer.")
        if "error" in document:
            error = document["error"]
            text = error.get("message") if isinstance(error, dict) else error
            raise RuntimeFailed(str(text))
        self._usage = document.get("usage") or self._usage
        choices = document.get("choices") or ()
        if not choices:
            return Piece()
        choice = choices[0]
        reason = choice.get("finish_reason")
        if reason is not None:
            self._reason = REASONS.get(reason, STOP)
        message = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        for place, call in enumerate(message.get("tool_calls") or ()):
            known = self._calls.setdefault(call.get("index", place), _Call())
            function = call.get("function") or {}
            known.id = known.id or call.get("id") or ""
            known.name += function.get("name") or ""
            known.arguments += function.get("arguments") or ""
        return Piece(
            content=message.get("content") or "",
            thinking=message.get("reasoning") or message.get("reasoning_content") or "",
            logprobs=_logprobs(choice.get("logprobs")),
        )


def loaded_document(model: str, shape: Shape, reason: str) -> dict[str, Any]:
    """The answer to a request without a prompt: the model was loaded or unloaded."""
    return {**Reply(model, shape).document(Piece()), "done": True, "done_reason": reason}


def _logprobs(found: Any) -> list[dict[str, Any]]:
    if not found:
        return []
    if "content" in found:  # of a chat
        return [
            {**_logprob(each), "top_logprobs": [_logprob(o) for o in each.get("top_logprobs", ())]}
            for each in found["content"] or ()
        ]
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    return [
        {
            "token": token,
            "logprob": _finite(logprob),
            "top_logprobs": [
                {"token": other, "logprob": _finite(each)} for other, each in (top or {}).items()
            ],
        }
        for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    ]


def _logprob(each: Mapping[str, Any]) -> dict[str, Any]:
    found = {"token": each["token"], "logprob": _finite(each["logprob"])}
    return {**found, "bytes": each["bytes"]} if each.get("bytes") is not None else found


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else -9999.0


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _ns(milliseconds: float) -> int:
    return max(0, round(milliseconds * 1e6))
