"""The files of a pipeline, and of its parts and adapters from elsewhere."""

from __future__ import annotations

from pathlib import Path

from engine.files.hub.selection import HubSource
from engine.files.lora_folder import LORA_FILE
from engine.model_folder import WANTED_FILES
from engine.runtimes.diffusers.families import family_of
from engine.runtimes.diffusers.options import DiffusersOptions, IpAdapter

CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""What a pipeline needs beside the weights of its parts, with the chat template of a language model
that reads the prompt. Many repositories also have one file at their root with all weights, for
other programs. It is larger than the parts together."""


def pipeline_source(source: str, options: DiffusersOptions) -> HubSource:
    """The files of the pipeline's own repository, without those of parts from elsewhere."""
    variant = f".{options.variant}*" if options.variant else ""
    not_used = {*family_of(options.pipeline or "").unused_parts, *options.components}
    without = (f"!{part}/*.safetensors" for part in sorted(not_used))
    return HubSource(
        source, (f"*/*{variant}.safetensors", *CONFIG_FILES, *without), options.revision
    )


def part_source(source: str) -> HubSource:
    """The files of a part from elsewhere, or of a ControlNet."""
    return HubSource(source, WANTED_FILES)


def ip_adapter_source(adapter: IpAdapter) -> HubSource:
    """The files of one IP-Adapter in a repository with those of many models."""
    encoder = f"{adapter.subfolder}/image_encoder"
    weights = f"{adapter.subfolder}/{adapter.weight_name}"
    return HubSource(adapter.source, (weights, f"{encoder}/*.safetensors", f"{encoder}/*.json"))


def lora_source(source: str) -> HubSource:
    """The file of a LoRA."""
    return HubSource(source, (LORA_FILE,))


def component_weights(folder: Path, variant: str | None) -> list[Path]:
    """The component's safetensors files; those of the variant, if it has them."""
    files = sorted(folder.glob("*.safetensors"))
    varied = [path for path in files if variant and f".{variant}." in path.name]
    plain = [path for path in files if path.name.count(".") == 1]
    return varied or plain or files
