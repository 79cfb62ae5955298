"""The masked ops: registered under ``torch.ops.sparsefx``, with one reference meaning and a dense weight gradient.

``mask_weight(weight, mask)`` is the one real op. It gives ``weight`` where ``mask`` is True and zero elsewhere, and hands
the gradient of its result back unchanged: a *dense* gradient, taken at the participating weights, as magnitude rewiring
asks for (Sparse-training paper, Algorithm 1). All others are composites: the plain ATen op applied to ``mask_weight``, so
their outputs and gradients are those of the dense op at the masked weight, bit for bit, on every device and under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sparsefx", "DEF")

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVOLUTIONS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
MASKED_OPS = ("linear", *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
"""ATen ops that have a masked counterpart ``sparsefx::masked_<name>``: same arguments, the mask behind the weight."""


@torch.library.custom_op("sparsefx::mask_weight", mutates_args=(), schema="(Tensor weight, Tensor mask) -> Tensor")
def mask_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where ``mask`` is True, zero elsewhere.

    Args:
        weight: any shape and floating dtype.
        mask: bool, of the weight's shape.

    Returns:
        A new tensor of the weight's shape, dtype and memory layout. Its gradient passes to ``weight`` unchanged.
    """
    _check(weight, mask)
    # A choice, not a product: a NaN that does not participate must not reach the output, and zeros carry no sign.
    result = torch.where(mask, weight, 0)
    # Where the layouts of mask and weight differ, `where` may choose another one than the fake kernel promises.
    return result if result.stride() == weight.stride() else torch.empty_like(weight).copy_(result)


@mask_weight.register_fake
def _(weight: Tensor, mask: Tensor) -> Tensor:
    _check(weight, mask)
    return torch.empty_like(weight)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


mask_weight.register_autograd(_backward)


@mask_weight.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], weight: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    weight_dim, mask_dim = in_dims
    weight = weight.movedim(weight_dim, 0) if weight_dim is not None else weight.expand(info.batch_size, *weight.shape)
    mask = mask.movedim(mask_dim, 0) if mask_dim is not None else mask.expand(info.batch_size, *mask.shape)
    return mask_weight(weight, mask), 0


def _check(weight: Tensor, mask: Tensor) -> None:
    # torch._check keeps the message under fake tensors and torch.compile too.
    torch._check(
        mask.dtype == torch.bool and mask.shape == weight.shape,
        lambda: (
            f"mask_weight was given a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for a weight of shape "
            f"{tuple(weight.shape)}; expected bool and the weight's shape"
        ),
    )


LIBRARY.define("masked_linear(Tensor input, Tensor weight, Tensor mask, Tensor? bias=None) -> Tensor")


def _masked_linear(data: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.aten.linear.default(data, mask_weight(weight, mask), bias)
    return result


LIBRARY.impl("masked_linear", _masked_linear, "CompositeImplicitAutograd")
# vmap decomposes it as well, where it would otherwise loop over the batch.
LIBRARY.impl("masked_linear", _masked_linear, "FuncTorchBatchedDecomposition")


def _define_convolution(name: str, transposed: bool) -> None:
    dimensions = name[-2]
    size = f"SymInt[{dimensions}]"
    if transposed:
        rest = f"{size} stride=1, {size} padding=0, {size} output_padding=0, SymInt groups=1, {size} dilation=1"
    else:
        rest = f"{size} stride=1, {size} padding=0, {size} dilation=1, SymInt groups=1"
    LIBRARY.define(f"masked_{name}(Tensor input, Tensor weight, Tensor mask, Tensor? bias=None, {rest}) -> Tensor")
    packet = getattr(torch.ops.aten, name)
    overload = packet.input if transposed and name != "conv_transpose1d" else packet.default

    def masked_convolution(data: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
        result: Tensor = overload(data, mask_weight(weight, mask), bias, *rest)
        return result

    LIBRARY.impl(f"masked_{name}", masked_convolution, "CompositeImplicitAutograd")
    LIBRARY.impl(f"masked_{name}", masked_convolution, "FuncTorchBatchedDecomposition")


for _name in CONVOLUTIONS:
    _define_convolution(_name, transposed=False)
for _name in TRANSPOSED_CONVOLUTIONS:
    _define_convolution(_name, transposed=True)

masked_linear = torch.ops.sparsefx.masked_linear.default
masked_conv1d = torch.ops.sparsefx.masked_conv1d.default
masked_conv2d = torch.ops.sparsefx.masked_conv2d.default
masked_conv3d = torch.ops.sparsefx.masked_conv3d.default
masked_conv_transpose1d = torch.ops.sparsefx.masked_conv_transpose1d.default
masked_conv_transpose2d = torch.ops.sparsefx.masked_conv_transpose2d.default
masked_conv_transpose3d = torch.ops.sparsefx.masked_conv_transpose3d.default
