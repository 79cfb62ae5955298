"""Channel pruning of models that look up, change or share what they store: tables, states, tied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from tests.channel_pruning import Around, empty


def _constant_channels(**modules: nn.Module) -> Around:
    """Around two linear layers of 16 channels, of which the first makes channels 1 to 7 constant."""
    torch.manual_seed(0)
    model = Around(lambda m, x: x, **{"first": nn.Linear(4, 16), "last": nn.Linear(16, 3), **modules})
    empty(model.get_parameter("first.weight"), *range(1, 8))
    return model


def _same(small: nn.Module, model: nn.Module, *inputs: object) -> None:
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "row",
    [
        lambda table, task: table.unbind(0)[task],
        lambda table, task: list(table)[task],
        lambda table, task: table.split(1)[task],
        lambda table, task: table.tensor_split(4)[task],
        lambda table, task: (2 * table)[task],
        lambda table, task: torch.sigmoid(table)[task : task + 1],
        lambda table, task: table.index_select(0, torch.tensor([task])),
        lambda table, task: torch.stack([table, table])[1, task],
    ],
    ids=["unbind", "iterated", "split", "tensor_split", "product", "sigmoid", "index_select", "stack"],
)
def test_rows_of_a_table_that_another_call_takes_stay(row: Callable[[Tensor, int], Tensor]) -> None:
    model = _constant_channels()
    model.register_parameter("table", nn.Parameter(torch.randn(4, 16)))
    with torch.no_grad():
        model.get_parameter("table")[:, 3] = 0.5
    model.function = lambda m, x, task: m.last(torch.relu(m.first(x)) + row(m.table, task))
    model = model.double().eval()
    x = torch.randn(2, 4).double()
    small = sparsefx.prune_channels(model, (x, 0), multiple=1)
    assert small.get_parameter("table").shape == (4, 15)
    for task in range(4):
        _same(small, model, x, task)


@pytest.mark.parametrize("length", [8, 40])
def test_positions_that_are_computed_from_a_table_count_beyond_the_length_of_the_example(length: int) -> None:
    model = _constant_channels()
    model.register_parameter("table", nn.Parameter(torch.randn(1, 64, 16)))
    with torch.no_grad():
        # As far as half and double the example's length reaches, all rows are the same.
        model.get_parameter("table")[:, :20] = model.get_parameter("table")[:, :1].clone()
    model.function = lambda m, x: m.last(torch.relu(m.first(x) + m.table.to(x.dtype)[:, : x.shape[1]])[:, -1])
    model = model.double().eval()
    small = sparsefx.prune_channels(model, torch.randn(2, length, 4).double(), multiple=1)
    for other in (4, 30, 64):
        _same(small, model, torch.randn(2, other, 4).double())


def test_parts_of_a_table_that_are_all_read_are_what_they_are() -> None:
    def shifted(m: nn.Module, x: Tensor) -> Tensor:
        scale, shift = m.table.unbind(0)
        made: Tensor = m.last(torch.relu(m.first(x)) * scale + shift)
        return made

    model = _constant_channels()
    model.register_parameter("table", nn.Parameter(torch.randn(2, 16)))
    model.function = shifted
    model = model.double().eval()
    x = torch.randn(5, 4).double()
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small.get_parameter("table").shape == (2, 9)
    _same(small, model, x)


class _Adapting(nn.Module):
    """Changes its running mean, its bias or its second weight in eval mode, each after it was used."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.register_buffer("bias", torch.rand(16))
        self.register_buffer("fast", torch.zeros(3, 16))
        empty(self.first.weight, *range(1, 8))
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "mean":
            hidden, norm = self.first(x), self.norm
            made = F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            norm.running_mean.lerp_(hidden.mean(0).detach(), 0.5)
            return self.last(torch.relu(made))  # type: ignore[no-any-return]
        if self.what == "bias":
            made = self.last(torch.relu(F.linear(x, self.first.weight, self.bias)))
            self.bias.add_(0.5)
            return made
        hidden = torch.relu(self.first(x))
        made = F.linear(hidden, self.fast)
        self.fast.add_(0.5)
        return made


@pytest.mark.parametrize("what", ["mean", "bias", "weight"])
def test_buffers_that_eval_mode_changes_are_read_anew_by_each_run(what: str) -> None:
    torch.manual_seed(0)
    model = _Adapting(what).double().eval()
    small = sparsefx.prune_channels(model, torch.randn(5, 4).double(), multiple=1)
    for _ in range(3):
        _same(small, model, torch.randn(5, 4).double())


def test_a_table_whose_rows_are_changed_after_they_were_copied_is_no_changing_one() -> None:
    torch.manual_seed(0)
    model = Around(lambda m, tokens: m.last(m.table(tokens).mul_(2).relu_()), table=nn.Embedding(10, 16), last=nn.Linear(16, 3))
    empty(model.get_parameter("last.weight"), 1, 2, axis=1)
    model = model.double().eval()
    tokens = torch.randint(0, 10, (2, 5))
    small = sparsefx.prune_channels(model, tokens, multiple=1)
    assert small.get_parameter("table.weight").shape == (10, 14)
    _same(small, model, tokens)


def test_a_tied_weight_carries_no_constants() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
            self.head.weight = self.table.weight
            with torch.no_grad():
                self.table.weight[:, 2:5] = torch.tensor([0.5, 0.75, -0.25])

        def forward(self, tokens: Tensor) -> Tensor:
            made: Tensor = self.head(self.table(tokens).sum(1))
            return made

    torch.manual_seed(0)
    model = Tied().double().eval()
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(0, 10, (2, 5))
    small = sparsefx.prune_channels(model, tokens, multiple=1)
    _same(small, model, tokens[:, :3])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("length", [5, 8])
def test_batch_norm_over_places_takes_over_no_constants_of_channels(length: int) -> None:
    model = _constant_channels(second=nn.Linear(16, 8, bias=False), norm=nn.BatchNorm1d(length), last=nn.Linear(8, 3))
    model.function = lambda m, x: m.last(m.norm(m.second(torch.relu(m.first(x)))))
    model = model.double().eval()
    small = sparsefx.prune_channels(model, torch.randn(2, length, 4).double(), multiple=1)
    assert small.get_submodule("first").out_features == 9
    _same(small, model, torch.randn(3, length, 4).double())
