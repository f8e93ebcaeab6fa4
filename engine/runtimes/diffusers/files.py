"""The files of a pipeline, and of its parts and adapters from elsewhere."""

from __future__ import annotations

from pathlib import Path

from engine.files.hub.selection import HubSource
from engine.files.lora_folder import LORA_FILE
from engine.model_folder import WANTED_FILES
from engine.runtimes.diffusers.options import IpAdapter

CONFIG_FILES = ("*.json", "*.txt", "*.model")
"""What a pipeline needs beside the weights of its parts. Repositories hold the same weights once
more in one file at their root, for other programs: more than the parts together."""


def part_source(source: str) -> HubSource:
    """What is read of a part that comes from elsewhere, or of a ControlNet."""
    return HubSource(source, WANTED_FILES)


def ip_adapter_source(adapter: IpAdapter) -> HubSource:
    """What is read of an IP-Adapter's repository, which holds those of many models."""
    encoder = f"{adapter.subfolder}/image_encoder"
    weights = f"{adapter.subfolder}/{adapter.weight_name}"
    return HubSource(adapter.source, (weights, f"{encoder}/*.safetensors", f"{encoder}/*.json"))


def lora_source(source: str) -> HubSource:
    """What is read of an adapter's repository."""
    return HubSource(source, (LORA_FILE,))


def component_weights(folder: Path, variant: str | None) -> list[Path]:
    """The component's safetensors files, of the variant where it has it."""
    files = sorted(folder.glob("*.safetensors"))
    varied = [path for path in files if variant and f".{variant}." in path.name]
    plain = [path for path in files if path.name.count(".") == 1]
    return varied or plain or files
