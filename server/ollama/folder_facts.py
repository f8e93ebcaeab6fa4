"""What the files of a model say of it: its family, its size, and what it can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files.safetensors_header import tensor_sizes
from engine.model_folder import PresentFolders

if TYPE_CHECKING:
    from engine.config import ModelConfig

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR = "preprocessor_config.json"
WATCHED = (
    CONFIG,
    TOKENIZER_CONFIG,
    TEMPLATE,
    PROCESSOR,
    "model.safetensors",
    "model.safetensors.index.json",
)
_SIGHT = ("vision", "visual", "image", "img")
"""Parts of the names of keys that only the configuration of a model with eyes has."""


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """What a folder with a model's files says."""

    folder: Path
    modified_at: float
    """Unix seconds."""
    family: str = ""
    """transformers' `model_type`."""
    architecture: str = ""
    parameters: int | None = None
    """How many weights there are; None if they are packed, or elsewhere."""
    quantization: str = ""
    """The method, or the dtype of most weights."""
    context: int | None = None
    """Tokens."""
    embedding_length: int | None = None
    sees: bool = False
    template: str = ""
    """The chat template; empty if there is none."""


class FactsReader:
    """Reads the facts of models whose files are here. They are read again once files change."""

    def __init__(self, cache_dir: Path) -> None:
        self._folders = PresentFolders(cache_dir, read_folder, WATCHED)

    def facts(self, model: ModelConfig) -> FolderFacts | None:
        """What the files of a model say; None if they are not here, or cannot be read."""
        revision = model.options.get("revision")
        try:
            return self._folders.get(model.source, revision if isinstance(revision, str) else None)
        except (OSError, ValueError):
            return None


def read_folder(folder: Path) -> FolderFacts:
    """The facts of a folder. Reads headers and small files only.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.

    """
    path = folder / CONFIG
    if not path.is_file():
        return FolderFacts(folder, folder.stat().st_mtime)
    config = _read(path)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    tensors = tensor_sizes(sorted(folder.glob("*.safetensors")))
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    counts: dict[str, int] = {}
    for kind, count in tensors.values():
        counts[kind] = counts.get(kind, 0) + count
    architectures = config.get("architectures")
    return FolderFacts(
        folder=folder,
        modified_at=path.stat().st_mtime,
        family=str(config.get("model_type") or ""),
        architecture=str(architectures[0]) if isinstance(architectures, list) else "",
        parameters=sum(counts.values()) if counts and quantized is None else None,
        quantization=str(method or max(counts, key=lambda kind: counts[kind], default="")).upper(),
        context=_whole(text.get("max_position_embeddings")),
        embedding_length=_whole(text.get("hidden_size")),
        sees=(folder / PROCESSOR).exists() or any(part in key for key in config for part in _SIGHT),
        template=_template(folder),
    )


def _template(folder: Path) -> str:
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    found = _read(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{path.name} is no object")
    return document


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
