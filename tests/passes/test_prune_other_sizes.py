"""Channel pruning on inputs of other sizes than the example's: what only looks constant in a graph of one size stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.passes.channels.other_sizes import other_batch, other_sizes
from tests.channel_pruning import Around, empty


def _smaller(model: nn.Module, example: Tensor, *others: Tensor) -> nn.Module:
    """The pruned model, which gives the same on all of these inputs."""
    model = model.double().eval()
    small: nn.Module = sparsefx.prune_channels(model, example.double(), multiple=1)
    for x in (example, *others):
        torch.testing.assert_close(small(x.double()), model(x.double()), rtol=1e-10, atol=1e-10)
    return small


def _around(function: Callable[..., Tensor], width: int = 16, **modules: nn.Module) -> Around:
    torch.manual_seed(0)
    model = Around(function, **{"first": nn.Linear(4, width), "last": nn.Linear(width, 3), **modules})
    weight = model.get_parameter("first.weight")
    empty(weight, *range(1, width // 2))
    with torch.no_grad():
        model.get_parameter("first.bias").abs_().add_(0.1)
    return model


def test_sums_over_places_leave_constants_to_one_channel_that_carries_them() -> None:
    model = _around(lambda m, x: m.last(torch.relu(m.first(x)).sum(1)))
    small = _smaller(model, torch.randn(2, 10, 4), torch.randn(2, 40, 4), torch.randn(3, 1, 4))
    assert small.get_submodule("first").out_features == 10  # nine that are no constants, and the carrier
    image = _around(lambda m, x: m.last(torch.relu(m.first(x)).sum((2, 3))), first=nn.Conv2d(4, 16, 3, padding=1))
    small = _smaller(image, torch.randn(2, 4, 8, 8), torch.randn(2, 4, 12, 5))
    assert small.get_submodule("first").out_channels == 10


def test_means_over_places_lose_all_constants() -> None:
    model = _around(lambda m, x: m.last(torch.relu(m.first(x)).mean(1)))
    small = _smaller(model, torch.randn(2, 10, 4), torch.randn(2, 40, 4))
    assert small.get_submodule("first").out_features == 9


@pytest.mark.parametrize("length", [1, 4, 8])
def test_positions_that_the_example_does_not_reach_count(length: int) -> None:
    model = _around(lambda m, x: m.last(torch.relu(m.first(x) + m.table[:, : x.shape[1]])[:, -1]))
    model.register_parameter("table", nn.Parameter(torch.randn(1, 64, 16)))
    with torch.no_grad():
        model.get_parameter("table")[:, 0] = 0.25
        model.get_parameter("table")[:, :, 3] = 0.5
    small = _smaller(model, torch.randn(2, length, 4), torch.randn(2, 12, 4), torch.randn(2, 64, 4))
    # Position 0 is the same for all channels, and channel 3 at all positions: only that is a constant for every input.
    assert small.get_submodule("first").out_features == 15
    assert small.get_parameter("table").shape == (1, 64, 15)


def test_rows_of_a_table_that_other_calls_look_up_stay() -> None:
    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
            self.table = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor, task: int = 0) -> Tensor:
            made: Tensor = self.last(torch.relu(self.first(x)) * self.table[task] + self.table[-1])
            return made

    torch.manual_seed(0)
    model = Tasks().double().eval()
    empty(model.first.weight, 1, 2, 3)
    with torch.no_grad():
        model.first.bias[1:4] = 0
        model.table[:, 1] = 0.5
    for example in (0, 1):
        small = sparsefx.prune_channels(model, (torch.randn(2, 4).double(), example), multiple=1)
        assert small.table.shape == (4, 15)
        x = torch.randn(5, 4).double()
        for task in range(4):
            torch.testing.assert_close(small(x, task), model(x, task), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("always", [True, False])
def test_padding_that_only_other_sizes_get(always: bool) -> None:
    def decoded(m: nn.Module, x: Tensor) -> Tensor:
        odd = x.shape[-1] % 2
        inner = torch.relu(m.first(x[..., : x.shape[-1] - odd]))
        return m.last(F.pad(inner, (0, odd)) if always or odd else inner)

    model = _around(decoded, first=nn.Conv1d(4, 16, 1), last=nn.Conv1d(16, 3, 1))
    small = _smaller(model, torch.randn(2, 4, 32), torch.randn(2, 4, 33), torch.randn(2, 4, 7))
    # Where the graph shows that it pads, a carrier takes the constants; where it does not, all of them stay.
    assert small.get_submodule("first").out_channels == (10 if always else 16)
    told = sparsefx.channel_plan_of(small).report.refused if not always else ()
    assert always or any("inputs of other sizes" in reason for reason in told)


def test_padding_to_a_length_that_the_example_goes_beyond() -> None:
    model = _around(
        lambda m, x: m.last(torch.relu(F.pad(m.first(x), (0, 16 - x.shape[-1])))),
        first=nn.Conv1d(4, 16, 1),
        last=nn.Conv1d(16, 3, 1),
    )
    # Half of the length, and twice the length, are cropped too.
    small = _smaller(model, torch.randn(2, 4, 40), torch.randn(2, 4, 10))
    assert small.get_submodule("first").out_channels == 16


@pytest.mark.parametrize("length", [20, 60])
def test_code_that_asks_how_long_its_input_is(length: int) -> None:
    model = _around(lambda m, x: m.last(torch.relu(m.first(x)) * (2 if x.shape[1] > 32 else 1)))
    small = _smaller(model, torch.randn(2, length, 4), torch.randn(2, 32, 4), torch.randn(2, 33, 4))
    assert small.get_submodule("first").out_features == 16


def test_numbers_computed_from_sizes_are_found_by_running_other_ones() -> None:
    model = _around(lambda m, x: m.last(torch.relu(m.first(x)) / x.shape[1] ** 0.5))
    small = _smaller(model, torch.randn(2, 4, 4), torch.randn(2, 16, 4))
    assert small.get_submodule("first").out_features == 16
    with torch.no_grad():
        model.get_parameter("first.bias")[1:8] = 0
    small = _smaller(model, torch.randn(2, 4, 4), torch.randn(2, 16, 4))
    assert small.get_submodule("first").out_features == 9, "zeros are zeros whatever they are divided by"


def test_buffers_that_eval_mode_changes_are_no_constants() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
            self.register_buffer("state", torch.ones(1, 16))

        def forward(self, x: Tensor) -> Tensor:
            self.state.mul_(0.5).add_(self.first(x).mean(0, keepdim=True), alpha=0.5)
            made: Tensor = self.last(torch.relu(self.state.expand(len(x), -1)))
            return made

    torch.manual_seed(0)
    model = State().double().eval()
    empty(model.first.weight, 1, 2, 3)
    small = sparsefx.prune_channels(model, torch.randn(2, 4).double(), multiple=1)
    for _ in range(4):
        x = torch.randn(2, 4).double()
        torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)


def test_zeros_put_around_constants_leave_them_to_a_carrier() -> None:
    model = _around(
        lambda m, x: m.last(F.pad(torch.relu(m.first(x)), (1, 1))), first=nn.Conv1d(4, 16, 1), last=nn.Conv1d(16, 3, 3)
    )
    small = _smaller(model, torch.randn(2, 4, 8), torch.randn(2, 4, 9))
    assert small.get_submodule("first").out_channels == 10


@pytest.mark.parametrize(
    "function",
    [
        lambda h, mask: h.masked_fill(mask, 0.0),
        lambda h, mask: torch.where(mask, h, 0.1 * h),
        lambda h, mask: torch.where(mask, 0.0, h),
    ],
    ids=["masked_fill", "where", "where with a number"],
)
def test_a_choice_between_equal_constants_is_that_constant(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = _around(lambda m, x: m.last(function(m.first(x), x[..., :1] > 0)))
    with torch.no_grad():
        model.get_parameter("first.bias")[1:8] = 0
    small = _smaller(model, torch.randn(2, 6, 4), torch.randn(3, 5, 4))
    assert small.get_submodule("first").out_features == 9
    model = _around(lambda m, x: m.last(function(m.first(x), x[..., :1] > 0)))
    assert _smaller(model, torch.randn(2, 6, 4), torch.randn(3, 5, 4)).get_submodule("first").out_features == 16


def test_axes_of_one_size_change_together_and_the_batch_by_itself() -> None:
    inputs = ((torch.randn(2, 3, 8, 8), torch.ones(2, 8, dtype=torch.bool)), {"factor": 2.0})
    image, larger, channels, more = other_sizes(inputs)
    batch = other_batch(inputs)
    assert [tuple(leaf.shape) for leaf in batch[0][0]] == [(3, 3, 8, 8), (3, 8)]
    assert [tuple(one[0][0].shape) for one in image[:2]] == [(2, 3, 5, 5), (2, 3, 4, 4)]
    assert [tuple(one[0][1].shape) for one in image[:2]] == [(2, 5), (2, 4)]
    assert [tuple(one[0][0].shape) for one in image[2::2]] == [(2, 3, 8, 8), (2, 3, 5, 8), (2, 3, 8, 5)]
    assert [tuple(one[0][0].shape) for one in larger] == [(2, 3, 16, 16), (2, 3, 8, 8), (2, 3, 16, 8), (2, 3, 8, 16)]
    assert [tuple(one[0][0].shape) for one in channels] == [(2, 2, 8, 8), (2, 1, 8, 8)]
    assert [tuple(one[0][0].shape) for one in more] == [(2, 6, 8, 8)]
    assert batch[0][1] == {"factor": 2.0}
    (large,) = other_sizes(((torch.randn(1, 224),), {}))
    assert [tuple(one[0][0].shape) for one in large] == [(1, 57), (1, 113), (1, 112), (1, 448)]
    assert list(other_sizes(((3,), {}))) == other_batch(((3,), {})) == []
