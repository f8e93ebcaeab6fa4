"""The folder of a pipeline: `model_index.json` and a folder for each component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from engine.process.gate import GATE
from engine.starters.json_text import write_json


@dataclass(frozen=True, slots=True)
class Files:
    """A component that transformers loads, whose files this package writes itself.

    The files that `save_pretrained` writes for tokenizers and image processors depend on what
    else is installed, and differ from those of the real repositories.
    """

    class_name: str
    write: Callable[[Path], None]


def write_pipeline(
    folder: Path, class_name: str, components: Mapping[str, Any], **settings: Any
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads; a component may be None."""
    index: dict[str, Any] = {
        "_class_name": class_name,
        "_diffusers_version": diffusers_version,
        **settings,
    }
    for name, component in components.items():
        if component is None:
            index[name] = [None, None]
        elif isinstance(component, Files):
            (folder / name).mkdir()
            component.write(folder / name)
            index[name] = ["transformers", component.class_name]
        else:
            save(component, folder / name)
            index[name] = [type(component).__module__.partition(".")[0], type(component).__name__]
    write_json(folder / "model_index.json", index)


def save(component: Any, folder: Path) -> None:
    """Save a component of diffusers or transformers, without the progress bar of the latter."""
    settings: dict[str, Any] = {}
    if isinstance(component, CLIPTextModel):
        # transformers 5 has no level `text_model` in this class, but has it in the class with a
        # projection; the repositories have it in both.
        tensors = component.state_dict()
        settings["state_dict"] = {f"text_model.{key}": value for key, value in tensors.items()}
    with GATE.exclusive():
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            component.save_pretrained(folder, **settings)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
