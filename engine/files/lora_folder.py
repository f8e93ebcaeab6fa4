"""A folder of LoRAs: which adapters it holds, by name."""

from __future__ import annotations

from pathlib import Path

from engine.files.atomic import UNFINISHED

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The weights of an adapter that has a folder of its own, as diffusers writes it."""

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
"""The files of an adapter of a language model, as PEFT writes them into a folder of its own."""


def peft_folders(folder: Path | None) -> dict[str, Path]:
    """The adapters of language models in a folder by name: `NAME/` with the files of PEFT."""
    if folder is None or not folder.is_dir():
        return {}
    found = (path.parent for path in sorted(folder.glob(f"*/{PEFT_CONFIG}")))
    return {path.name: path for path in found if not path.name.endswith(UNFINISHED)}


def lora_files(folder: Path | None) -> dict[str, Path]:
    """The adapters of a folder by name: `NAME.safetensors` and `NAME/` with `LORA_FILE`."""
    if folder is None or not folder.is_dir():
        return {}
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    for path in sorted(folder.glob(f"*/{LORA_FILE}")):
        found[path.parent.name] = path
    return found
