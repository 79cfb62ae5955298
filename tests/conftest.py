"""Fixtures for all tests: one thread, and a seeded generator in place of the global random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed, new for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def new_generator() -> Callable[[int], torch.Generator]:
    """Makes a generator from a seed."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _same_random_state_in_any_order() -> Iterator[None]:
    """Layers draw their first weights from the global state: seed it, and leave it as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
