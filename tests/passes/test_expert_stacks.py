"""Stacks of matrices, as mixtures of experts hold them: sparse along the axis that each matrix sums over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from tests.equality import assert_same_computation

pytestmark = pytest.mark.filterwarnings("ignore:this model was sparsified")


class Experts(nn.Module):
    """Every expert on every row: one stack read as ``[n, out, in]``, another as ``[n, in, out]``."""

    def __init__(self, loop: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 32))
        self.down = nn.Parameter(torch.randn(3, 64, 48))
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        if self.loop:
            hidden = torch.stack([nn.functional.linear(part, weight) for part, weight in zip(x, self.up, strict=True)])
        else:
            hidden = torch.bmm(x, self.up.transpose(1, 2))
        return torch.bmm(hidden.relu(), self.down)


EXAMPLE = (torch.ones(3, 5, 32),)


@pytest.mark.parametrize("loop", [False, True])
def test_both_orders_are_sparse_along_what_they_sum_over(loop: bool) -> None:
    model = sparsefx.sparsify(Experts(loop), example_inputs=EXAMPLE)
    rows = {row.name: row for row in sparsefx.audit(model).layers}
    assert {name: row.reduction_axis for name, row in rows.items()} == {"up": 2, "down": 1}
    assert rows["up"].flops == 2 * 3 * 5 * 32 * 64
    assert rows["down"].flops == 2 * 3 * 5 * 64 * 48
    assert all("stack of matrices" in row.tensor_core_reason for row in rows.values())
    masks = sparsefx.masks(model)
    assert bool((masks["up"].unflatten(2, (-1, 4)).sum(3) == 2).all())
    assert bool((masks["down"].unflatten(1, (-1, 4)).sum(2) == 2).all())


@pytest.mark.parametrize("pattern", ["2:4-transposable", "channel", "block:1x4"])
def test_patterns_of_outputs_are_refused_in_either_order(pattern: str) -> None:
    reasons = {row.name: row.reason for row in sparsefx.audit(Experts(), pattern=pattern, example_inputs=EXAMPLE).layers}
    assert all("is a stack of matrices" in reason for reason in reasons.values())
    assert len(reasons) == 2


def test_masks_follow_training_and_the_graph_agrees() -> None:
    model = sparsefx.sparsify(Experts(), example_inputs=EXAMPLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsefx.attach(model, optimizer, total_steps=4, exploit="none")
    first = sparsefx.masks(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 5, 32)).square().mean(0).sum().backward()
        optimizer.step()
    masks = sparsefx.masks(model)
    assert not torch.equal(masks["up"], first["up"])
    assert bool((masks["up"].unflatten(2, (-1, 4)).sum(3) == 2).all())
    assert not bool(model.up[~masks["up"]].any())
    assert_same_computation(model, sparsefx.graph(model), (torch.randn(3, 5, 32),), {})


def test_empty_rows_of_any_matrix_are_counted() -> None:
    model = Experts()
    with torch.no_grad():
        model.up[1, :7] = 0
    sparsefx.sparsify(model, example_inputs=EXAMPLE)
    assert sparsefx.audit(model).layers[0].empty_channels == 7
