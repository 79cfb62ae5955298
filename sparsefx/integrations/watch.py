"""What callbacks log of a sparse model."""

from __future__ import annotations

from torch import nn

from sparsefx.analysis.mask_changes import MaskChanges
from sparsefx.sparse_parameter import empty_channels, sparse_parameters

REMEDY = "use DistributedDataParallel, or your own loop with sparsify before fully_shard and attach after it"


class MaskWatch:
    """Density, flips and empty channels of a model, measured whenever something is logged.

    It keeps a copy of the masks of the last time: one byte a masked weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changes = MaskChanges(model)

    def measure(self) -> dict[str, float]:
        """All masked weights together.

        Returns:
            ``sparsity/density``: share that participates; ``sparsity/flips``: share whose place in the mask changed since the
            last time; ``sparsity/empty_channels``: output channels that hold only zeros.
        """
        masks = [record.mask for _, _, record in sparse_parameters(self._model)]
        total = sum(mask.numel() for mask in masks)
        kept = sum(int(mask.sum()) for mask in masks)
        flips = sum(int(count) for count in self._changes.flips().values())
        empty = sum(
            empty_channels(parameter.detach(), record.reduction_axis) for _, parameter, record in sparse_parameters(self._model)
        )
        return {"sparsity/density": kept / total, "sparsity/flips": flips / total, "sparsity/empty_channels": float(empty)}
