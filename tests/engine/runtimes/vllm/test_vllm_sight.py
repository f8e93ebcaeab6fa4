"""A model that sees, through the real runtime. The yardstick is transformers on the same folder."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image, ImageDraw

from engine.config import ModelConfig
from engine.errors import InvalidRequest
from engine.events import Document
from engine.memory.host_memory import HostMemory
from engine.requests import TextOperation, TextRequest
from engine.runtimes.vllm.model import VllmModel
from engine.runtimes.vllm.runtime import VllmRuntime
from tests.conftest import StarterDir
from tests.engine.conftest import MakeModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.usefixtures("frozen_heap"),
]

NAME = "tiny-idefics3"
TOKENS = 24
QUESTION = "What is this?"


def drawing() -> Image.Image:
    image = Image.new("RGB", (300, 90), "green")
    ImageDraw.Draw(image).ellipse((20, 10, 80, 80), fill="white")
    return image


PICTURES = {
    "red": Image.new("RGB", (64, 64), "red"),
    "blue": Image.new("RGB", (64, 64), "blue"),
    "drawing": drawing(),
}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def asked(*images: Image.Image, text: str = QUESTION, **more: Any) -> TextRequest:
    content = [*map(part, images), {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, **more}
    return TextRequest("sees", TextOperation.CHAT, {"temperature": 0, **body}, "test")


async def document(
    runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, request: TextRequest
) -> dict[str, Any]:
    prepared = runtime.prepare(model, request)
    (event,) = [each async for each in loaded.run(prepared)]
    assert isinstance(event, Document)
    found: dict[str, Any] = json.loads(event.body)
    found["counted"] = prepared.usage
    return found


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    options = {"dtype": "float32", "max_model_len": 1024, "kv_cache": "16MiB"}
    options |= {"mm_processor_cache": "8MiB", "limit_mm_per_prompt": {"image": 3}}
    return ModelConfig(id="sees", source=f"starter:{NAME}", options=options)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def loaded(vllm_runtime: VllmRuntime, model: ModelConfig) -> AsyncIterator[VllmModel]:
    context = vllm_runtime.context
    vllm_runtime.context = replace(context, host=HostMemory(2**30, pinned=False))
    loaded = await vllm_runtime.load(model, lambda _: None)
    assert isinstance(loaded, VllmModel)
    yield loaded
    await vllm_runtime.unload(loaded)
    vllm_runtime.context = context


Expected = Callable[[Sequence[Image.Image], str], tuple[str, int]]


@pytest.fixture(scope="module")
def expected(starter_dir: StarterDir) -> Expected:
    """The text that transformers writes, and the tokens of the prompt."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = starter_dir(NAME)
    processor = AutoProcessor.from_pretrained(folder)
    bare = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(images: Sequence[Image.Image], text: str) -> tuple[str, int]:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(
            text=prompt, images=list(images) or None, return_tensors="pt", add_special_tokens=False
        )
        found = bare.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        return processor.tokenizer.decode(found[0, length:], skip_special_tokens=True), length

    return generate


async def test_pictures_are_told_apart_as_transformers_does(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, expected: Expected
) -> None:
    texts = {}
    for name, image in PICTURES.items():
        answer = await document(vllm_runtime, model, loaded, asked(image))
        text, tokens = expected([image], QUESTION)
        assert text_of(answer) == text
        assert answer["usage"]["prompt_tokens"] == tokens
        assert answer["counted"].input_tokens == tokens
        texts[name] = text
    assert len(set(texts.values())) == len(PICTURES)
    again = await document(vllm_runtime, model, loaded, asked(PICTURES["red"]))
    assert text_of(again) == texts["red"]


async def test_several_pictures_of_one_request_stand_in_their_order(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, expected: Expected
) -> None:
    pair = [PICTURES["red"], PICTURES["drawing"]]
    found = {}
    for images in (pair, pair[::-1]):
        answer = await document(vllm_runtime, model, loaded, asked(*images))
        assert text_of(answer) == expected(images, QUESTION)[0]
        found[text_of(answer)] = images
    assert len(found) == 2


async def test_pictures_and_texts_share_steps(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, expected: Expected
) -> None:
    requests = [
        (images, text)
        for text in ("Hello, who are you?", "One two three", QUESTION)
        for images in ([], [PICTURES["red"]], [PICTURES["drawing"], PICTURES["blue"]])
    ]
    answers = await asyncio.gather(
        *(
            document(vllm_runtime, model, loaded, asked(*images, text=text))
            for images, text in requests
        )
    )
    for (images, text), answer in zip(requests, answers, strict=True):
        assert text_of(answer) == expected(images, text)[0]


async def test_a_park_drops_what_was_kept_of_pictures(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel
) -> None:
    request = asked(PICTURES["drawing"])
    before = text_of(await document(vllm_runtime, model, loaded, request))
    renderer = loaded.llm.renderer
    core = loaded.client.core
    runner = core.model_executor.driver_worker.worker.model_runner
    assert renderer.mm_processor_cache._cache.currsize
    assert runner.encoder_cache
    names = [block.name for block in loaded.blocks() if block.parkable]
    assert {"weights", "kv_cache", "workspace"} <= set(names)
    await vllm_runtime.park(loaded, names)
    assert not renderer.mm_processor_cache._cache.currsize
    assert not runner.encoder_cache
    await vllm_runtime.wake(loaded, names)
    assert text_of(await document(vllm_runtime, model, loaded, request)) == before


