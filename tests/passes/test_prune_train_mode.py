"""With an optimizer only what is constant in train mode too goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsefx
from tests.channel_pruning import empty


@pytest.mark.parametrize(
    ("drop", "left"),
    [
        (nn.Dropout(0.5), 6),
        (nn.AlphaDropout(0.5), 8),
        (nn.AlphaDropout(0.5, inplace=True), 8),
        (nn.AlphaDropout(0.0), 6),
    ],
)
def test_zeros_that_dropout_replaces_are_no_constants(drop: nn.Module, left: int) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.SELU(), drop, nn.Linear(8, 2)), torch.randn(4, 8)
    empty(model.get_parameter("0.weight"), 1, 5)
    empty(model.get_parameter("0.bias"), 1, 5)
    assert sparsefx.prune_channels(model, x, multiple=1).get_submodule("0").out_features == 6
    sparsefx.prune_channels_(model, x, torch.optim.SGD(model.parameters(), lr=0.1), multiple=1)
    assert model.get_submodule("0").out_features == left
