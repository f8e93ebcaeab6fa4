"""Images, speech and transcripts of a provider."""

from __future__ import annotations

import base64
import io
import json
import struct
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import InvalidRequest, ProviderFailed
from engine.events import Event, Heard, ImageResult, Segment, Speech
from engine.requests import (
    ImageOperation,
    ImageRequest,
    LoraChoice,
    Quality,
    SpeechRequest,
    TranscriptionOperation,
    TranscriptionRequest,
)
from tests.engine.runtimes.remote.conftest import KEY, World
from tests.engine.runtimes.remote.upstream import Received, Wire, answers, streams

RED = Image.new("RGB", (8, 4), "red")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def b64(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def form(received: Received) -> dict[str, list[Any]]:
    """The fields of a form; of a file its name and bytes."""
    head = f"content-type: {received.headers['content-type']}\r\n\r\n".encode()
    found: dict[str, list[Any]] = {}
    for part in BytesParser(policy=HTTP).parsebytes(head + received.body).iter_parts():
        name = part.get_param("name", header="content-disposition")
        content: Any = part.get_payload(decode=True)
        file = part.get_filename()
        value = (file, content) if file else content.decode()
        found.setdefault(str(name), []).append(value)
    return found


def image(**fields: Any) -> ImageRequest:
    fields = {"operation": ImageOperation.GENERATION, "prompt": "a train", **fields}
    return ImageRequest(model="asked", request_id="req-1", **fields)


def result(events: list[Event]) -> ImageResult:
    (found,) = events
    assert isinstance(found, ImageResult)
    return found


async def test_a_generation(world: World) -> None:
    world.upstream.usual = answers({"data": [{"b64_json": b64(RED)}] * 2, "seed": 7})
    request = image(n=2, width=512, height=256, quality=Quality.HIGH, seed=7, steps=3)
    found = result(await world.run(request, task="image", extra_fields=["seed", "steps"]))
    assert [each.size for each in found.images] == [(8, 4)] * 2 and found.seed == 7
    assert found.images[0].getpixel((0, 0)) == (255, 0, 0)
    (received,) = world.upstream.requests
    assert received.path == "/v1/images/generations"
    assert received.json == {
        "model": "their-model", "n": 2, "prompt": "a train", "size": "512x256", "quality": "high",
        "response_format": "b64_json", "seed": 7, "steps": 3,
    }  # fmt: skip
    assert (world.usage.images, world.usage.pixels) == (2, 32)


async def test_a_model_that_knows_only_base64(world: World) -> None:
    counts = {"input_tokens": 5, "output_tokens": 1000}
    world.upstream.usual = answers({"data": [{"b64_json": b64(RED)}], "usage": counts})
    found = result(await world.run(image(), task="image", model="gpt-image-1"))
    assert found.seed is None, "nobody has said"
    assert "response_format" not in world.upstream.requests[0].json
    assert world.usage.output_tokens == 1000


async def test_an_edit_with_a_mask(world: World) -> None:
    world.upstream.usual = answers({"data": [{"b64_json": b64(RED)}]})
    mask = Image.new("L", (8, 4), 0)
    mask.putpixel((3, 2), 255)  # painted anew
    request = image(operation=ImageOperation.EDIT, images=(RED,), mask=mask)
    await world.run(request, task="image")
    (received,) = world.upstream.requests
    assert received.path == "/v1/images/edits"
    fields = form(received)
    assert fields["model"] == ["their-model"] and fields["prompt"] == ["a train"]
    ((_, sent),) = fields["mask"]
    alpha = Image.open(io.BytesIO(sent)).getchannel("A")
    assert alpha.getpixel((3, 2)) == 0 and alpha.getpixel((0, 0)) == 255
    ((_, source),) = fields["image"]
    assert Image.open(io.BytesIO(source)).size == (8, 4)


async def test_several_sources_and_variations(world: World) -> None:
    world.upstream.usual = answers({"data": [{"b64_json": b64(RED)}]})
    await world.run(image(operation=ImageOperation.EDIT, images=(RED, RED)), task="image")
    await world.run(image(operation=ImageOperation.VARIATION, images=(RED,)), task="image")
    edit, variation = world.upstream.requests
    assert len(form(edit)["image[]"]) == 2
    assert variation.path == "/v1/images/variations" and "prompt" not in form(variation)


async def test_an_image_at_a_url_of_the_provider(world: World) -> None:
    own = world.upstream.url.removesuffix("/v1")
    world.upstream.script = [answers({"data": [{"url": f"{own}/files/a.png"}]})]

    async def file(_: Received, wire: Wire) -> None:
        raw = png(RED)
        await wire.head(kind="image/png", content_length=str(len(raw)))
        await wire.raw(raw)

    world.upstream.usual = file
    assert result(await world.run(image(), task="image")).images[0].size == (8, 4)
    received = world.upstream.requests[-1]
    assert (received.method, received.path) == ("GET", "/files/a.png")
    assert KEY not in str(received.headers), "a file is read without our key"


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://elsewhere.example/a.png",
        "file:///etc/passwd",
        "http://127.0.0.1:1/a.png",
        "https://files.example:8443/a.png",
        "https://files.example@169.254.169.254/a.png",
    ],
)
async def test_an_image_elsewhere_is_not_fetched(world: World, url: str) -> None:
    world.upstream.usual = answers({"data": [{"url": url}]})
    with pytest.raises(ProviderFailed, match="media_hosts"):
        await world.run(image(), task="image", media_hosts=["files.example"])
    assert len(world.upstream.requests) == 1


