"""A folder of LoRAs: which adapters it holds, by name."""

from __future__ import annotations

from pathlib import Path

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The weights of an adapter that has a folder of its own, as diffusers writes it."""


def lora_files(folder: Path | None) -> dict[str, Path]:
    """The adapters of a folder by name: `NAME.safetensors` and `NAME/` with `LORA_FILE`."""
    if folder is None or not folder.is_dir():
        return {}
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    for path in sorted(folder.glob(f"*/{LORA_FILE}")):
        found[path.parent.name] = path
    return found
