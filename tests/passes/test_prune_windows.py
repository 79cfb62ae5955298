"""What channel pruning makes of windows, gates and products that the plain rules do not cover."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.channel_pruning import IMAGE, Around, empty, pruned, widths


@pytest.mark.parametrize(
    ("function", "inputs", "constants_stay"),
    [
        (lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).amax((-1, -2)), 8, False),
        (lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32, False),
        (lambda x: F.unfold(x, 3, padding=1).unflatten(2, (8, 8)), 72, True),
        (lambda x: F.pixel_unshuffle(x, 2), 32, False),
        (lambda x: F.grid_sample(x, GRID.to(x.dtype), align_corners=False), 8, True),
        (lambda x: F.grid_sample(x, GRID.to(x.dtype), padding_mode="border", align_corners=False), 8, False),
        (lambda x: F.fold(F.unfold(x, 2, padding=1), (8, 8), 2, padding=1), 8, True),
    ],
    ids=["Tensor.unfold", "Unfold", "padded Unfold", "pixel_unshuffle", "grid_sample", "grid_sample at borders", "Fold"],
)
@pytest.mark.parametrize("act", [F.relu, torch.sigmoid])
def test_windows_of_a_channel_are_that_channel(
    function: Callable[[Tensor], Tensor], inputs: int, constants_stay: bool, act: Callable[[Tensor], Tensor]
) -> None:
    model = Around(
        lambda m, x: m.last(function(act(m.first(x)))), first=nn.Conv2d(3, 8, 1, bias=False), last=nn.Conv2d(inputs, 2, 1)
    )
    empty(model.first.weight, 1, 4, 5)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    found = widths(small)
    assert found["last.weight"][1] == found["first.weight"][0] * inputs // 8
    # Zeros always go. Where places beside the image count as zeros, or are added up, a constant does not stay one.
    assert found["first.weight"][0] == (8 if constants_stay and act is not F.relu else 5)


GRID = torch.rand(2, 4, 4, 2, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2


def test_glu_loses_the_same_channels_of_both_halves() -> None:
    model = Around(lambda m, x: m.last(F.glu(m.first(x), 1)), first=nn.Conv2d(3, 12, 1), last=nn.Conv2d(6, 2, 1))
    empty(model.first.weight, 1, 3, 7, 9, 10)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    assert widths(small) == {"first.weight": (8, 3, 1, 1), "first.bias": (8,), "last.weight": (2, 4, 1, 1), "last.bias": (2,)}


def test_baddbmm_ties_a_head_to_its_positions() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.baddbmm(x.new_ones(1, 1, 5), self.q(x), self.k(x).mT, alpha=0.3)
            made: Tensor = self.out(torch.softmax(scores, -1) @ self.v(x))
            return made

    model = Biased().eval()
    for layer in (model.q, model.v):
        empty(layer.weight, 2, 3, 6)
        nn.init.zeros_(layer.bias)
    small, _ = pruned(model, torch.randn(2, 5, 6))
    assert {name: shape for name, shape in widths(small).items() if name.endswith("weight")} == {
        "q.weight": (5, 6),
        "k.weight": (5, 6),
        "v.weight": (5, 6),
        "out.weight": (6, 5),
    }


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("divisor", [None, 5])
@pytest.mark.parametrize("padding", [0, 1])
def test_an_average_over_padding_leaves_constants_to_a_carrier(padding: int, divisor: int | None, window: int) -> None:
    model = Around(
        lambda m, x: m.last(F.avg_pool2d(torch.sigmoid(m.first(x)), 3, 1, padding, divisor_override=divisor)) + m.beside(x),
        first=nn.Conv2d(3, 8, 1),
        last=nn.Conv2d(8, 4, window, padding=window // 2, bias=False),
        beside=nn.Conv2d(3, 4, 3, padding=padding),
    )
    empty(model.get_parameter("first.weight"), 1, 2, 6)
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    even = padding == 0 and divisor is None and window == 1
    assert small.get_submodule("first").out_channels == (5 if even else 6)


def test_an_average_over_padding_that_more_than_a_product_reads_keeps_channels_that_are_not_zero() -> None:
    model = Around(
        lambda m, x: m.last(torch.sigmoid(F.avg_pool2d(m.first(x), 3, 1, 1))),
        first=nn.Conv2d(3, 8, 1),
        last=nn.Conv2d(8, 4, 1),
    )
    empty(model.get_parameter("first.weight"), 1, 2, 6)
    with torch.no_grad():
        model.get_parameter("first.bias")[6] = 0
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    assert small.get_submodule("first").out_channels == 7


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.max(m.first(x), m.second(x)),
        lambda m, x: torch.min(m.first(x), m.second(x)),
        lambda m, x: torch.round(m.first(x) + m.second(x), decimals=1),
    ],
    ids=["max", "min", "round"],
)
def test_functions_of_single_elements_by_the_names_of_other_ops(function: Callable[..., Tensor]) -> None:
    model = Around(
        lambda m, x: m.last(function(m, x)), first=nn.Conv2d(3, 8, 1), second=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 4, 1)
    )
    for name in ("first.weight", "second.weight"):
        empty(model.get_parameter(name), 1, 2, 6)
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    assert small.get_submodule("first").out_channels == 5
    assert small.get_submodule("second").out_channels == 5
