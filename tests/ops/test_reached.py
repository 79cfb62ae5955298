"""Weights that a step may not change go back to their dormant value, and gradients are penalized: compiled as in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsefx.dormant_values import compact_of
from sparsefx.ops import native
from sparsefx.ops.split import merge, penalize, split
from sparsefx.patterns import parse
from sparsefx.sparse_parameter import SparseParameter

Parts = tuple[Tensor, SparseParameter, Tensor]
SHAPES = [(3, 5), (64, 128), (7, 1025), (16, 8, 3, 3), (1,), (0, 4)]


def parts(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, channels_last: bool = False, seed: int = 0) -> Parts:
    """A weight as it stands after an optimizer step, its record, and the weights that the step may have changed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.1
    reached = mask | (torch.rand(shape, generator=generator) < 0.1)
    dormant = torch.randn(shape, generator=generator).to(dtype).masked_fill(mask, 0)
    if channels_last and weight.dim() == 4:
        layout = torch.channels_last
        weight, mask, reached, dormant = (one.to(memory_format=layout) for one in (weight, mask, reached, dormant))
    return weight, SparseParameter(parse("unstructured"), 0.1, 1, mask, compact_of(dormant, mask)), reached


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def test_torch_sums_as_the_kernels_do_where_they_are_used() -> None:
    assert isinstance(native.fuses_sums(), bool)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [0.0, 9e-4, 3.0])
def test_penalties_are_the_same_compiled_and_not(shape: tuple[int, ...], more: float, channels_last: bool) -> None:
    weight, record, reached = parts(shape, channels_last=channels_last)
    merge([weight], [record])
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(5)).as_strided(weight.shape, weight.stride())
    flat = gradient.view(-1) if gradient.is_contiguous() else gradient.permute(0, 2, 3, 1).reshape(-1)
    if flat.numel() > 8:
        flat[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-42])
    results = []
    for compiled in (True, False):
        mine = gradient.clone()
        penalize([mine], [weight], [record], [reached], scale=[1e-4], more=[more], compiled=compiled)
        results.append(mine)
    assert torch.equal(bits(results[0]), bits(results[1]))
    assert (bits(results[0])[~reached] == 0).all()


def test_penalties_of_other_types_and_layouts_are_torchs() -> None:
    weight, record, reached = parts((8, 8), dtype=torch.bfloat16)
    gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = gradient.add(weight, alpha=0.1).add(record.dormant, alpha=0.5).masked_fill(~reached, 0)
    penalize([gradient], [weight], [record], [reached], scale=[0.1], more=[0.5])
    assert torch.equal(gradient, expected)
    weight, record, reached = parts((8, 8))
    merge([weight], [record])
    turned = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).t()
    expected = turned.add(weight, alpha=0.1).add(record.dormant, alpha=0.5).masked_fill(~reached, 0)
    penalize([turned], [weight], [record], [reached], scale=[0.1], more=[0.5])
    assert torch.equal(turned, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rewire", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_split_with_reached_is_a_merge_and_a_split(
    shape: tuple[int, ...], dtype: torch.dtype, rewire: bool, channels_last: bool
) -> None:
    found = []
    for way in ("compiled", "torch", "apart"):
        weight, record, reached = parts(shape, dtype=dtype, channels_last=channels_last)
        if way == "apart":
            assert record.dormant is not None
            weight = torch.where(reached, weight, record.dormant)
            flag = split([weight], [record], rewire=rewire, compiled=False)
        else:
            flag = split([weight], [record], rewire=rewire, reached=[reached], compiled=way == "compiled")
        assert record.dormant is not None
        found.append((bits(weight), bits(record.dormant), record.mask, bool(flag)))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0][:3], other[:3], strict=True))
        assert found[0][3] == other[3]


def test_what_was_not_reached_cannot_diverge() -> None:
    weight, record, reached = parts((64, 64))
    weight[~reached] = float("nan")
    assert not bool(split([weight], [record], rewire=False, reached=[reached]))
    weight[reached.nonzero()[0][0], reached.nonzero()[0][1]] = float("nan")
    assert bool(split([weight], [record], rewire=False, reached=[reached]))


def test_without_dormant_values_weights_outside_the_mask_are_cleared_and_seen() -> None:
    weight, record, _ = parts((33, 70))
    record.compact = None
    weight[0, 0], record.mask[0, 0] = -0.0, False
    for scale in (1.0, 0.0, 0.5):
        for value, flag in ((0.0, False), (float("inf"), True)):
            mine = weight.clone()
            mine[-1, -1], record.mask[-1, -1] = value, False
            assert bool(split([mine], [record], rewire=False, dormant_scale=scale)) is flag
            assert torch.equal(bits(mine), bits(weight.masked_fill(~record.mask, 0)))
