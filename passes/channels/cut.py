"""Takes from a tensor what stays of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def cut(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """What stays of a tensor.

    Args:
        tensor: of the shape before.
        axes: indices by axis; for the input axis of a grouped convolution one row of indices for each group that stays.
    """
    for axis, indices in sorted(axes.items()):
        indices = indices.to(tensor.device)
        if indices.dim() == 1:
            tensor = tensor.index_select(axis, indices)
        else:
            # Outputs were cut before: each group has equally many left, and takes inputs of its own.
            by_row = indices.repeat_interleave(tensor.shape[0] // len(indices), dim=0)
            by_row = by_row.view(*by_row.shape, *(1,) * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            tensor = tensor.gather(axis, by_row)
    return tensor
