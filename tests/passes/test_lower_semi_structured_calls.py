"""Layers that are called, or hooked, in ways that a compressed layer is not: they stay dense with a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.acceleration import accelerate_with, load_accelerated
from sparsefx.errors import StateError
from sparsefx.ops.semi_structured_product import Operands, Reference
from sparsefx.passes.acceleration_report import Acceleration


def sparse_wins(operations: Sequence[Callable[[], object]]) -> list[float]:
    for operation in operations:
        operation()
    return [3e-6, *(2e-6 for _ in operations[1:])]


def run(model: nn.Module, data: Tensor, kernel: Reference = Reference()) -> Acceleration:  # noqa: B008 - frozen
    return accelerate_with(model, data, kernels=(kernel,), timer=sparse_wins)


def sparse(model: nn.Module) -> nn.Module:
    return sparsefx.finalize(sparsefx.sparsify(model)).eval()


class Called(nn.Module):
    """A Linear layer, and another one or a 1 x 1 convolution that is called in the way under test."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.layer = nn.Linear(32, 32) if layer is None else layer
        self.call = call

    def forward(self, data: Tensor) -> Tensor:
        return self.call(self.layer, self.plain(data))


def of_layer(report: Acceleration) -> Any:
    return next(row for row in report.layers if row.name == "layer")


def test_expanded_inputs_are_measured_as_they_come() -> None:
    model = sparse(Called(lambda layer, x: layer(x[:1].expand(3, -1, -1)) + layer(x)))
    report = run(model, torch.randn(3, 4, 32))
    assert of_layer(report).accelerated
    assert report.largest_difference < 1e-5


@pytest.mark.parametrize(
    ("call", "layer", "reason"),
    [
        (lambda conv, x: conv(x.T[..., None]).mean((-1, -2)), lambda: nn.Conv2d(32, 32, 1), "without a batch axis"),
        (lambda linear, x: torch.cat([x, linear(x[:0])]), lambda: nn.Linear(32, 32), "empty inputs alone"),
        (lambda linear, x: torch.cat([x, linear(x)], 1), lambda: nn.Linear(32, 0), "its weight is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_calls_that_cannot_be_measured_leave_the_layer_dense(call: Any, layer: Any, reason: str) -> None:
    report = run(sparse(Called(call, layer())), torch.randn(5, 32))
    assert report.accelerated == ("plain",)
    assert reason in of_layer(report).reason
    assert report.largest_difference < 1e-5


def test_autocast_inside_of_a_model_in_another_dtype_leaves_the_layer_dense() -> None:
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x.float())

    report = run(sparse(Called(call)).to(torch.bfloat16), torch.randn(5, 32).to(torch.bfloat16))
    assert report.accelerated == ("plain",)
    assert "torch.bfloat16 and its input torch.float32" in of_layer(report).reason


def test_the_variant_is_searched_with_the_call_of_most_rows() -> None:
    class Searching(Reference):
        def fastest_algorithm(self, rows: Tensor, operands: Operands, bias: Tensor | None) -> int:
            return len(rows)

    model = sparse(Called(lambda layer, x: torch.cat([layer(x[:0]), layer(x), layer(x[:1])])))
    report = run(model, torch.randn(5, 32), Searching())
    assert report.model.layer.algorithm == 5


@pytest.mark.parametrize("register", [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook])
def test_a_layer_with_hooks_stays_dense(register: Callable[..., Any]) -> None:
    model = sparse(Called(lambda layer, x: layer(x)))
    seen: list[int] = []
    register(model.layer, lambda *_: seen.append(1))
    report = run(model, torch.randn(5, 32))
    assert report.accelerated == ("plain",)
    assert "has forward hooks" in of_layer(report).reason
    seen.clear()
    report.model(torch.randn(5, 32))
    assert seen == [1]


def test_example_inputs_that_the_model_writes_to_stay() -> None:
    model = sparse(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(32, 32)))
    data = torch.randn(5, 32)
    before = data.clone()
    assert run(model, data).accelerated == ("1",)
    assert torch.equal(data, before)


def test_tables_of_four_axes_keep_their_layout() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(32, 32, 1)
            self.table = nn.Parameter(torch.randn(1, 32, 4, 4))

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(image) + self.table.view(-1).sum()

    report = run(sparse(Biased()), torch.randn(2, 32, 4, 4))
    assert report.accelerated == ("layer",)
    assert report.model.table.is_contiguous()


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        (lambda: nn.Linear(64, 32, bias=False), lambda: nn.Linear(32, 64, bias=False)),
        (lambda: nn.Conv2d(144, 32, 1), lambda: nn.Conv2d(16, 32, 3)),
    ],
)
def test_a_weight_of_as_many_values_in_another_shape_is_refused(saved: Any, given: Any) -> None:
    layer = saved()
    data = torch.randn(2, layer.weight.shape[1], *((4, 4) if layer.weight.ndim == 4 else ()))
    state = run(sparse(nn.Sequential(layer)), data).model.state_dict()
    with pytest.raises(StateError, match=r"values of a weight .* and 0\.weight of the model is"):
        load_accelerated(nn.Sequential(given()), state)
