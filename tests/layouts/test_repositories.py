"""What every repository of `data/` has in common: its figures, what is fetched, what is added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.catalog.downloads import sources_of
from engine.catalog.recognition import recognise
from engine.files.hub.listing import list_folder
from tests.layouts.configured import configured, repositories
from tests.layouts.layout import Layout, layouts

EVERY = [pytest.param(each, id=name) for name, each in layouts().items()]
WHOLE = [pytest.param(each, id=name) for name, each in layouts().items() if each.entry]
"""Those that are no part of other models."""


@pytest.mark.parametrize("layout", EVERY)
def test_the_tensors_add_up_to_what_is_published(layout: Layout) -> None:
    tensors = dict(layout.tensors())
    published = layout.published
    assert sum(each.nbytes for each in tensors.values()) == pytest.approx(
        published["bytes"], rel=published.get("tolerance", 0)
    )
    if "tensors" in published:
        assert len(tensors) == published["tensors"]


@pytest.mark.parametrize("layout", EVERY)
def test_all_that_a_model_reads_is_fetched_and_nothing_else(layout: Layout) -> None:
    configs = [
        source
        for model in configured()
        for source in sources_of(model)
        if source.repo == layout.repository
    ]
    for source in configs or sources_of(layout.model(layout.repository)):
        assert layout.fetched(source) == layout.sizes.keys() - layout.left


@pytest.mark.parametrize("layout", WHOLE)
def test_the_entry_that_is_added(layout: Layout, tmp_path: Path) -> None:
    texts = [path for path in layout.sizes if path.endswith((".json", ".jinja"))]
    listing = layout.listing(layout.build(tmp_path, only=texts))
    entry = recognise(listing).entry("new", layout.repository)
    assert entry == {"id": "new", "source": layout.repository, **(layout.entry or {})}


def test_every_configured_model_has_a_layout() -> None:
    configured_repos = repositories("vllm", "whisper", "kokoro", "coqui", "bark")
    assert configured_repos.keys() <= layouts().keys()


def test_a_layout_takes_no_disk(tmp_path: Path) -> None:
    layout = next(iter(layouts().values()))
    folder = layout.build(tmp_path / "repo")
    listing = replace(list_folder(folder), repo=layout.repository)
    assert sum(file.nbytes for file in listing.files) > 2**27
    assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) < 2**21
