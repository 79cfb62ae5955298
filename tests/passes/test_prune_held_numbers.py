"""Channel pruning of models whose code computes with numbers: those that it is called with, and numbers of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.passes.channels.other_sizes import other_numbers
from tests.channel_pruning import Around, empty


class Numbers(nn.Module):
    """Channels 1 to 7 of 16 are constant."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        self.function = function
        empty(self.first.weight, *range(1, 8))

    def forward(self, x: Tensor, number: Any = 2) -> Tensor:
        made: Tensor = self.last(self.function(torch.relu(self.first(x)), number))
        return made


@pytest.mark.parametrize("example", [(), (2,), (1.0,), (0.0,), (True,), (False,)], ids=str)
@pytest.mark.parametrize(
    "function",
    [lambda h, number: h * number, lambda h, number: h + number, lambda h, number: 2 * h if number else h],
    ids=["factor", "sum", "branch"],
)
def test_numbers_that_forward_is_called_with_may_be_others(function: Callable[[Tensor, Any], Tensor], example: Any) -> None:
    model = Numbers(function).double().eval()
    x = torch.randn(5, 4).double()
    small = sparsefx.prune_channels(model, (x, *example), multiple=1)
    for number in (0, 1, 2, 3.5, True, False):
        torch.testing.assert_close(small(x, number), model(x, number), rtol=1e-10, atol=1e-10)


def test_zeros_go_whatever_they_are_multiplied_by() -> None:
    model = Numbers(lambda h, number: h * number).double().eval()
    nn.init.zeros_(model.first.bias)
    small = sparsefx.prune_channels(model, (torch.randn(5, 4).double(), 1.0), multiple=1)
    assert small.first.out_features == 9


def test_a_branch_that_other_numbers_take_may_stop_to_fit() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.heads = nn.Linear(4, 16), nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])
            empty(self.first.weight, *range(1, 8))

        def forward(self, x: Tensor, task: int) -> Tensor:
            made: Tensor = self.heads[task](torch.relu(self.first(x)))
            return made

    small = sparsefx.prune_channels(Heads().eval(), (torch.randn(5, 4), 0), multiple=1)
    assert small.first.out_features == 9
    assert sparsefx.channel_plan_of(small).report.unread == ("heads.1",)


def test_other_numbers_are_those_that_are_given_and_those_that_forward_has() -> None:
    x = torch.ones(1)
    model = Numbers(lambda h, number: h)
    assert [[args for args, _ in one] for one in other_numbers(model, ((x, 4), {}))] == [
        *([(x, 5), (x, 3), (x, 8), (x, 2)], [(x, 0)])
    ]
    assert [[kwargs for _, kwargs in one] for one in other_numbers(model, ((x,), {"number": 0.0}))] == [
        [{"number": 0.5}, {"number": 1.0}]
    ]
    assert [[kwargs["number"] for _, kwargs in one] for one in other_numbers(model, ((x,), {}))] == [[3, 1, 4, 1], [0]]
    assert list(other_numbers(nn.ReLU(), ((x,), {}))) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda m, tokens: m.last(m.table(tokens) * m.table.embedding_dim**0.5),
        lambda m, tokens: m.last((h := m.table(tokens)) / h.shape[-1]),
        lambda m, tokens: m.last(m.row * m.row.shape[1] ** 0.5) + m.last(m.table(tokens)),
    ],
    ids=["width of an embedding", "width of what it makes", "width of a parameter"],
)
def test_widths_that_code_computes_with_stay_where_no_layer_makes_the_channels(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Around(function, table=nn.Embedding(10, 16), last=nn.Linear(16, 3))
    model.register_parameter("row", nn.Parameter(torch.randn(1, 16)))
    empty(model.get_parameter("last.weight"), 1, 2, 3, axis=1)
    model = model.double().eval()
    tokens = torch.randint(0, 10, (2, 5))
    small = sparsefx.prune_channels(model, tokens, multiple=1)
    torch.testing.assert_close(small(tokens[:1]), model(tokens[:1]), rtol=1e-10, atol=1e-10)
    assert any(told.startswith("axis 1 of ") for told in sparsefx.channel_plan(model, tokens, multiple=1).report.refused)


@pytest.mark.parametrize("told", [lambda h: h.shape[1], lambda h: h.shape[1] / 2, lambda h: f"{h.shape[1]} channels"])
def test_numbers_among_the_outputs_stay_what_they_are(told: Callable[[Tensor], Any]) -> None:
    class Telling(Numbers):
        def forward(self, x: Tensor, number: Any = None) -> Any:
            hidden = self.first(x)
            return self.last(torch.relu(hidden)), told(hidden)

    model = Telling(lambda h, number: h).eval()
    x = torch.randn(5, 4)
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small(x)[1] == model(x)[1]
