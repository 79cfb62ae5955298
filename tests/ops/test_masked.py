"""The masked ops: meaning, bit equality with the dense op, dense gradients, and the ways a program can run them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparsefx.ops import masked
from sparsefx.ops.masked import mask_weight

CASES: dict[str, tuple[Any, Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "linear": (masked.masked_linear, functional.linear, (3, 5, 8), (6, 8), {}),
    "conv1d": (masked.masked_conv1d, functional.conv1d, (2, 8, 9), (6, 4, 3), {"stride": [2], "padding": [1], "groups": 2}),
    "conv2d": (masked.masked_conv2d, functional.conv2d, (2, 8, 7, 9), (6, 8, 3, 1), {"padding": (1, 0), "dilation": (2, 1)}),
    "conv3d": (masked.masked_conv3d, functional.conv3d, (1, 4, 5, 4, 6), (4, 4, 2, 1, 3), {"stride": (1, 2, 1)}),
    "conv_transpose1d": (masked.masked_conv_transpose1d, functional.conv_transpose1d, (2, 8, 9), (8, 6, 3), {"stride": [2]}),
    "conv_transpose2d": (
        masked.masked_conv_transpose2d,
        functional.conv_transpose2d,
        (2, 8, 5, 6),
        (8, 3, 3, 3),
        {"stride": [2, 2], "padding": [1, 1], "output_padding": [1, 1], "groups": 2},
    ),
    "conv_transpose3d": (masked.masked_conv_transpose3d, functional.conv_transpose3d, (1, 4, 3, 4, 3), (4, 2, 2, 1, 3), {}),
}


def _gradients(call: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    output = call(*leaves)
    return output.detach(), list(torch.autograd.grad(output.square().sum(), leaves))


def _make(case: str) -> tuple[Any, Any, Tensor, Tensor, Tensor | None, dict[str, Any]]:
    op, dense, data_shape, weight_shape, options = CASES[case]
    outputs = weight_shape[0] if "transpose" not in case else weight_shape[1] * options.get("groups", 1)
    weight = torch.randn(weight_shape, requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True)
    return op, dense, torch.randn(data_shape, requires_grad=True), weight, bias, options


@pytest.mark.parametrize("case", CASES)
def test_an_all_ones_mask_gives_the_dense_op_bit_for_bit(case: str) -> None:
    op, dense, data, weight, bias, options = _make(case)
    mask = torch.ones_like(weight, dtype=torch.bool)
    got, got_gradients = _gradients(lambda x, w, b: op(x, w, mask, b, **options), data, weight, bias)
    expected, gradients = _gradients(lambda x, w, b: dense(x, w, b, **options), data, weight, bias)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(got_gradients, gradients, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_mask_gives_the_dense_op_at_the_masked_weight_with_a_dense_weight_gradient(case: str) -> None:
    op, dense, data, weight, bias, options = _make(case)
    mask = torch.rand(weight.shape) < 0.5
    masked_leaf = weight.detach().masked_fill(~mask, 0).requires_grad_()
    got, got_gradients = _gradients(lambda x, w, b: op(x, w, mask, b, **options), data, weight, bias)
    expected, gradients = _gradients(lambda x, w, b: dense(x, w, b, **options), data, masked_leaf, bias)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(got_gradients, gradients, strict=True))
    assert (got_gradients[1][~mask] != 0).any()


def test_values_that_do_not_participate_cannot_reach_the_output() -> None:
    weight = torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]])
    mask = torch.tensor([[True, False], [False, True]])
    result = mask_weight(weight, mask)
    assert torch.equal(result, torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    assert not torch.signbit(result[~mask]).any()


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_mask_weight_is_the_product_with_the_mask(shape: list[int], seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=drawn, dtype=torch.float64)
    mask = torch.rand(shape, generator=drawn) < 0.5
    assert torch.equal(mask_weight(weight, mask), weight * mask)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask_format", [torch.contiguous_format, torch.channels_last])
def test_the_result_has_the_memory_layout_of_the_weight(weight_format: Any, mask_format: Any) -> None:
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=weight_format)
    mask = (torch.rand(8, 4, 3, 3) < 0.5).contiguous(memory_format=mask_format)
    result = mask_weight(weight, mask)
    assert result.stride() == weight.stride()
    assert torch.equal(result, weight * mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool)])
def test_a_mask_of_another_dtype_or_shape_is_refused(mask: Tensor) -> None:
    with pytest.raises(RuntimeError, match="expected bool and the weight's shape"):
        mask_weight(torch.randn(2, 2), mask)


def test_autocast_gives_what_it_gives_the_dense_op() -> None:
    data, weight = torch.randn(4, 8), torch.randn(6, 8)
    mask = torch.rand(6, 8) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.ops.sparsefx.masked_linear(data, weight, mask)
        expected = functional.linear(data, weight * mask)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_vmap_over_the_weights_of_an_ensemble() -> None:
    weights, mask, data = torch.randn(3, 6, 8), torch.rand(6, 8) < 0.5, torch.randn(4, 8)
    got = torch.vmap(lambda weight: torch.ops.sparsefx.masked_linear(data, weight, mask))(weights)
    torch.testing.assert_close(got, torch.stack([functional.linear(data, weight * mask) for weight in weights]))


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.register_buffer("mask", torch.rand(8, 4, 3, 3) < 0.5)

    def forward(self, data: Tensor) -> Tensor:
        result: Tensor = torch.ops.sparsefx.masked_conv2d(data, self.weight, self.mask, None, [1, 1], [1, 1])
        return result


def test_torch_export_keeps_the_op_as_one_node() -> None:
    module, data = _Masked(), torch.randn(1, 4, 5, 5)
    program = torch.export.export(module, (data,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.sparsefx.masked_conv2d.default]
    assert torch.equal(program.module()(data), module(data))


def test_compiled_code_gives_the_same_gradients() -> None:
    module, data = _Masked(), torch.randn(1, 4, 5, 5)
    module(data).square().sum().backward()
    expected = module.weight.grad
    module.weight.grad = None
    torch.compile(module, backend="aot_eager", fullgraph=True)(data).square().sum().backward()
    assert expected is not None
    assert torch.equal(module.weight.grad, expected)  # type: ignore[arg-type]
    torch._dynamo.reset()


def test_the_real_op_holds_what_the_dispatcher_expects_of_it() -> None:
    weight = torch.randn(4, 6).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checker itself reads gradients of tensors that are no leaves
        torch.library.opcheck(mask_weight, (weight, torch.rand(4, 6) < 0.5), test_utils=checks)
