"""The search for a permutation: never worse, the same for the same seed, compiled and in numpy alike, and bounded in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsefx
from sparsefx.errors import NonFiniteError, OptionError, PatternError
from sparsefx.ops import permutation as kernels
from sparsefx.patterns import parse


def uniform() -> torch.Tensor:
    """The matrix on which results are published: 128 x 64, numpy's legacy generator, seed 1."""
    return torch.from_numpy(np.random.RandomState(1).rand(128, 64))


def by_mask(weight: torch.Tensor, axis: int = 1) -> float:
    """What 2:4 keeps, by the pattern that masks the weights in training."""
    mask = parse("2:4").mask(weight.abs(), reduction_axis=axis)
    return float((weight.abs() * mask).sum())


def test_kept_magnitude_is_what_the_pattern_keeps() -> None:
    weight = torch.randn(8, 16, 3, 3, dtype=torch.float64)
    assert sparsefx.kept_magnitude(weight) == pytest.approx(by_mask(weight), rel=1e-12)
    assert sparsefx.kept_magnitude(weight, reduction_axis=0) == pytest.approx(by_mask(weight, 0), rel=1e-12)
    assert sparsefx.kept_magnitude(uniform()) == pytest.approx(2852.377, abs=1e-3)


def test_a_short_search_closes_most_of_the_gap() -> None:
    weight = uniform()
    moves, bar = (400_000, 2921.0) if kernels.available() else (3_000, 2880.0)
    order = sparsefx.search_permutation(weight, moves=moves)
    assert sorted(order.tolist()) == list(range(64))
    assert sparsefx.kept_magnitude(weight, order) > bar
    assert by_mask(weight[:, order]) == pytest.approx(sparsefx.kept_magnitude(weight, order), rel=1e-12)


def test_the_same_seed_gives_the_same_order_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsefx.permutation._MOVES_PER_COLUMN", 20)
    weight = torch.randn(24, 16)
    orders = [
        sparsefx.search_permutation(weight, moves=1_500, threads=threads, generator=torch.Generator().manual_seed(5))
        for threads in (1, 1, 3)
    ]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    sparsefx.search_permutation(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), moves=100)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**31))
def test_compiled_moves_equal_numpys(rows: int, groups: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, 4 * groups))
    columns = kernels.columns_of(matrix)
    chains = [kernels.start(columns, seed), kernels.start(columns, seed)]
    for chain, compiled in zip(chains, (True, False), strict=True):
        kernels.anneal(columns, chain, 1100, 1.0, 0.1, compiled=compiled)
    assert chains[0].order.tolist() == chains[1].order.tolist()
    assert chains[0].best.tolist() == chains[1].best.tolist()
    assert chains[0].values.tolist() == chains[1].values.tolist()
    assert chains[0].state[0] == chains[1].state[0]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_never_worse_than_the_order_that_is_there(rows: int, groups: int, seed: int) -> None:
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))
    order = sparsefx.search_permutation(weight, moves=50)
    assert sorted(order.tolist()) == list(range(4 * groups))
    assert sparsefx.kept_magnitude(weight, order) >= sparsefx.kept_magnitude(weight)


def test_columns_that_fit_together_are_found() -> None:
    groups = 8
    weight = torch.zeros(64, 4 * groups)
    weight[:, : 2 * groups] = 1.0  # the large columns stand together, so 2:4 loses half of them
    order = sparsefx.search_permutation(weight, moves=20_000 if kernels.available() else 4_000)
    assert sparsefx.kept_magnitude(weight, order) == 64 * 2 * groups


def test_time_bounds_the_search() -> None:
    order = sparsefx.search_permutation(torch.randn(32, 32), seconds=0.05, threads=2)
    assert sorted(order.tolist()) == list(range(32))


def test_equal_columns_and_small_weights_stay() -> None:
    assert sparsefx.search_permutation(torch.ones(4, 8), moves=100).tolist() == list(range(8))
    assert sparsefx.search_permutation(torch.randn(4, 4), moves=100).tolist() == list(range(4))


@pytest.mark.parametrize(
    ("shape", "options", "error", "text"),
    [
        ((4, 6), {}, PatternError, "6 channels along axis 1 were given; 2:4 needs a multiple of four"),
        ((8,), {}, OptionError, r"shape \(8,\)"),
        ((4, 8), {"reduction_axis": 2}, OptionError, "expected one of its axes"),
        ((4, 8), {"seconds": 0}, OptionError, "seconds=0 was given"),
        ((4, 8), {"moves": 0}, OptionError, "moves=0 was given"),
    ],
)
def test_what_cannot_be_searched(shape: tuple[int, ...], options: dict[str, int], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sparsefx.search_permutation(torch.ones(shape), **options)  # type: ignore[arg-type]


def test_non_finite_weights_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        sparsefx.search_permutation(torch.full((4, 8), float("nan")))
