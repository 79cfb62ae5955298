"""Decorrelation times against a brute-force search over whole histories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.analysis import correlations, decorrelation_lags, magnitude_bins
from sparsefx.analysis.weight_trace import WeightTrace
from sparsefx.errors import OptionError


def brute_force(series: np.ndarray) -> float:
    """The first lag at which numpy's own coefficient of the two windows is not positive."""
    if (series == series[0]).all():
        return math.nan
    for lag in range(len(series) - 1):
        first, last = series[: len(series) - lag], series[lag:]
        if first.std() < 1e-12 or last.std() < 1e-12 or np.corrcoef(first, last)[0, 1] <= 1e-9:
            return lag
    return len(series)


def walks(samples: int, weights: int, seed: int, memory: float) -> Tensor:
    noise = torch.randn(samples, weights, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(memory * rows[-1] + row)
    return torch.stack(rows)


@given(st.integers(3, 60), st.integers(0, 10_000), st.sampled_from([0.0, 0.7, 0.95, 1.0]))
def test_lags_are_those_of_a_search_over_the_history(samples: int, seed: int, memory: float) -> None:
    series = walks(samples, 3, seed, memory)
    found = decorrelation_lags(series)
    expected = [brute_force(column) for column in series.T.numpy()]
    assert found.tolist() == expected


def test_coefficients_are_numpys() -> None:
    series = walks(40, 300, 1, 0.9)
    found = correlations(series)
    assert found.shape == (39, 300)
    for weight in (0, 299):
        column = series[:, weight].numpy()
        expected = [np.corrcoef(column[: 40 - lag], column[lag:])[0, 1] for lag in range(39)]
        np.testing.assert_allclose(found[:, weight].numpy(), expected, rtol=0, atol=1e-9)


def test_a_large_offset_costs_no_precision() -> None:
    series = walks(50, 20, 2, 0.8)
    assert torch.equal(decorrelation_lags(series), decorrelation_lags(series + 1000.0))


def test_what_never_changes_has_no_time_and_what_drifts_never_decorrelates() -> None:
    still, drift = torch.full((10,), 0.25), torch.arange(10.0)
    alternating = torch.tensor([1.0, -1.0]).repeat(5)
    found = decorrelation_lags(torch.stack([still, drift, alternating], dim=1))
    assert math.isnan(found[0])
    assert found[1] == 10
    assert found[2] == 1


def test_a_weight_that_stands_still_at_the_end_decorrelates_when_that_is_all_one_window_sees() -> None:
    series = torch.cat([torch.arange(6.0), torch.zeros(4)]).unsqueeze(1)
    assert decorrelation_lags(series)[0] == brute_force(series[:, 0].numpy())


def test_too_few_looks_have_no_correlation() -> None:
    assert correlations(torch.randn(2, 4)).shape == (1, 4)


def test_bins_hold_like_numbers_of_weights_by_magnitude() -> None:
    magnitudes = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.5, 0.6])
    times = torch.tensor([4.0, 1.0, float("nan"), 2.0, 5.0, 6.0])
    bins = magnitude_bins(times, magnitudes, 2)
    assert [one.count for one in bins] == [3, 2]
    assert [one.time for one in bins] == [2.0, 5.5]
    assert bins[0].magnitude == pytest.approx(0.2)
    assert len(magnitude_bins(times, magnitudes, 50)) == 5


@given(st.integers(1, 200), st.sampled_from([4, 8, 10]))
def test_a_trace_is_the_history_at_even_steps(looks: int, capacity: int) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    trace = WeightTrace(weight, sample=6, capacity=capacity, generator=torch.Generator().manual_seed(1))
    history = [weight + step for step in range(looks)]
    for now in history:
        trace.look(now)
    whole = torch.stack([now.flatten()[trace.positions] for now in history])
    assert torch.equal(trace.values, whole[:: trace.stride])
    assert len(trace.values) <= capacity
    assert looks < capacity or len(trace.values) >= capacity // 2
    assert trace.looks == looks


def test_a_thinned_trace_tells_the_median_time_of_the_whole_history() -> None:
    series = walks(4000, 200, 3, 0.98).float()
    trace = WeightTrace(series[0], sample=200, capacity=256, generator=torch.Generator())
    for row in series:
        trace.look(row)
    whole = decorrelation_lags(series).median() / 4000
    thinned = decorrelation_lags(trace.values).median() * trace.stride / 4000
    assert trace.values.numel() <= 256 * 200
    assert abs(float(whole - thinned)) <= 2 * trace.stride / 4000


@pytest.mark.parametrize(("capacity", "sample"), [(7, 4), (2, 4), (8, 0)])
def test_sizes_are_checked(capacity: int, sample: int) -> None:
    with pytest.raises(OptionError, match="expected"):
        WeightTrace(torch.zeros(4), sample=sample, capacity=capacity, generator=torch.Generator())


def still(series: np.ndarray, lag: int) -> bool:
    first, last = series[: len(series) - lag], series[lag:]
    return bool((first == first[0]).all() or (last == last[0]).all())


@pytest.mark.parametrize("stands_still", ["last half", "first half", "last half of a trend", "first half of a trend"])
def test_windows_that_stand_still_have_coefficient_zero_exactly(stands_still: str) -> None:
    series = torch.randn(200, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(0)
    if "trend" in stands_still:
        series = series + 3 * torch.arange(200, dtype=torch.float64).unsqueeze(1)
    if stands_still.startswith("last"):
        series[100:] = series[100] if "trend" in stands_still else 0.0
    else:
        series[:100] = series[100]
    found = correlations(series)
    for weight in range(100):
        column = series[:, weight].numpy()
        for lag in (5, 99, 100, 101, 150, 197):
            if still(column, lag):
                assert float(found[lag, weight]) == 0.0
            else:
                first, last = column[: 200 - lag], column[lag:]
                assert float(found[lag, weight]) == pytest.approx(np.corrcoef(first, last)[0, 1], abs=1e-6)
    assert int(decorrelation_lags(series).max()) <= 101