@pytest.mark.parametrize(
    "data",
    [[], None, [{}], [{"b64_json": "?"}], [{"b64_json": base64.b64encode(b"no picture").decode()}]],
)
async def test_what_is_no_image(world: World, data: Any) -> None:
    world.upstream.usual = answers({"data": data})
    with pytest.raises(ProviderFailed):
        await world.run(image(), task="image", retries=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"negative_prompt": "x"}, "negative_prompt"),
        ({"steps": 3}, "steps"),
        ({"guidance": 3.0}, "guidance"),
        ({"seed": 0}, "seed"),
        ({"strength": 0.5}, "strength"),
        ({"loras": (LoraChoice("a"),)}, "loras"),
        ({"control_image": RED}, "control_image"),
        ({"reference_image": RED}, "reference_image"),
        ({"partial_images": 1}, "partial_images"),
    ],
)
def test_a_field_that_the_provider_does_not_take(
    world: World, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        world.runtime.prepare(world.config("image"), image(**fields))
    assert raised.value.param == param


def wav(samples: Any, rate: int = 16_000) -> bytes:
    data = np.asarray(samples, "<i2").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0xFFFFFFFF, b"WAVE", b"fmt ", 16, 1, 1, rate,
                       2 * rate, 2, 16, b"data", 0xFFFFFFFF)  # fmt: skip
    return head + data


def speech(**fields: Any) -> SpeechRequest:
    return SpeechRequest(model="asked", text="Hello there.", request_id="req-1", **fields)


async def test_speech_is_passed_on_as_it_arrives(world: World) -> None:
    raw = wav(range(0, 16_000, 4))
    pieces = [raw[at : at + 1001] for at in range(0, len(raw), 1001)]
    world.upstream.usual = streams(*pieces, kind="audio/wav")
    request = speech(voice="alloy", speed=1.5, language="en")
    options = {"voices": {"alloy": "theirs"}, "extra_fields": ["language"]}
    events = await world.run(request, task="speech", **options)
    samples = []
    for event in events:
        assert isinstance(event, Speech) and event.sample_rate == 16_000
        samples.append(event.samples)
    assert len(samples) > 3
    np.testing.assert_allclose(np.concatenate(samples), np.arange(0, 16_000, 4) / 32768)
    (received,) = world.upstream.requests
    assert received.path == "/v1/audio/speech"
    assert received.json == {
        "model": "their-model", "input": "Hello there.", "response_format": "wav",
        "voice": "theirs", "speed": 1.5, "language": "en",
    }  # fmt: skip
    assert world.usage.characters == 12


async def test_bare_pcm(world: World) -> None:
    world.upstream.usual = streams(b"\0", b"\x40\0\x80", kind="audio/pcm")
    options = {"audio_format": "pcm", "sample_rate": 22_050, "voice": "nova"}
    events = await world.run(speech(), task="speech", **options)
    assert [e.sample_rate for e in events if isinstance(e, Speech)] == [22_050]
    assert world.upstream.requests[0].json["voice"] == "nova"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (answers({"ok": True}), "application/json in the place of audio"),
        (streams(b"ID3" + bytes(100), kind="audio/mpeg"), "no WAV file"),
        (streams(kind="audio/wav"), "no audio"),
    ],
    ids=["json", "mp3", "empty"],
)
async def test_what_is_no_speech(world: World, behaviour: Any, message: str) -> None:
    world.upstream.usual = behaviour
    with pytest.raises(ProviderFailed, match=message):
        await world.run(speech(), task="speech", retries=0)


async def test_speech_that_breaks_off(world: World) -> None:
    raw = wav(range(1000))
    world.upstream.usual = streams(raw[:500], raw[500:900], kind="audio/wav", ends=False)
    with pytest.raises(ProviderFailed, match="in the middle of its answer"):
        await world.run(speech(), task="speech")
    assert len(world.upstream.requests) == 1


@pytest.mark.parametrize("field", ["language", "seed"])
def test_fields_of_speech_that_the_provider_does_not_take(world: World, field: str) -> None:
    request = speech(**{field: "en" if field == "language" else 1})
    with pytest.raises(InvalidRequest) as raised:
        world.runtime.prepare(world.config("speech"), request)
    assert raised.value.param == field


def test_voices_are_those_of_the_configuration(world: World) -> None:
    config = world.config("speech", voice="nova", voices={"alloy": "theirs"})
    assert [voice.id for voice in world.runtime.voices(config)] == ["nova", "alloy"]


