"""The files of a model that tells speakers apart, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.files.hub.selection import HubSource
from engine.runtimes.sherpa_diarization.options import SherpaDiarizationOptions

RATE = 16_000
"""Hertz of all samples. No published model has another."""

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "segmentation": (
        "num_speakers",
        "powerset_max_classes",
        "num_classes",
        "sample_rate",
        "window_size",
        "receptive_field_size",
        "receptive_field_shift",
    ),
    "wespeaker": ("output_dim", "sample_rate", "normalize_samples"),
    "3d-speaker": ("output_dim", "sample_rate", "normalize_samples"),
    "nemo": ("output_dim", "feat_dim", "sample_rate", "window_size_ms", "window_stride_ms"),
}
"""Numbers that the metadata of each kind of file must have."""

NORMALIZATIONS: Mapping[str, tuple[str, ...]] = {
    "wespeaker": ("", "global-mean"),
    "3d-speaker": ("", "global-mean"),
    "nemo": ("", "per_feature"),
}
"""What the library can do to the spectrogram for each kind of embedding."""


def hub_sources(model: ModelConfig) -> tuple[HubSource, ...]:
    """Where the two files come from: one source, or two."""
    options = model.options_as(SherpaDiarizationOptions)
    if options.embedding_source is None:
        files = (options.segmentation, options.embedding)
        return (HubSource(model.source, files, options.revision),)
    return (
        HubSource(model.source, (options.segmentation,), options.revision),
        HubSource(options.embedding_source, (options.embedding,), options.embedding_revision),
    )


def check_file(path: Path) -> Path:
    """The same path.

    Raises:
        LoadFailed: there is no such file.

    """
    if not path.is_file():
        raise LoadFailed(f"{path.parent.name}: no {path.name}")
    return path


def numbers_of(kind: str, metadata: Mapping[str, str], name: str) -> dict[str, int]:
    """The numbers of a file's metadata.

    The library ends the whole process where one is missing, so it must not get to see such a file.

    Raises:
        LoadFailed: one is missing, or is no number above or equal 0.

    """
    found = {}
    for key in NUMBERS[kind]:
        value = metadata.get(key, "")
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise LoadFailed(f"{name}: its metadata has no number {key}")
        found[key] = int(value)
    return found


def check_embedding(metadata: Mapping[str, str], name: str) -> None:
    """Return if the library takes an embedding model with this metadata.

    Raises:
        LoadFailed: it would end the process instead.

    """
    kind = metadata.get("framework", "")
    if kind not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise LoadFailed(f"{name}: its metadata has no framework that is served; there is {known}")
    numbers = numbers_of(kind, metadata, name)
    if not numbers["output_dim"] or numbers["sample_rate"] != RATE:
        raise LoadFailed(f"{name}: it must give numbers for samples at {RATE} Hz")
    if not metadata.get("language"):
        raise LoadFailed(f"{name}: its metadata has no language")
    if metadata.get("feature_normalize_type", "") not in NORMALIZATIONS[kind]:
        raise LoadFailed(f"{name}: its feature_normalize_type is not served")
