"""Multiply-adds in the report, against torch's own count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsefx
from tests.channel_pruning import empty


def _counted(model: nn.Module, *inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // 2


def test_calls_in_train_mode_are_not_counted_beside_those_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    empty(model.get_parameter("0.weight"), *range(8))
    with torch.no_grad():
        model.get_parameter("0.bias")[:8] = 0
    x = torch.randn(1, 3, 16, 16)
    before = _counted(model, x)
    report = sparsefx.prune_channels_(model, x, torch.optim.SGD(model.parameters(), lr=0.1), multiple=1).report
    assert (report.operations, report.operations_after) == (before, _counted(model, x))
    assert report.operations_after < before


def test_heads_that_eval_mode_does_not_run_are_counted_as_train_mode_runs_them() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.other = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.stem(x))
            return (self.head(x), self.other(x)) if self.training else self.head(x)

    model, x = Auxiliary().eval(), torch.randn(1, 3, 4, 4)
    rows = {row.weight: row.operations for row in sparsefx.channel_plan(model, x, multiple=1).report.layers}
    assert rows == {"stem.weight": 3 * 16 * 16, "head.weight": 16 * 4 * 16, "other.weight": 16 * 2 * 16}


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("axes", [1, 2])
def test_transposed_convolutions_multiply_at_the_places_of_their_input(axes: int, groups: int) -> None:
    plain, transposed = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d))[axes - 1]
    model = nn.Sequential(
        plain(3, 16, 3, padding=1),
        nn.ReLU(),
        transposed(16, 16, 4, stride=2, padding=1, groups=groups),
        nn.ReLU(),
        plain(16, 4, 1),
    ).eval()
    empty(model.get_parameter("0.weight"), *range(8))
    with torch.no_grad():
        model.get_parameter("0.bias")[:8] = 0
    x = torch.randn(2, 3, *(8,) * axes)
    small = sparsefx.prune_channels(model, x, multiple=1)
    report = sparsefx.channel_plan_of(small).report
    assert small.get_submodule("2").in_channels == 8
    assert (report.operations, report.operations_after) == (_counted(model, x), _counted(small, x))
