"""Filters that end at the steps in which hardware gets faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import OptionError
from sparsefx.machine import machine_multiple
from sparsefx.step_densities import step_densities


def counts(density: float, filters: list[int], weights: list[int], step: int = 16) -> list[int]:
    return [round(share * whole) for share, whole in zip(step_densities(density, filters, weights, step), filters, strict=True)]


def test_filters_are_emptied_first_where_fewest_are_missing_to_a_step() -> None:
    # A uniform share of 0.52 leaves 66.56 and 49.92 of the filters: 2.56 and 1.92 above a step.
    assert counts(0.52, [128, 96], [9, 9]) == [64, 48]
    # With room for one of them, the second goes down and the first stays a step higher.
    assert counts(0.572, [128, 96], [9, 9]) == [80, 48]


def test_layers_end_at_multiples_or_whole_and_below_the_density() -> None:
    filters, weights = [24, 64, 100, 256, 512], [27, 216, 576, 900, 2304]
    total = sum(count * size for count, size in zip(filters, weights, strict=True))
    for density in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        left = counts(density, filters, weights)
        assert all(count % 16 == 0 or count == whole for count, whole in zip(left, filters, strict=True))
        used = sum(count * size for count, size in zip(left, weights, strict=True))
        assert used <= density * total
        # No step of any layer would fit into what is left over.
        room = density * total - used
        for count, whole, size in zip(left, filters, weights, strict=True):
            above = min(whole, (count // 16 + 1) * 16)
            assert above == count or (above - count) * size > room


def test_less_than_one_step_a_layer_is_refused_with_the_least_density() -> None:
    with pytest.raises(OptionError, match=r"0\.250 of all weights"):
        step_densities(0.2, [64, 64], [9, 9], 16)


def test_training_that_is_aimed_at_steps_leaves_no_filter_between_two_of_them() -> None:
    torch.manual_seed(0)
    step = machine_multiple(torch.device("cpu"))
    model = nn.Sequential(
        nn.Conv2d(16, 5 * step, 3), nn.ReLU(), nn.Conv2d(5 * step, 3 * step, 3), nn.ReLU(), nn.Conv2d(3 * step, 16, 3)
    )
    image = torch.randn(2, 16, 8, 8)
    sparsefx.sparsify(model, pattern="channel", density=0.6, densities="steps", exclude="4")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sparsefx.attach(model, optimizer, total_steps=3)
    for _ in range(3):
        model(image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsefx.finalize(model)
    plan = sparsefx.channel_plan(model, image)
    widths = [(row.outputs_after, row.outputs_needed) for row in plan.report.layers[:2]]
    assert all(after == needed and after % step == 0 for after, needed in widths)
    assert any(after < row.outputs for (after, _), row in zip(widths, plan.report.layers, strict=False))


@pytest.mark.parametrize("density", [0.29, 0.57, 0.58])
def test_a_density_that_floats_cannot_hold_is_reached(density: float) -> None:
    assert counts(density, [100], [1], step=1) == [round(100 * density)]
