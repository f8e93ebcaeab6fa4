"""The files of a pipeline, of its parts, and of its adapters."""

from __future__ import annotations

from pathlib import Path

from engine.runtimes.diffusers.options import IpAdapter

CONFIG_FILES = ("*.json", "*.txt", "*.model")
"""What a pipeline needs beside the weights of its parts. Repositories hold the same weights once
more in one file at their root, for other programs: more than the parts together."""


LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_files(folder: Path | None) -> dict[str, Path]:
    """The adapters of a folder by name."""
    if folder is None or not folder.is_dir():
        return {}
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    for path in sorted(folder.glob(f"*/{LORA_FILE}")):
        found[path.parent.name] = path
    return found


def ip_adapter_files(adapter: IpAdapter) -> tuple[str, ...]:
    """What is read of an IP-Adapter's repository, which holds those of many models."""
    encoder = f"{adapter.subfolder}/image_encoder"
    weights = f"{adapter.subfolder}/{adapter.weight_name}"
    return (weights, f"{encoder}/*.safetensors", f"{encoder}/*.json")


def component_weights(folder: Path, variant: str | None) -> list[Path]:
    """The component's safetensors files, of the variant where it has it."""
    files = sorted(folder.glob("*.safetensors"))
    varied = [path for path in files if variant and f".{variant}." in path.name]
    plain = [path for path in files if path.name.count(".") == 1]
    return varied or plain or files
