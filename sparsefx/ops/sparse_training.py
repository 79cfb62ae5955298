"""Training with 2:4 transposable weights on Sparse Tensor Cores: two of a linear layer's three products are sparse.

``y = x w^T`` and ``dx = dy w`` run on a sparse kernel, since a transposable mask is 2:4 along the rows of both ``w`` and ``w^T``;
the weight's gradient ``dy^T x`` has no sparse factor and stays dense, which is also what dense updates want. The meaning is that
of ``sparsefx::masked_linear``: the mask is applied as the weight is packed, at every forward pass, so that no packed weight can
be out of date (an optimizer step, a loaded checkpoint, moved masks), and graphs captured by ``torch.compile`` or CUDA stay right.

Written without a GPU at hand: tested with the reference kernel on CPU, not run on Sparse Tensor Cores yet.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsefx.ops.cuda_transposable import masked_both_ways, pack_both_ways
from sparsefx.ops.masked import LIBRARY
from sparsefx.ops.semi_structured_product import KERNELS, ProductKernel, semi_structured_linear
from sparsefx.sparse_parameter import SparseParameter, records_of

_KEY = "_sparsefx_training_kernel"

LIBRARY.define("pack_masked(Tensor weight, Tensor mask, ScalarType dtype, str kernel) -> (Tensor, Tensor, Tensor, Tensor)")


def _pack_masked(weight: Tensor, mask: Tensor, dtype: torch.dtype, kernel: str) -> tuple[Tensor, ...]:
    if kernel == "cutlass":
        return tuple(pack_both_ways(weight, mask, dtype)[1:])
    masked, turned = masked_both_ways(weight, mask, dtype)
    chosen = KERNELS[kernel]
    return (*chosen.pack(masked), *chosen.pack(turned))


def _fake_pack_masked(weight: Tensor, mask: Tensor, dtype: torch.dtype, kernel: str) -> tuple[Tensor, ...]:
    outputs, inputs = weight.shape
    chosen = KERNELS[kernel]
    rooms = (*chosen.layout(outputs, inputs, dtype), *chosen.layout(inputs, outputs, dtype))
    return tuple(weight.new_empty(shape, dtype=kind) for shape, kind in rooms)


LIBRARY.impl("pack_masked", _pack_masked, "CPU")
LIBRARY.impl("pack_masked", _pack_masked, "CUDA")
torch.library.register_fake("sparsefx::pack_masked", _fake_pack_masked, lib=LIBRARY)
pack_masked = torch.ops.sparsefx.pack_masked.default
"""The operands of ``weight`` under ``mask`` and of its transpose, for one kernel: packed, metadata, packed, metadata."""


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
        packed, metadata, packed_t, metadata_t = pack_masked(weight, mask, rows.dtype, kernel)
        context.save_for_backward(rows, packed_t, metadata_t)
        context.kernel, context.weight_dtype = kernel, weight.dtype
        context.bias_dtype = None if bias is None else bias.dtype
        low = None if bias is None else bias.to(rows.dtype)
        result: Tensor = semi_structured_linear(rows, packed, metadata, low, weight.shape[0], kernel, 0)
        return result

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        gradient = gradients[0]
        rows, packed_t, metadata_t = context.saved_tensors
        needs_rows, needs_weight, _, needs_bias, _ = context.needs_input_grad
        rows_gradient = weight_gradient = bias_gradient = None
        if needs_rows:
            rows_gradient = semi_structured_linear(
                gradient.contiguous(), packed_t, metadata_t, None, rows.shape[1], context.kernel, 0
            )
        if needs_weight:
            weight_gradient = (gradient.t() @ rows).to(context.weight_dtype)
        if needs_bias:
            bias_gradient = gradient.sum(0).to(context.bias_dtype)
        return rows_gradient, weight_gradient, None, bias_gradient, None


def sparse_linear(data: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    """``linear(data, weight * mask, bias)`` with its forward product and its gradient for ``data`` on a sparse kernel.

    Args:
        data: ``[..., inputs]``, in a dtype that the kernel takes (under autocast, converted to its dtype).
        weight: ``[outputs, inputs]``, in any floating dtype; packed in that of ``data``.
        mask: bool, 2:4 along both axes.
        bias: ``[outputs]`` or None.
        kernel: name of one in `sparsefx.ops.semi_structured_product.KERNELS`.

    Returns:
        ``[..., outputs]``. The gradient for ``weight`` is dense, as that of ``sparsefx::mask_weight``. Differentiable once.
    """
    device = data.device.type
    if torch.is_autocast_enabled(device):
        data = data.to(torch.get_autocast_dtype(device))
    rows = data.reshape(-1, weight.shape[1])
    result: Tensor = _SparseLinear.apply(rows, weight, mask, bias, kernel)
    return result.view(*data.shape[:-1], weight.shape[0])


def training_refusal(kernel: ProductKernel, outputs: int, inputs: int, dtype: torch.dtype) -> str:
    """Why ``kernel`` cannot take a weight of this shape in both orientations; empty where it can."""
    return kernel.refusal(outputs, inputs, dtype) or kernel.refusal(inputs, outputs, dtype)


def install(module: nn.Linear, kernel: ProductKernel) -> None:
    """From now on, in training mode, ``module`` runs on ``kernel`` wherever it can; it stays the same object of the same class.

    What looks at the weight sees what it saw before. In eval mode, in graphs that torch.export or torch.fx captures, for inputs
    on another device or in another dtype, and while weights are sharded, the layer is the dense one.
    """
    module.__dict__[_KEY] = kernel.name
    # An object that copies and pickles with its module, in the place where nn.Module looks for the forward of one object.
    module.__dict__["forward"] = partial(_forward, module)


def remove(model: nn.Module) -> None:
    """Undo `install` for every layer below ``model``."""
    for module in model.modules():
        if module.__dict__.pop(_KEY, None) is not None:
            module.__dict__.pop("forward", None)


def kernel_of(module: nn.Module) -> str:
    """Name of the kernel that was installed, or an empty text."""
    name: str = module.__dict__.get(_KEY, "")
    return name


def _forward(module: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
    record = records_of(module).get("weight")
    kernel = kernel_of(module)
    if record is None or not module.training or not _fits(module.weight, record, input, kernel):
        return functional.linear(input, module.weight, module.bias)
    return sparse_linear(input, module.weight, record.mask, module.bias, kernel)


def _fits(weight: Tensor, record: SparseParameter, data: Tensor, kernel: str) -> bool:
    if not isinstance(data, Tensor) or torch.compiler.is_exporting():
        return False
    device = data.device.type
    if weight.device.type != device or (kernel != "reference" and device != "cuda"):
        return False
    if record.shards is not None or record.mask.shape != weight.shape or record.mask.device != weight.device:
        return False
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else data.dtype
    if not autocast and weight.dtype != dtype:
        return False
    return not training_refusal(KERNELS[kernel], weight.shape[0], weight.shape[1], dtype)
