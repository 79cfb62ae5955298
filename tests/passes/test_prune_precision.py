"""Comparison in float64 of models whose code, or whose kernels, know shorter formats only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import VerificationError
from sparsefx.passes.channels.precision import Widening
from tests.channel_pruning import IMAGE, Around, empty, filled, widths


def code_that_holds_float32(model: nn.Module, x: Tensor) -> Tensor:
    grid = torch.arange(x.shape[-1]).float()
    made: Tensor = model.head(model.stem(x) @ torch.outer(grid, grid))  # type: ignore[operator]
    return made


def test_code_that_asks_for_float32_is_compared_in_float64_all_the_same() -> None:
    model = filled(Around(code_that_holds_float32, stem=nn.Conv2d(3, 8, 3, padding=1, bias=False), head=nn.Conv2d(8, 2, 1)))
    empty(model.stem.weight, 1, 4)  # type: ignore[arg-type, union-attr]
    with pytest.raises(RuntimeError, match="same dtype"):
        copy.deepcopy(model).double()(torch.randn(IMAGE).double())
    plan = sparsefx.channel_plan(model, torch.randn(IMAGE), multiple=1)
    assert plan.report.difference is not None
    assert plan.report.difference < 1e-12
    x = torch.randn(IMAGE)
    small = sparsefx.apply_channel_plan(model, plan)
    assert widths(small)["stem.weight"][0] == 6
    torch.testing.assert_close(small(x), model(x))


def test_a_model_that_does_not_run_in_float64_is_refused() -> None:
    def only_float32(model: nn.Module, x: Tensor) -> Tensor:
        made: Tensor = model.head(model.stem(x))  # type: ignore[operator]
        if model.stem.weight.dtype == torch.float64:  # type: ignore[union-attr]
            raise ValueError("only float32")
        return made

    model = filled(Around(only_float32, stem=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 2, 1)))
    empty(model.stem.weight, 1, 4)  # type: ignore[arg-type, union-attr]
    with pytest.raises(VerificationError, match=r"does not run in float64 \(ValueError: only float32\)"):
        sparsefx.prune_channels(model, torch.randn(IMAGE))


def experts(model: nn.Module, x: Tensor) -> Tensor:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    made: Tensor = model.head(torch._grouped_mm(model.stem(x), model.weights, offs=ends))  # type: ignore[operator]
    return made


def exports_products_of_experts() -> bool:
    """Releases of torch before 2.15 multiply float32 experts on the CPU, but export those of bfloat16 only."""
    rows, weights, ends = (torch.empty(size, device="meta") for size in ((5, 8), (3, 8, 8), (3,)))
    try:
        torch._grouped_mm(rows, weights, offs=ends.int())
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not exports_products_of_experts(), reason="this torch exports products of experts in bfloat16 only")
def test_products_of_experts_are_compared_in_float64_too() -> None:
    class Experts(Around):
        def __init__(self) -> None:
            super().__init__(experts, stem=nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), head=nn.Linear(8, 2))
            self.weights = nn.Parameter(torch.randn(3, 8, 8))

    model = Experts().eval()
    empty(model.stem[0].weight, 1, 4)  # type: ignore[arg-type, union-attr, index]
    x = torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="Double"):
        copy.deepcopy(model).double()(x.double())
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small.stem[0].out_features == 14  # type: ignore[union-attr, index]
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 3, 4]])
def test_a_product_of_experts_taken_apart_is_that_of_torch(ends: list[int]) -> None:
    rows, weights, offs = torch.randn(5, 8), torch.randn(3, 8, 8), torch.tensor(ends, dtype=torch.int32)
    with Widening():  # type: ignore[no-untyped-call]
        made = torch._grouped_mm(rows, weights, offs=offs)
    assert made.dtype == torch.float64
    torch.testing.assert_close(made[: ends[-1]].float(), torch._grouped_mm(rows, weights, offs=offs)[: ends[-1]])


@pytest.mark.parametrize(
    "function",
    [
        lambda m, h: torch.fft.rfft(h),
        lambda m, h: torch.view_as_real(torch.complex(h, 2 * h) @ m.turn),
        lambda m, h: h.to(torch.complex64) @ m.turn,
    ],
    ids=["complex output", "complex weight", "code that holds a format"],
)
def test_complex_numbers_are_compared_in_their_longest_format(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Around(lambda m, x: function(m, m.last(torch.tanh(m.first(x) - 0.3))), first=nn.Linear(4, 16), last=nn.Linear(16, 3))
    model.register_parameter("turn", nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)))
    empty(model.get_parameter("first.weight"), *range(1, 8))
    x = torch.randn(64, 4)
    small = sparsefx.prune_channels(model.eval(), x, multiple=1)
    assert small.get_submodule("first").out_features == 9
    difference = sparsefx.channel_plan_of(small).report.difference
    assert difference is not None
    assert 0 < difference < 1e-12
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_eight_bits_beside_layers_are_no_obstacle(dtype: torch.dtype) -> None:
    model = Around(
        lambda m, x: m.last(torch.relu(m.first(x))) + x @ m.short.to(x.dtype), first=nn.Linear(4, 16), last=nn.Linear(16, 3)
    )
    model.register_parameter("short", nn.Parameter(torch.randn(4, 3).to(dtype), requires_grad=False))
    empty(model.get_parameter("first.weight"), *range(1, 8))
    x = torch.randn(5, 4)
    small = sparsefx.prune_channels(model.eval(), x, multiple=1)
    assert small.get_submodule("first").out_features == 9
    torch.testing.assert_close(small(x), model(x))