async def test_counting_the_tokens_of_a_picture_does_not_spoil_the_next_request(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel
) -> None:
    """vLLM keeps what it has sent to a core. A request that is only counted is sent to none."""
    image = Image.new("RGB", (70, 40), "yellow")
    source = {"type": "base64", "media_type": "image/png", "data": data_url(image).split(",")[1]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    count = TextRequest("sees", TextOperation.COUNT_TOKENS, {"messages": messages}, "count")
    counted = await document(vllm_runtime, model, loaded, count)
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
    request = TextRequest("sees", TextOperation.MESSAGES, body, "ask")
    answer = await document(vllm_runtime, model, loaded, request)
    assert answer["usage"]["input_tokens"] == counted["input_tokens"] > 40
    chat = await document(vllm_runtime, model, loaded, asked(image))
    assert text_of(chat) == answer["content"][0]["text"]


async def test_the_same_picture_by_every_interface_has_the_same_answer(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, expected: Expected
) -> None:
    image = PICTURES["drawing"]
    content = [
        {"type": "input_image", "image_url": data_url(image)},
        {"type": "input_text", "text": QUESTION},
    ]
    body = {
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": TOKENS,
        "temperature": 0,
    }
    request = TextRequest("sees", TextOperation.RESPONSES, body, "test")
    answer = await document(vllm_runtime, model, loaded, request)
    assert answer["output"][-1]["content"][0]["text"] == expected([image], QUESTION)[0]


async def test_the_workspace_counts_encoder_and_caches(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel
) -> None:
    core = loaded.client.core
    manager = core.scheduler.encoder_cache_manager
    runner = core.model_executor.driver_worker.worker.model_runner
    hidden = 192 * 4
    kept = manager.cache_size * hidden
    ready = loaded.llm.renderer.mm_processor_cache._cache.maxsize
    assert ready == 8 * 2**20
    assert runner.mm_budget.encoder_compute_budget <= 1024
    (workspace,) = (each for each in loaded.blocks() if each.name == "workspace")
    plain = model.model_copy(
        update={"options": {**model.options, "limit_mm_per_prompt": {"image": 0}}}
    )
    (without,) = (
        each.nbytes for each in vllm_runtime.estimate(plain).blocks if each.name == "workspace"
    )
    assert workspace.nbytes - without > ready + kept


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "input_audio"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}, "video_url"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "image_url"),
        ({"image_url": "https://example.com/a.png"}, "image_url"),
        ({"type": "image_embeds", "image_embeds": "AA"}, "image_embeds"),
        ({**part(PICTURES["red"]), "uuid": "mine"}, "uuid"),
    ],
)
async def test_what_the_model_does_not_take_is_refused_by_name(
    vllm_runtime: VllmRuntime, model: ModelConfig, content: dict[str, Any], param: str
) -> None:
    vllm_runtime._folder(model)
    body = {"messages": [{"role": "user", "content": [content]}]}
    with pytest.raises(InvalidRequest) as caught:
        vllm_runtime.prepare(model, TextRequest("sees", TextOperation.CHAT, body, "test"))
    assert caught.value.param == f"messages[0].content[0].{param}"


async def test_a_model_of_text_takes_no_picture(
    vllm_runtime: VllmRuntime, make_model: MakeModel
) -> None:
    llama = make_model("llama")
    vllm_runtime._folder(llama)
    assert vllm_runtime.inputs(llama) == frozenset({"text"})
    with pytest.raises(InvalidRequest, match="takes no image, only text") as caught:
        vllm_runtime.prepare(llama, asked(PICTURES["red"]))
    assert caught.value.param == "messages[0].content[0].image_url"


async def test_more_pictures_than_the_options_allow(
    vllm_runtime: VllmRuntime, model: ModelConfig
) -> None:
    vllm_runtime._folder(model)
    assert vllm_runtime.inputs(model) == frozenset({"text", "image"})
    with pytest.raises(InvalidRequest, match=r"may have 3 .*limit_mm_per_prompt") as caught:
        vllm_runtime.prepare(model, asked(*[PICTURES["red"]] * 4))
    assert caught.value.param == "messages[0].content[3].image_url"


@pytest.mark.parametrize("name", ["mm_processor_kwargs", "media_io_kwargs"])
@pytest.mark.parametrize("operation", [TextOperation.CHAT, TextOperation.TOKENIZE])
async def test_a_request_cannot_change_how_pictures_are_read(
    vllm_runtime: VllmRuntime, model: ModelConfig, name: str, operation: TextOperation
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], name: {"size": {"longest_edge": 9}}}
    with pytest.raises(InvalidRequest) as caught:
        vllm_runtime.prepare(model, TextRequest("sees", operation, body, "test"))
    assert caught.value.param == name


@pytest.mark.parametrize("pictures", [0, 1])
async def test_the_mark_of_a_picture_in_a_text_is_no_picture(
    vllm_runtime: VllmRuntime, model: ModelConfig, loaded: VllmModel, pictures: int
) -> None:
    images = [PICTURES["red"]] * pictures
    try:
        await document(vllm_runtime, model, loaded, asked(*images, text="an <image> here"))
    except InvalidRequest as error:
        assert error.param == "messages"
    # Whatever became of it, the model answers the next one.
    assert text_of(await document(vllm_runtime, model, loaded, asked(PICTURES["blue"])))
