"""A bias is added to layers with a forward of their own only where that forward adds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.passes.channels.added_bias import takes_a_bias
from tests.channel_pruning import IMAGE, empty, filled, pruned


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Deaf(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class Particular(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 4:
            raise ValueError("four rows")
        return F.linear(x, self.weight, self.bias)


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(4, 3, bias=False), True),
        (nn.ConvTranspose2d(4, 6, 3, bias=False), True),
        (Own(4, 3, bias=False), True),
        (Same(4, 6, 3, dilation=2, groups=2, bias=False), True),
        (Deaf(4, 3, bias=False), False),
        (Twice(4, 3, bias=False), False),
        (Particular(4, 3, bias=False), False),
    ],
)
def test_layers(layer: nn.Linear, expected: bool) -> None:
    assert takes_a_bias(layer) is expected
    assert layer.bias is None


@pytest.mark.parametrize(("kind", "left"), [(Own, 6), (Deaf, 8)])
def test_constants_become_the_bias_of_a_library_s_own_layer(kind: type[nn.Linear], left: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), kind(8, 4, bias=False))
    empty(model.get_parameter("0.weight"), 1, 5)
    small, plan = pruned(filled(model), torch.randn(IMAGE))
    assert small.get_submodule("0").out_channels == left
    assert dict(plan.new_biases) == ({"4.bias": 4} if kind is Own else {})


class InOneMode(nn.Module):
    """Reads the weight of a layer in train mode, in eval mode or in both without calling the layer."""

    def __init__(self, modes: tuple[bool, ...]) -> None:
        super().__init__()
        self.modes = modes
        self.first, self.bare, self.last = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        x = F.linear(x, self.bare.weight) if self.training in self.modes else self.bare(x)
        made: Tensor = self.last(torch.relu(x))
        return made


@pytest.mark.parametrize(("modes", "left"), [((), 6), ((True,), 8), ((False,), 8), ((False, True), 8)])
def test_no_bias_is_added_that_one_of_the_modes_does_not_read(modes: tuple[bool, ...], left: int) -> None:
    model, x = InOneMode(modes), torch.randn(4, 8)
    empty(model.first.weight, 1, 5)
    expected = [model.train(training)(x).detach() for training in (False, True)]
    plan = sparsefx.prune_channels_(model, x, torch.optim.SGD(model.parameters(), lr=0.1), multiple=1)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), expected[training])
    assert model.first.out_features == left
    assert dict(plan.new_biases) == ({} if modes else {"bare.bias": 8})
    assert plan.report.refused == ()
