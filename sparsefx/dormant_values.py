"""The values of weights that do not participate, kept without the places of those that do.

On the CPU they stand one after the other, in the order in which the mask lies in memory: with 2:4 they take half of what the
weight takes. On other devices, where the number of them would have to be waited for, each keeps its place in a tensor like the
weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.errors import StateError

MASK_CHANGED = (
    "a mask leaves out another number of weights than it has dormant values: it was changed in place by something else than "
    "sparsefx. Let an algorithm change it with Layer.set_mask, or load a checkpoint"
)


def compact_of(values: Tensor, mask: Tensor) -> Tensor:
    """Those of ``values`` (of any layout, in the mask's shape) that the mask leaves out, as a new tensor."""
    if mask.device.type != "cpu":
        return torch.empty_like(mask, dtype=values.dtype).copy_(values).masked_fill_(mask, 0)
    return _in_order(values, mask).masked_select(~_in_order(mask, mask))


def expect_own_mask(compact: Tensor, mask: Tensor) -> None:
    """Raise StateError where the mask leaves out another number of weights than there are dormant values."""
    if mask.device.type == "cpu" and mask.numel() - int(mask.count_nonzero()) != compact.numel():
        raise StateError(MASK_CHANGED)


def spread(compact: Tensor, mask: Tensor) -> Tensor:
    """Undo `compact_of`: a new tensor in the mask's shape and layout, zero where the mask is True.

    Raises:
        StateError: the mask leaves out another number of weights.
    """
    if mask.device.type != "cpu":
        return compact.clone()
    expect_own_mask(compact, mask)
    left_out = ~_in_order(mask, mask)
    flat = torch.zeros(mask.numel(), dtype=compact.dtype).masked_scatter_(left_out, compact)
    axes = _order(mask)
    back = sorted(range(mask.dim()), key=axes.__getitem__)
    return flat.view([mask.shape[axis] for axis in axes]).permute(back)


def _order(mask: Tensor) -> list[int]:
    """The axes, from the one with the longest way between neighbours in memory."""
    steps = mask.stride()
    return sorted(range(mask.dim()), key=lambda axis: -steps[axis])


def _in_order(tensor: Tensor, mask: Tensor) -> Tensor:
    """The elements in one row, in the order in which the mask lies in memory; a view where that is possible."""
    return tensor.permute(_order(mask)).reshape(-1)
