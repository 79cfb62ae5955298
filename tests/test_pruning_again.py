"""Models that are pruned several times have one plan for all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import StateError


class Chain(nn.Module):
    """Padded, grouped and plain convolutions, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.bare = nn.Conv2d(16, 12, 1, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        x = torch.sigmoid(self.grouped(x))
        x = torch.tanh(self.bare(x))
        made: Tensor = self.head(x.mean((2, 3)))
        return made


@torch.no_grad()
def _empty(weight: Tensor, *filters: int) -> None:
    weight[list(filters)] = 0


def _check(model: nn.Module, small: nn.Module, x: Tensor, path: Path) -> None:
    """One plan takes the first model all the way, by itself and read from a file, and a fresh one to the same shapes."""
    plan = sparsefx.channel_plan_of(small)
    plan.save(path)
    for each in (plan, sparsefx.ChannelPlan.load(path)):
        torch.testing.assert_close(sparsefx.apply_channel_plan(model, each)(x), model(x), rtol=1e-10, atol=1e-12)
        fresh = sparsefx.apply_channel_plan(Chain().double().eval(), each)
        fresh.load_state_dict(small.state_dict())
        assert torch.equal(fresh(x), small(x))
        assert {name: module.extra_repr() for name, module in fresh.named_modules()} == {
            name: module.extra_repr() for name, module in small.named_modules()
        }


# Filters of the grouped layer that are emptied: two in each group, or whole groups, before the first time or the second.
TWO_EACH = (0, 1, 4, 5, 8, 9, 12, 13)


@pytest.mark.parametrize("late", [TWO_EACH, (4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (4, 5, 6, 7, 9, 13)])
@pytest.mark.parametrize("early", [(), (0, 4, 8, 12), (8, 9, 10, 11)])
def test_the_plan_of_a_model_that_was_pruned_twice_takes_a_fresh_one_all_the_way(
    early: tuple[int, ...], late: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    _empty(model.first.weight, 0, 1, 4, 8, 12, 13)
    _empty(model.grouped.weight, *early)
    _empty(model.bare.weight, 3)
    # All that goes the second time is empty from the beginning, so that the plan is that of the first model's weights too.
    _empty(model.grouped.weight, *late)
    _empty(model.bare.weight, 5, 6)
    whole = sparsefx.channel_plan(model, x, multiple=1)
    once = sparsefx.prune_channels(model, x, multiple=2)
    twice = sparsefx.prune_channels(once, x, multiple=1)
    torch.testing.assert_close(twice(x), model(x), rtol=1e-10, atol=1e-12)
    _check(model, twice, x, tmp_path / "plan.safetensors")
    assert sparsefx.channel_plan_of(twice).report.parameters_after <= whole.report.parameters_after


def test_filters_that_training_empties_between_compose_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    _empty(model.first.weight, 0, 1, 4, 8, 12)
    _empty(model.grouped.weight, 0, 4, 8, 12, 13)
    sparsefx.prune_channels_(model, x, multiple=1)
    assert sparsefx.channel_plan_of(model).new_biases == {"bare.bias": 12}
    _empty(model.bare.weight, 2, 7)
    _empty(model.grouped.weight, 1, 4, 7, 10)
    with torch.no_grad():
        model.first.weight.mul_(1.5)
    before = model(x)
    plan = sparsefx.prune_channels_(model, x, torch.optim.SGD(model.parameters(), lr=0.1), multiple=1)
    assert plan.kept["bare.bias"][0].tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)
    composed = sparsefx.channel_plan_of(model)
    assert composed.new_biases == {"bare.bias": 10}
    assert composed.report is plan.report
    composed.save(tmp_path / "plan.safetensors")
    fresh = sparsefx.apply_channel_plan(Chain().double().eval(), sparsefx.ChannelPlan.load(tmp_path / "plan.safetensors"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_a_second_time_that_removes_nothing_leaves_the_plan(tmp_path: Path) -> None:
    model, x = Chain().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    _empty(model.first.weight, 0, 4, 8, 12)
    once = sparsefx.prune_channels(model, x, multiple=1)
    again = sparsefx.prune_channels(once, x, multiple=1)
    assert sparsefx.channel_plan_of(again).kept.keys() == sparsefx.channel_plan_of(once).kept.keys()
    _check(model, again, x, tmp_path / "plan.safetensors")


def test_a_model_that_was_changed_between_is_refused_as_it_is() -> None:
    model, x = Chain().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    _empty(model.first.weight, 0, 4, 8, 12)
    _empty(model.bare.weight, 1)
    sparsefx.prune_channels_(model, x, multiple=1)
    model.bare, model.head = nn.Conv2d(16, 20, 1).double(), nn.Linear(20, 5).double()
    _empty(model.bare.weight, 1)
    with pytest.raises(StateError, match=r"left 'bare\.weight' of shape \[11, 16, 1, 1\]; now it has shape \[20, 16, 1, 1\]"):
        sparsefx.prune_channels_(model, x, multiple=1)
    assert model.bare.out_channels == 20
