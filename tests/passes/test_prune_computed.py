"""Layers that compute their weights stay as they are, and have a row and a reason in the report."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import sparsefx
from tests.channel_pruning import empty


class Zeroed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(weight[:2]), weight[2:]])


def _pruned_by_torch(layer: nn.Module) -> None:
    prune.ln_structured(layer, "weight", amount=2, n=2, dim=0)  # type: ignore[no-untyped-call]


def _masked_later(layer: nn.Module) -> None:
    prune.identity(layer, "weight")  # type: ignore[no-untyped-call]
    empty(layer.get_parameter("weight_orig"), 0, 1)  # the attribute still holds what it was


def _scaled(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    empty(layer.get_parameter("parametrizations.weight.original0"), 0, 1)


def _scaled_by_a_hook(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)
    empty(layer.get_parameter("weight_g"), 0, 1)


def _replaced(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Zeroed())


@pytest.mark.parametrize(
    ("compute", "remedy"),
    [
        (_pruned_by_torch, "prune.remove"),
        (_masked_later, "prune.remove"),
        (_scaled, "parametrize.remove_parametrizations"),
        (_scaled_by_a_hook, "remove_weight_norm"),
        (_replaced, "parametrize.remove_parametrizations"),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_computed_weight_has_a_row_that_says_why_it_stays(
    compute: Callable[[nn.Module], None], remedy: str, groups: int
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    compute(model[0])
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 4, 6, 6)
    report = sparsefx.channel_plan(model, x, multiple=1).report
    first, last = report.layers
    assert (first.weight, first.inputs, first.outputs, first.outputs_after, first.empty) == ("0.weight", 4, 8, 8, 2)
    assert f"({remedy})" in first.why
    assert (last.weight, last.why) == ("2.weight", "")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert report.operations == int(counter.get_total_flops()) // 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_computed_weights_of_linear_and_transposed_layers() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), nn.Flatten(), nn.Linear(8 * 16, 6), nn.Linear(6, 2)).train()
    parametrizations.weight_norm(model[0], dim=1)
    empty(model.get_parameter("0.parametrizations.weight.original0"), 3, axis=1)
    parametrizations.spectral_norm(model[2])
    before = copy.deepcopy(model.state_dict())
    report = sparsefx.channel_plan(model, torch.randn(2, 3, 2, 2), multiple=1).report
    assert [(row.weight, row.inputs, row.outputs, row.empty) for row in report.layers] == [
        *(("0.weight", 3, 8, 1), ("2.weight", 128, 6, 0), ("3.weight", 6, 2, 0)),
    ]
    assert re.search("computed by a parametrization", report.layers[0].why)
    assert report.layers[1].why == "", "none is empty"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_code_computes_without_a_layer_have_no_row() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / 2)

    report = sparsefx.channel_plan(nn.Sequential(Halved(), nn.Linear(6, 2)).eval(), torch.randn(2, 8), multiple=1).report
    assert [row.weight for row in report.layers] == ["1.weight"]


def test_a_layer_whose_code_computes_with_its_weight_has_a_row() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight / (self.weight.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
            return self._conv_forward(x, weight, self.bias)

    model = nn.Sequential(Standardized(3, 6, 1), nn.Conv2d(6, 2, 1)).eval()
    empty(model.get_parameter("0.weight"), 1)
    first = sparsefx.channel_plan(model, torch.randn(2, 3, 4, 4), multiple=1).report.layers[0]
    assert (first.weight, first.outputs, first.outputs_after, first.empty) == ("0.weight", 6, 6, 1)
    assert first.why == "its weight is computed by code of its own, which cannot be cut"
