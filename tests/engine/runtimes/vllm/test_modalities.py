"""What a checkpoint of vLLM takes beside text, and the memory that it needs for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.catalog.recognition import recognise
from engine.errors import InvalidRequest
from engine.files.hub.listing import list_folder
from engine.media.attachments import Kind
from engine.runtimes.vllm.checkpoint import ENCODER_TOKENS, IMAGE_TOKENS, Checkpoint
from engine.runtimes.vllm.modalities import check_attachments, limits, senses
from engine.runtimes.vllm.options import VllmOptions
from tests.conftest import StarterDir

TEXT = {"hidden_size": 100, "max_position_embeddings": 8192, "intermediate_size": 200}
EYES = {"hidden_size": 64, "intermediate_size": 128, "patch_size": 16}
PATCH = 4 * 64 + 2 * 128 + 4 * 3 * 256
"""Numbers that an encoder of this shape holds of one patch."""


def checkpoint(folder: Path, **config: Any) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, set()),
        ({"vision_config": {}}, {Kind.IMAGE}),
        ({"image_token_id": 5}, {Kind.IMAGE}),
        ({"vision_config": {}, "audio_config": {}}, {Kind.IMAGE}),
    ],
)
def test_only_images_are_taken_unless_the_options_say_more(
    config: dict[str, Any], expected: set[Kind]
) -> None:
    assert limits(VllmOptions(), senses(config)).keys() == expected
    more = VllmOptions(limit_mm_per_prompt={"audio": 2, "video": 1})
    both: dict[str, Any] = {"vision_config": {}, "audio_config": {}}
    assert limits(more, senses(both)) == {Kind.VIDEO: 1, Kind.AUDIO: 2}


@pytest.mark.parametrize(
    ("config", "patches"),
    [
        ({"scale_factor": 4}, 16),
        ({"vision_config": {**EYES, "spatial_merge_size": 2}}, 4),
        ({"downsample_ratio": 0.5}, 4),
        ({"mm_tokens_per_image": 256, "vision_config": {**EYES, "image_size": 1024}}, 16),
        ({}, 1),
    ],
)
def test_an_encoder_sees_more_patches_than_the_model_tokens(
    tmp_path: Path, config: dict[str, Any], patches: int
) -> None:
    found = checkpoint(tmp_path, **{"text_config": TEXT, "vision_config": EYES, **config})
    options = VllmOptions(max_num_batched_tokens=4096)
    activations = IMAGE_TOKENS * patches * PATCH
    assert found.media_bytes(options, "float16") == 2 * (activations + 4096 * 100)
    # Small images are encoded together.
    smaller = found.media_bytes(options, "float16", 70)
    assert smaller == 2 * (ENCODER_TOKENS * patches * PATCH + 4096 * 100)
    # An image that is larger than a step makes the step larger, up to the context.
    larger = found.media_bytes(options, "float16", 5000)
    assert larger == 2 * (5000 * patches * PATCH + 5000 * 100)
    assert found.media_bytes(options, "float16", 10**6) == 2 * 8192 * (patches * PATCH + 100)


def test_layers_of_the_encoder_that_are_handed_on_count_each(tmp_path: Path) -> None:
    eyes = {**EYES, "deepstack_visual_indexes": [5, 11, 17]}
    found = checkpoint(tmp_path, text_config=TEXT, vision_config=eyes)
    options = VllmOptions(max_num_batched_tokens=4096)
    assert found.media_bytes(options, "float16") == 2 * (2048 * PATCH + 4096 * 100 * 4)


def test_a_folder_of_a_model_that_sees_is_a_language_model(starter_dir: StarterDir) -> None:
    listing = list_folder(starter_dir("tiny-idefics3"))
    entry = recognise(listing).entry("sees", listing.repo)
    assert entry.get("runtime", "vllm") == "vllm"
    assert entry.get("task", "generate") == "generate"
    assert entry["options"] == {"max_model_len": 8192}


PNG = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image_url", "image_url": {"url": PNG.replace("data", "DATA")}},
        {"type": "input_image", "image_url": PNG},
        {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "input_audio", "input_audio": "AAAA"},
    ],
)
def test_what_is_in_the_request_itself_is_taken(part: dict[str, Any]) -> None:
    check_attachments({"messages": [{"content": [part]}]}, {Kind.IMAGE: 1, Kind.AUDIO: 1}, "m")


@pytest.mark.parametrize(
    ("part", "field", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "http://a/"}}, "image_url", "data: URL"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "image_url", "data: URL"),
        ({"type": "image", "source": {"type": "url", "url": "http://a/"}}, "source", "data: URL"),
        ({"type": "image_url", "image_url": {"url": PNG}, "uuid": "a"}, "uuid", "under a name"),
        ({"type": "image_url", "image_url": None, "uuid": "a"}, "uuid", "under a name"),
        ({"type": "image_embeds", "image_embeds": {}}, "image_embeds", "takes no embeddings"),
        ({"type": "video_url", "video_url": {"url": "data:,a"}}, "video_url", "takes no video"),
    ],
)
def test_what_vllm_would_look_up_is_refused(part: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as raised:
        check_attachments({"messages": [{"content": [part]}]}, {Kind.IMAGE: 9}, "m")
    assert raised.value.param == f"messages[0].content[0].{field}"


def test_so_many_of_each_kind() -> None:
    image = {"type": "image_url", "image_url": {"url": PNG}}
    body = {"messages": [{"content": [image, image]}, {"content": [image]}]}
    check_attachments(body, {Kind.IMAGE: 3}, "m")
    with pytest.raises(InvalidRequest, match="may have 2 of kind 'image'") as raised:
        check_attachments(body, {Kind.IMAGE: 2}, "m")
    assert raised.value.param == "messages[1].content[0].image_url"
    with pytest.raises(InvalidRequest, match="takes no image, only text"):
        check_attachments(body, {}, "m")
