"""How a call reads a weight: the weight as matrices, one for each group of a convolution, and its inputs to match."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsefx.patterns import Pattern
from sparsefx.patterns.padded import Padded

_CONVOLUTIONS = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
# Input values that are taken apart at a time: convolutions copy each as often as their kernel has places.
_VALUES_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class Call:
    """A matrix product or convolution that reads a weight.

    Attributes:
        input: ``[..., columns]``, or ``[batch, channels, *sizes]`` for a convolution.
        weight: the tensor that is read.
        transposed: the weight is ``[in, out]``.
        stride, padding, dilation: of a convolution, one number for each spatial axis; empty for a product.
        groups: of a convolution.
    """

    input: Tensor
    weight: Tensor
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def as_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call, where the function is a product or a convolution that is understood here."""
    named = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    if func is functional.linear:
        return Call(named["input"], named["weight"])
    if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], Tensor) and args[1].dim() == 2:
        return Call(args[0], args[1], transposed=True)
    if func in (torch.addmm, Tensor.addmm) and len(args) == 3 and not kwargs:
        return Call(args[1], args[2], transposed=True)
    if func not in _CONVOLUTIONS:
        return None
    axes, weight = _CONVOLUTIONS[func], named["weight"]
    stride, dilation = (_each(named.get(name, 1), axes) for name in ("stride", "dilation"))
    given = named.get("padding", 0)
    sizes = weight.shape[2:]
    if given == "same":
        total = [step * (size - 1) for step, size in zip(dilation, sizes, strict=True)]
        padding = tuple((value // 2, value - value // 2) for value in total)
    elif given == "valid":
        padding = ((0, 0),) * axes
    else:
        padding = tuple((value, value) for value in _each(given, axes))
    inputs = named["input"]
    inputs = inputs if inputs.dim() == axes + 2 else inputs[None]
    return Call(inputs, weight, stride=stride, padding=padding, dilation=dilation, groups=int(named.get("groups", 1)))


def to_matrices(weight: Tensor, call: Call) -> Tensor:
    """``[groups, outputs per group, columns]``."""
    if call.transposed:
        return weight.T[None]
    flat = weight.movedim(1, -1).flatten(1) if weight.dim() > 2 else weight
    return flat.reshape(call.groups, -1, flat.shape[1])


def from_matrices(matrices: Tensor, weight: Tensor, call: Call) -> Tensor:
    """The inverse of `to_matrices`, in the shape of ``weight``."""
    if call.transposed:
        return matrices[0].T
    flat = matrices.reshape(weight.shape[0], -1)
    return flat.reshape(weight.shape[0], *weight.shape[2:], weight.shape[1]).movedim(-1, 1) if weight.dim() > 2 else flat


@dataclass(frozen=True, repr=False)
class EachTap(Pattern):
    """A padded pattern for the matrices of `to_matrices`: the channels at each place of the kernel end in a group of their own.

    Attributes:
        inner: the pattern of the channels at one place.
        taps: how many places the kernel has.
    """

    inner: Padded
    taps: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def fixed_density(self) -> float | None:
        return self.inner.fixed_density

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return self.inner.refusal(shape, reduction_axis=reduction_axis)

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        channels = scores.unflatten(1, (self.taps, -1)).flatten(0, 1)
        return self.inner.mask(channels, density).reshape(scores.shape)


def pattern_of_matrices(pattern: Pattern, call: Call) -> Pattern:
    """What a pattern of a weight asks of the matrices that `to_matrices` makes of it."""
    taps = call.weight.shape[2:].numel()
    return EachTap(pattern, taps) if isinstance(pattern, Padded) and call.stride and taps > 1 else pattern


def inputs_of(call: Call) -> Iterator[Tensor]:
    """The inputs that each output is a product of, ``[groups, samples, columns]``, in parts of bounded size."""
    if not call.stride:
        yield call.input.detach().reshape(1, -1, call.input.shape[-1])
        return
    taps = call.weight.shape[2:].numel()
    each = max(1, _VALUES_AT_A_TIME // max(1, taps * call.input.shape[1:].numel()))
    flat_padding = [value for pair in reversed(call.padding) for value in pair]
    for part in call.input.detach().split(each):
        padded = functional.pad(part, flat_padding)
        counts = [
            (size - step * (taps_there - 1) - 1) // stride + 1
            for size, step, taps_there, stride in zip(
                padded.shape[2:], call.dilation, call.weight.shape[2:], call.stride, strict=True
            )
        ]
        places = []
        for tap in torch.cartesian_prod(*(torch.arange(size) for size in call.weight.shape[2:])).reshape(taps, -1).tolist():
            window = padded
            for axis, (offset, step, stride, count) in enumerate(zip(tap, call.dilation, call.stride, counts, strict=True)):
                first = offset * step
                window = window[(slice(None),) * (axis + 2) + (slice(first, first + stride * (count - 1) + 1, stride),)]
            places.append(window.movedim(1, -1).reshape(-1, call.groups, part.shape[1] // call.groups))
        yield torch.stack(places, dim=2).flatten(2).movedim(1, 0)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(int(part) for part in value)
    return values * axes if len(values) == 1 else values
