"""Bounds and measured times of pruned models."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import nn

import sparsefx
from sparsefx.pruning_page import pruning_page
from sparsefx.pruning_speed import in_turn, measure_speed, speed_lines


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight[:12] = 0
        model[2].weight[:, 13] = 0
    return model


def test_bounds_are_density_and_empty_channels_weighted_by_operations() -> None:
    x = torch.randn(3, 8)
    report = sparsefx.channel_plan(net(), x, multiple=1).report
    assert report.operations == 3 * (128 + 64)
    assert report.operations_nonzero == 3 * (32 + 60)
    assert report.density_bound == 192 / 92
    assert report.empty_bound == 192 / (32 + 64)
    # Of 16 hidden channels four are not constant, and one of these nobody reads.
    assert report.operations_after == 3 * (24 + 12)
    assert report.operations_bound == 192 / 36
    assert sparsefx.passes.channels.report.PruningReport.from_dict(report.as_dict()) == report


def test_runs_take_turns_and_the_median_counts() -> None:
    order: list[str] = []
    now = 0.0

    def take(name: str, seconds: tuple[float, ...]) -> None:
        nonlocal now
        now += seconds[order.count(name) % len(seconds)]
        order.append(name)

    runs = [lambda: take("a", (9.0, 1.0, 2.0, 3.0)), lambda: take("b", (10.0,)), lambda: take("c", (4.0,))]
    assert in_turn(runs, 60, lambda: now) == [2.5, 10.0, 4.0]
    rounds = ["".join(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert rounds[0] == "abc"
    assert len(rounds) == 61
    # All orders come, so that nobody always has the same one before it.
    assert {"".join(one) for one in permutations("abc")} == set(rounds[1:])


def test_both_runtimes_are_measured_and_the_models_stay_as_they_were() -> None:
    model, x = net().train(), torch.randn(3, 8)
    pruned = sparsefx.prune_channels(model, x, multiple=1)
    speed = measure_speed(model, pruned, x, repeats=1)
    assert model.training
    assert min(speed.torch_seconds) > 0
    assert speed.onnx_seconds is not None
    assert min(speed.onnx_seconds) > 0
    report = sparsefx.channel_plan_of(pruned).report
    text = " ".join(speed_lines(report, speed))
    assert "2.09x if zero weights cost nothing" in text
    assert "in onnxruntime" in text
    assert "Measured" in pruning_page(report, "net", speed)


def test_what_cannot_be_exported_is_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(x) if x.sum().item() > 0 else self.layer(-x)

    model, x = Odd().eval(), torch.randn(3, 8)
    speed = measure_speed(model, model, x, repeats=1)
    assert speed.onnx_seconds is None
    report = sparsefx.channel_plan(net(), x, multiple=1).report
    assert any(line.startswith("Not measured in onnxruntime: ") for line in speed_lines(report, speed))
