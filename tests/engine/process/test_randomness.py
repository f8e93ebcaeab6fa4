"""Each thread draws its own numbers, and they are torch's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import ModuleType

import pytest
import torch

from engine.process.randomness import draw_by_thread, seeded

pytestmark = pytest.mark.slow

SEED = 5


@pytest.fixture
def library() -> Iterator[ModuleType]:
    """A module that draws as libraries do."""
    module = ModuleType("drawing_library")
    module.torch = torch  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    draw_by_thread(module.__name__)
    draw_by_thread(module.__name__)
    yield module
    del sys.modules[module.__name__]


DRAWS: dict[str, Callable[[ModuleType], torch.Tensor]] = {
    "randn": lambda torch: torch.randn(3, 4, dtype=torch.float64),
    "randn_like": lambda torch: torch.randn_like(torch.zeros(4, 3).T),
    "rand": lambda torch: torch.rand((2, 5)),
    "multinomial": lambda torch: torch.multinomial(torch.ones(2, 50), num_samples=3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_numbers_are_those_of_manual_seed(library: ModuleType, name: str) -> None:
    draw = DRAWS[name]
    torch.manual_seed(SEED)
    expected = [draw(torch), draw(torch)]
    state = torch.get_rng_state()
    with seeded(SEED):
        found = [draw(library.torch), draw(library.torch)]
    assert torch.equal(torch.get_rng_state(), state)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_outside_of_a_seed_it_is_torch_itself(library: ModuleType) -> None:
    torch.manual_seed(SEED)
    expected = torch.randn(4)
    torch.manual_seed(SEED)
    assert torch.equal(library.torch.randn(4), expected)
    assert library.torch.Tensor is torch.Tensor
    generator = torch.Generator().manual_seed(SEED)
    with seeded(SEED + 1):
        assert torch.equal(library.torch.randn(4, generator=generator), expected)


def test_threads_do_not_disturb_each_other(library: ModuleType) -> None:
    together = Barrier(2)

    def draw(seed: int) -> list[torch.Tensor]:
        drawn = []
        with seeded(seed):
            for _ in range(50):
                together.wait(10)
                drawn.append(library.torch.randn(8))
        return drawn

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(draw, (1, 2)))
    for seed, drawn in zip((1, 2), both, strict=True):
        torch.manual_seed(seed)
        assert all(torch.equal(each, torch.randn(8)) for each in drawn)
