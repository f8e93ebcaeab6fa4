"""One response of a realtime session: generated, spoken while it is generated, and told."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import EngineError, InvalidRequest
from engine.events import Frame, Speech
from engine.media.clauses import Clauses
from engine.media.pcm_stream import PcmWriter
from engine.requests import Request, SpeechRequest, TextOperation, TextRequest
from server.errors import Failure
from server.realtime.conversation import Item, SpokenClause, messages, new_id
from server.schemas.realtime import FunctionTool, MaxTokens, NamedFunction
from server.websocket.connection import ClientLeft

if TYPE_CHECKING:
    from pathlib import Path

    from engine.requests import SchedulingOptions

logger = logging.getLogger(__name__)

Emit = Callable[[dict[str, Any]], Awaitable[None]]
"""Sends an event to the client. It waits while the client does not read."""

CHUNK_S = 0.2
"""Seconds of audio in one event, so that an interruption is heard soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsePlan:
    """All that a response is made of."""

    model: str
    speech_model: str
    instructions: str
    speaks: bool
    """Audio and its transcript, rather than text."""
    voice: str | None
    voice_sample: Path | None
    speed: float
    codec: Literal["pcm", "pcmu", "pcma"]
    tools: Sequence[FunctionTool]
    tool_choice: str | NamedFunction
    parallel_tool_calls: bool
    max_output_tokens: MaxTokens
    metadata: Mapping[str, str] | None
    scheduling: SchedulingOptions
    request_id: str
    conversation_id: str | None

    def check_choice(self) -> None:
        """Whether the function that must be called is there.

        Raises:
            InvalidRequest: it is not.

        """
        names = {tool.name for tool in self.tools}
        choice = self.tool_choice
        if choice == "required" and not names:
            raise InvalidRequest("No tools are given.", param="tool_choice")
        if isinstance(choice, NamedFunction) and choice.name not in names:
            raise InvalidRequest(f"No tool has the name {choice.name!r}.", param="tool_choice")

    def chat_body(self, items: Sequence[Item]) -> dict[str, Any]:
        """The body of the chat that generates the response."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages(items, self.instructions),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_output_tokens != "inf":
            body["max_tokens"] = self.max_output_tokens
        if self.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": tool.model_dump(exclude={"type"}, exclude_none=True),
                }
                for tool in self.tools
            ]
            body["parallel_tool_calls"] = self.parallel_tool_calls
            choice = self.tool_choice
            body["tool_choice"] = (
                choice
                if isinstance(choice, str)
                else {"type": "function", "function": {"name": choice.name}}
            )
        return body


@dataclass(slots=True)
class _Output:
    """An item of the response that is being made."""

    item: Item
    index: int
    text: str = ""


@dataclass(slots=True)
class Marks:
    """When each step of a turn was done, in seconds of `time.perf_counter`."""

    speech_end_s: float | None = None
    transcript_s: float | None = None
    first_token_s: float | None = None
    first_audio_s: float | None = None

    def document(self) -> dict[str, float]:
        """Milliseconds after the end of speech; empty for a turn without speech."""
        if self.speech_end_s is None:
            return {}
        steps = {
            "transcript_ms": self.transcript_s,
            "first_token_ms": self.first_token_s,
            "first_audio_ms": self.first_audio_s,
        }
        begin_s = self.speech_end_s
        return {
            name: round((at_s - begin_s) * 1e3, 1)
            for name, at_s in steps.items()
            if at_s is not None
        }


class Response:
    """A response under way. `run` makes it; cancelling that task ends it."""

    def __init__(
        self,
        open_session: Callable[[Request], Awaitable[Any]],
        emit: Emit,
        plan: ResponsePlan,
        marks: Marks,
        keep: Callable[[Item], None],
    ) -> None:
        """`keep` puts a new item into the conversation."""
        self.id = new_id("resp")
        self._open = open_session
        self._emit = emit
        self._plan = plan
        self._marks = marks
        self._keep = keep
        self._outputs: list[_Output] = []
        self._message: _Output | None = None
        self._calls: dict[int, _Output] = {}
        self._usage: Mapping[str, Any] = {}
        self._finish = "stop"
        self._clauses = Clauses()
        self._to_speak: asyncio.Queue[str | None] = asyncio.Queue()
        self._spoken_s = 0.0
        self._cancel_reason: str | None = None
        self._begun = False

    async def run(self, items: Callable[[], Awaitable[Sequence[Item]]]) -> None:
        """Make the response, and tell the client all of it. `items` waits for what is said."""
        await self._emit({"type": "response.created", "response": self._document("in_progress")})
        status = "completed"
        details: dict[str, Any] | None = None
        speaking: asyncio.Task[None] | None = None
        self._begun = True
        try:
            if self._cancel_reason is not None:
                raise asyncio.CancelledError
            given = await items()
            speaking = asyncio.create_task(self._speak()) if self._plan.speaks else None
            await self._generate(given, speaking)
            if speaking is not None:
                self._to_speak.put_nowait(None)
                await speaking
            if self._finish == "length":
                status = "incomplete"
                details = {"type": "incomplete", "reason": "max_output_tokens"}
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None:
                current.uncancel()  # the client still gets the end of the response
            status, details = (
                "cancelled",
                {"type": "cancelled", "reason": self._cancel_reason or "client_cancelled"},
            )
        except ClientLeft:
            raise  # nobody is there to be told
        except Exception as error:
            expected = isinstance(error, EngineError)
            logger.error("response %s failed: %s", self.id, error, exc_info=not expected)
            failure = Failure.of(error)
            status = "failed"
            details = {
                "type": "failed",
                "error": {
                    "type": failure.type,
                    "code": failure.code,
                    "message": failure.message,
                },
            }
        finally:
            if speaking is not None and not speaking.done():
                speaking.cancel()
                await asyncio.wait((speaking,))
        await self._end(status, details)

    def cancel(self, task: asyncio.Task[None], reason: str) -> None:
        """End the response, which `task` runs. The client gets its begin and its end."""
        self._cancel_reason = reason
        if self._begun:  # otherwise it ends as soon as it begins
            task.cancel()

    def left_to_hear_ms(self) -> int:
        """Milliseconds of the audio that a client which plays it cannot have played yet."""
        if self._marks.first_audio_s is None:
            return 0
        played_s = time.perf_counter() - self._marks.first_audio_s
        return max(0, int((self._spoken_s - played_s) * 1e3))

    async def _generate(self, items: Sequence[Item], speaking: asyncio.Task[None] | None) -> None:
        plan = self._plan
        request = TextRequest(
            model=plan.model,
            operation=TextOperation.CHAT,
            body=plan.chat_body(items),
            request_id=f"{plan.request_id}-{self.id}",
            scheduling=plan.scheduling,
        )
        session = await self._open(request)
        try:
            async with aclosing(session.events()) as events:
                async for event in events:
                    if isinstance(event, Frame):
                        for chunk in _chunks(event.data):
                            await self._take(chunk)
                    if speaking is not None and speaking.done():
                        speaking.result()  # its error ends the response
        finally:
            await session.close()
        for clause in self._clauses.finish():
            self._to_speak.put_nowait(clause)

    async def _take(self, chunk: Mapping[str, Any]) -> None:
        if "error" in chunk:
            raise InvalidRequest(str(chunk["error"].get("message", "The model failed.")))
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            if delta.get("content"):
                await self._say(delta["content"])
            for call in delta.get("tool_calls") or ():
                await self._call(call)
            self._finish = choice.get("finish_reason") or self._finish

    async def _say(self, text: str) -> None:
        if self._marks.first_token_s is None:
            self._marks.first_token_s = time.perf_counter()
        if self._message is None:
            part = self._part("")
            document = {"type": "message", "role": "assistant", "content": []}
            self._message = await self._begin_item(document)
            self._message.item.document["content"].append(part)
            shown = _shown_part(part)
            await self._tell("response.content_part.added", self._message, part=shown)
        message = self._message
        message.text += text
        part = message.item.document["content"][0]
        if self._plan.speaks:
            part["transcript"] = message.text
            await self._tell("response.output_audio_transcript.delta", message, delta=text)
            for clause in self._clauses.feed(text):
                self._to_speak.put_nowait(clause)
        else:
            part["text"] = message.text
            await self._tell("response.output_text.delta", message, delta=text)

    def _part(self, text: str) -> dict[str, Any]:
        if self._plan.speaks:
            return {"type": "output_audio", "transcript": text}
        return {"type": "output_text", "text": text}

    async def _call(self, call: Mapping[str, Any]) -> None:
        index = int(call.get("index", 0))
        function = call.get("function") or {}
        output = self._calls.get(index)
        if output is None:
            document = {
                "type": "function_call",
                "call_id": call.get("id") or new_id("call"),
                "name": function.get("name") or "",
                "arguments": "",
            }
            output = self._calls[index] = await self._begin_item(document)
        arguments = function.get("arguments")
        if arguments:
            output.text += arguments
            output.item.document["arguments"] = output.text
            await self._emit(
                {
                    "type": "response.function_call_arguments.delta",
                    "response_id": self.id,
                    "item_id": output.item.id,
                    "output_index": output.index,
                    "call_id": output.item.document["call_id"],
                    "delta": arguments,
                }
            )

    async def _begin_item(self, document: Mapping[str, Any]) -> _Output:
        head = {"id": new_id("item"), "object": "realtime.item", "status": "in_progress"}
        output = _Output(Item({**head, **document}), len(self._outputs))
        self._outputs.append(output)
        await self._tell_item("response.output_item.added", output)
        self._keep(output.item)
        return output

    async def _speak(self) -> None:
        """Speak the clauses in order, each as soon as the one before it is spoken."""
        plan = self._plan
        writer: PcmWriter | None = None
        count = 0
        while (clause := await self._to_speak.get()) is not None:
            if not any(character.isalnum() for character in clause):
                continue
            count += 1
            assert self._message is not None
            spoken = self._message.item.spoken
            request = SpeechRequest(
                model=plan.speech_model,
                text=clause.strip(),
                request_id=f"{plan.request_id}-{self.id}-{count}",
                voice=None if plan.voice_sample is not None else plan.voice,
                voice_sample=plan.voice_sample,
                speed=plan.speed,
                scheduling=plan.scheduling,
            )
            session = await self._open(request)
            try:
                async with aclosing(session.events()) as events:
                    end_s: float | None = None
                    async for event in events:
                        if not isinstance(event, Speech):
                            continue
                        if writer is None:
                            writer = PcmWriter(plan.codec, event.sample_rate)
                        # Before it is sent: an interruption keeps the words that were heard.
                        if end_s is not None:
                            spoken.pop()
                        end_s = (end_s or self._spoken_s) + len(event.samples) / event.sample_rate
                        spoken.append(SpokenClause(clause, end_s * 1e3))
                        await self._send_audio(writer, event)
            finally:
                await session.close()
        if writer is not None:
            await self._send_bytes(await asyncio.to_thread(writer.finish))

    async def _send_audio(self, writer: PcmWriter, speech: Speech) -> None:
        step = max(1, int(CHUNK_S * speech.sample_rate))
        for begin in range(0, len(speech.samples), step):
            piece = speech.samples[begin : begin + step]
            await self._send_bytes(await asyncio.to_thread(writer.write, piece))
            self._spoken_s += len(piece) / speech.sample_rate

    async def _send_bytes(self, audio: bytes) -> None:
        if not audio:
            return
        if self._marks.first_audio_s is None:
            self._marks.first_audio_s = time.perf_counter()
        assert self._message is not None
        delta = base64.b64encode(audio).decode()
        await self._tell("response.output_audio.delta", self._message, delta=delta)

    async def _end(self, status: str, details: Mapping[str, Any] | None) -> None:
        """Tell that each item and the response are done."""
        for output in self._outputs:
            document = output.item.document
            whole = status == "completed" or (status == "incomplete" and _is_whole_call(output))
            document["status"] = "completed" if whole else "incomplete"
            if document["type"] == "message":
                if status == "cancelled" and self._plan.speaks:
                    output.item.cut(self._spoken_s * 1e3)
                await self._end_message(output)
            else:
                await self._emit(
                    {
                        "type": "response.function_call_arguments.done",
                        "response_id": self.id,
                        "item_id": output.item.id,
                        "output_index": output.index,
                        "call_id": document["call_id"],
                        "name": document["name"],
                        "arguments": output.text,
                    }
                )
            await self._tell_item("response.output_item.done", output)
        document = self._document(status, details)
        await self._emit({"type": "response.done", "response": document})

    async def _end_message(self, output: _Output) -> None:
        part = output.item.document["content"][0]
        if self._plan.speaks:
            await self._tell("response.output_audio.done", output)
            await self._tell(
                "response.output_audio_transcript.done", output, transcript=part["transcript"]
            )
        else:
            await self._tell("response.output_text.done", output, text=part["text"])
        await self._tell("response.content_part.done", output, part=_shown_part(part))

    async def _tell(self, kind: str, output: _Output, **more: Any) -> None:
        place = {
            "response_id": self.id,
            "item_id": output.item.id,
            "output_index": output.index,
            "content_index": 0,
        }
        await self._emit({"type": kind, **place, **more})

    async def _tell_item(self, kind: str, output: _Output) -> None:
        await self._emit(
            {
                "type": kind,
                "response_id": self.id,
                "output_index": output.index,
                "item": output.item.document,
            }
        )

    def _document(self, status: str, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
        plan = self._plan
        document: dict[str, Any] = {
            "object": "realtime.response",
            "id": self.id,
            "status": status,
            "status_details": details,
            "output": [output.item.document for output in self._outputs],
            "conversation_id": plan.conversation_id,
            "output_modalities": ["audio" if plan.speaks else "text"],
            "max_output_tokens": plan.max_output_tokens,
            "audio": {"output": {"voice": plan.voice, "format": {"type": f"audio/{plan.codec}"}}},
            "metadata": plan.metadata,
            "usage": None if status == "in_progress" else _usage(self._usage),
        }
        timings = self._marks.document()
        if status != "in_progress" and timings:
            document["roundhouse"] = timings
        return document


def _is_whole_call(output: _Output) -> bool:
    """Whether it is a call with all of its arguments: the tokens ran out after them."""
    if output.item.document["type"] != "function_call":
        return False
    try:
        return isinstance(json.loads(output.text), dict)
    except ValueError:
        return False


def _shown_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part as its own events name it: `audio` and `text`, as OpenAI's types say."""
    return {**part, "type": str(part["type"]).removeprefix("output_")}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    taken, given = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return {
        "total_tokens": taken + given,
        "input_tokens": taken,
        "output_tokens": given,
        "input_token_details": {
            "text_tokens": taken,
            "audio_tokens": 0,
            "image_tokens": 0,
            "cached_tokens": cached,
        },
        "output_token_details": {"text_tokens": given, "audio_tokens": 0},
    }


def _chunks(data: str) -> list[dict[str, Any]]:
    """The documents of a streamed answer's lines."""
    lines = (line.removeprefix("data: ") for line in data.split("\n") if line.startswith("data: "))
    return [json.loads(line) for line in lines if line != "[DONE]"]
