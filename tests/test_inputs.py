"""What is remembered of example inputs."""

from __future__ import annotations

import pickle

import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.inputs import with_zeros, without_values


def test_shapes_and_plain_values_stay_and_tensor_values_go() -> None:
    given = ((torch.ones(2, 3), [torch.ones(4, dtype=torch.int64), None]), {"flag": True, "name": "x"})
    (first, (second, third)), keywords = with_zeros(without_values(given))
    assert torch.equal(first, torch.zeros(2, 3))
    assert torch.equal(second, torch.zeros(4, dtype=torch.int64))
    assert third is None
    assert keywords == {"flag": True, "name": "x"}


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor, function: object) -> Tensor:
        return self.layer(function(x))  # type: ignore[no-any-return,operator]


def test_a_model_with_strange_inputs_can_be_pickled() -> None:
    model = sparsefx.sparsify(Mapped(), example_inputs=(torch.randn(2, 32), lambda x: 2 * x))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.layer.weight, model.layer.weight)