def recording(**fields: Any) -> TranscriptionRequest:
    fields = {"audio": b"OggS-and-so-on", **fields}
    return TranscriptionRequest(model="asked", request_id="req-1", **fields)


TRANSCRIPT: dict[str, Any] = {
    "task": "transcribe",
    "language": "english",
    "duration": "3.5",
    "text": "Hello there. How are you?",
    "segments": [
        {"id": 0, "seek": 3, "start": 0.0, "end": 1.5, "text": " Hello there.", "tokens": [1, 2],
         "temperature": 0.2, "avg_logprob": -0.5, "compression_ratio": 1.5, "no_speech_prob": 0.1},
        {"id": 1, "seek": 3, "start": 1.5, "end": 3.5, "text": " How are you?"},
    ],
    "words": [
        {"word": "Hello", "start": 0.0, "end": 0.5},
        {"word": "there", "start": 0.5, "end": 1.4},
        {"word": "How", "start": 1.5, "end": 2.0},
        {"word": "you", "start": 3.6, "end": 3.7},
    ],
}  # fmt: skip


async def test_a_transcript(world: World) -> None:
    world.upstream.usual = answers(TRANSCRIPT)
    request = recording(language="en", prompt="Hi", temperature=0.5, word_times=True, vad=True)
    heard, *segments = await world.run(request, task="transcribe", extra_fields=["vad"])
    assert heard == Heard("english", 3.5)
    assert all(isinstance(each, Segment) for each in segments)
    assert [each.text for each in segments if isinstance(each, Segment)] == [
        " Hello there.",
        " How are you?",
    ]
    first, second = segments
    assert isinstance(first, Segment) and isinstance(second, Segment)
    assert (first.tokens, first.avg_logprob, first.seek) == ((1, 2), -0.5, 3)
    assert [word.text for word in first.words] == ["Hello", "there"]
    assert [word.text for word in second.words] == ["How", "you"]
    (received,) = world.upstream.requests
    assert received.path == "/v1/audio/transcriptions"
    assert form(received) == {
        "model": ["their-model"], "response_format": ["verbose_json"], "language": ["en"],
        "prompt": ["Hi"], "temperature": ["0.5"], "vad": ["true"],
        "timestamp_granularities[]": ["word", "segment"],
        "file": [("audio.ogg", b"OggS-and-so-on")],
    }  # fmt: skip
    assert world.usage.heard_s == 3.5


async def test_a_translation(world: World) -> None:
    world.upstream.usual = answers(TRANSCRIPT)
    request = recording(operation=TranscriptionOperation.TRANSLATION)
    await world.run(request, task="transcribe")
    assert world.upstream.requests[0].path == "/v1/audio/translations"


async def test_segments_without_spaces_are_joined_with_them(world: World) -> None:
    parts = [{"text": "Hello there.", "start": 0, "end": 1}, {"text": "How?", "start": 1, "end": 2}]
    world.upstream.usual = answers({"text": "Hello there. How?", "segments": parts})
    _, *segments = await world.run(recording(), task="transcribe")
    text = "".join(each.text for each in segments if isinstance(each, Segment))
    assert text == " Hello there. How?"


async def test_a_transcript_without_times(world: World) -> None:
    usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 45}
    world.upstream.usual = answers({"text": "Hello.", "usage": usage})
    audio = wav(np.zeros(16_000))
    request = recording(audio=audio, language="en")
    heard, segment = await world.run(request, task="transcribe", transcript="json")
    assert isinstance(heard, Heard) and heard.language == "en"
    assert isinstance(segment, Segment) and segment.text == "Hello."
    assert (world.usage.input_tokens, world.usage.output_tokens) == (14, 45)
    assert form(world.upstream.requests[0])["file"][0][0] == "audio.wav"
    with pytest.raises(InvalidRequest, match="gives no times"):
        world.runtime.prepare(
            world.config("transcribe", transcript="json"), recording(word_times=True)
        )


async def test_silence(world: World) -> None:
    world.upstream.usual = answers({"text": "", "duration": 2.0, "segments": []})
    assert await world.run(recording(), task="transcribe") == [Heard("unknown", 2.0)]


@pytest.mark.parametrize("document", [{}, {"text": None}, {"segments": []}])
async def test_what_is_no_transcript(world: World, document: Any) -> None:
    world.upstream.usual = answers(json.dumps(document))
    with pytest.raises(ProviderFailed, match="no transcript"):
        await world.run(recording(), task="transcribe", retries=0)


@pytest.mark.parametrize("field", ["vad", "hotwords"])
def test_fields_of_recordings_that_the_provider_does_not_take(world: World, field: str) -> None:
    request = recording(**{field: True if field == "vad" else "Roundhouse"})
    with pytest.raises(InvalidRequest) as raised:
        world.runtime.prepare(world.config("transcribe"), request)
    assert raised.value.param == field
