"""Conversion of a GGUF file to a folder as Hugging Face has it, in bfloat16."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.conversion.config import TENSORS_OF_CONFIG, generation_config, model_config
from engine.conversion.header import GgufHeader, read_header
from engine.conversion.refusals import TAKE_THE_ORIGINAL, check
from engine.conversion.tokenizer import build_tokenizer, check_tokenizer
from engine.errors import LoadFailed
from engine.files.built_folder import ensure_built
from engine.files.hub.cache import free_disk_bytes
from engine.units import format_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "v1"
"""Part of each folder's path: the version of what a conversion writes."""

BYTES_A_NUMBER = 2
ROOM_FOR_THE_REST = 64 * 2**20
"""Bytes for the tokenizer and the other small files, at most."""

SHARD_SIZE = "5GB"

PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 4, 5, 10, 100, 2026,",
    "def hello(name):\n    return ",
)
"""What the check lets both models continue."""

CHECKED_TOKENS = 8

Tell = Callable[[str], None]


def add_gguf(file: Path, cache_dir: Path, tell: Tell) -> Path:
    """The folder of a converted and checked GGUF file. A file is converted once.

    `tell` gets a line before each step that takes time.

    Raises:
        LoadFailed: the file is not convertible, or the folder does not answer as the file does.

    """
    header = read_header(file)
    _check(header)
    tell(f"reading {file.name} ({format_size(header.nbytes)})")
    folder = cache_dir / "gguf" / FORMAT / _digest(file) / _name(header)
    if folder.is_dir():
        tell(f"it was converted before, to {folder}")
        return folder

    def write(building: Path) -> None:
        tell(f"converting it to {folder}")
        convert_gguf(file, building)
        tell("comparing its answers with those of the file")
        check_answers(file, building)

    return ensure_built(folder, f"the folder of {file.name}", write, durable=True)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file into an empty folder: weights, configuration, tokenizer.

    The caller makes it appear whole or not at all. Takes some minutes for a large model, and
    memory for its weights once, in bfloat16.

    Raises:
        LoadFailed: the file is not convertible; nothing is written then. Or there is no room.
        OSError: the folder cannot be written.

    """
    header = read_header(file)
    _check(header)
    _check_room(header, folder)
    with _libraries():
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = build_tokenizer(header)
        config = model_config(header)
        _check_weights(header, config)
        loaded = _load(header, config)
        # A new model of the same tensors: the loaded one counts as quantised and refuses to save.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = generation_config(config)
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)  # written for this user alone, unlike the others


def check_answers(file: Path, folder: Path) -> None:
    """Let transformers continue a few prompts from the file and from the folder made of it.

    Raises:
        LoadFailed: they differ.

    """
    header = read_header(file)
    with _libraries():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = build_tokenizer(header)
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        wanted = _continue(_load(header, model_config(header)), prompts)
        written = AutoTokenizer.from_pretrained(folder)
        found_prompts = [written(prompt)["input_ids"] for prompt in PROMPTS]
        if found_prompts != prompts:
            raise LoadFailed(f"{file.name}: the written tokenizer splits texts differently")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for prompt, tokens, right in zip(PROMPTS, _continue(model, prompts), wanted, strict=True):
            if tokens != right:
                raise LoadFailed(
                    f"{file.name}: after {prompt!r} the converted model says"
                    f" {written.decode(tokens)!r}, and the file {tokenizer.decode(right)!r}; the"
                    f" conversion is wrong and was removed. {TAKE_THE_ORIGINAL.capitalize()}"
                )


def has_chat_template(folder: Path) -> bool:
    """Whether a converted model knows how a conversation is written."""
    return (folder / "chat_template.jinja").is_file()


def _check(header: GgufHeader) -> None:
    with _libraries():
        check(header)
        check_tokenizer(header)


def _check_room(header: GgufHeader, folder: Path) -> None:
    numbers = sum(tensor.elements for tensor in header.tensors)
    needed = numbers * BYTES_A_NUMBER + ROOM_FOR_THE_REST
    free = free_disk_bytes(folder)
    if needed > free:
        raise LoadFailed(
            f"{header.file.name} needs {format_size(needed)} on the disk of {folder}, where"
            f" {format_size(free)} are free: make room, or choose another cache directory"
        )


def _check_weights(header: GgufHeader, config: PretrainedConfig) -> None:
    """Every tensor of the file has its place in the model, and every place its tensor."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    tensors = {each.name: each for each in header.tensors if each.name not in TENSORS_OF_CONFIG}
    name = header.file.name
    if unknown := sorted(set(tensors) - set(places)):
        raise LoadFailed(
            f"{name} has {len(unknown)} tensors that {config.model_type} of Hugging Face has no"
            f" place for, such as {unknown[0]}; {TAKE_THE_ORIGINAL}"
        )
    weights = model.state_dict()
    filled = {places[each] for each in tensors}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if missing := sorted(set(weights) - filled - tied):
        raise LoadFailed(
            f"{name} lacks {len(missing)} tensors of its model, such as {missing[0]}; is it whole?"
        )
    for each in tensors.values():
        if each.elements != (wanted := weights[places[each.name]].numel()):
            raise LoadFailed(
                f"{name} is damaged: {each.name} has {each.elements:,} numbers, and its header"
                f" asks for {wanted:,}"
            )


def _load(header: GgufHeader, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(header.file.parent),
        gguf_file=header.file.name,
        config=config,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    return model


def _continue(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """The most likely tokens after each prompt."""
    import torch

    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        answer: Any = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=CHECKED_TOKENS,
            pad_token_id=0,
        )
        answers.append(answer[0, len(prompt) :].tolist())
    return answers


@contextmanager
def _libraries() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise LoadFailed(
            f"a GGUF file cannot be converted here: {error}. Install the extra `cpu` or `cuda`"
        ) from error


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _name(header: GgufHeader) -> str:
    """A file's own name, or for one of Ollama, whose name is a hash, that of the model in it."""
    name = header.file.stem
    if header.file.suffix != ".gguf":
        name = str(header.metadata.get("general.name") or header.architecture)
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return kept.strip(".-") or "model"
