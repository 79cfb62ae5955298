"""What callbacks log of a sparse model."""

from __future__ import annotations

from torch import Tensor, nn

from sparsefx.sparse_parameter import empty_channels, sparse_parameters

REMEDY = "use DistributedDataParallel, or your own loop with sparsify before fully_shard and attach after it"


class MaskWatch:
    """Density, flips and empty channels of a model, measured whenever something is logged.

    It keeps a copy of the masks of the last time: one byte a masked weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last = self._masks()

    def _masks(self) -> dict[str, Tensor]:
        return {name: record.mask.clone() for name, _, record in sparse_parameters(self._model)}

    def measure(self) -> dict[str, float]:
        """All masked weights together.

        Returns:
            ``sparsity/density``: share that participates; ``sparsity/flips``: share whose place in the mask changed since the
            last time; ``sparsity/empty_channels``: output channels that hold only zeros.
        """
        now = self._masks()
        total = sum(mask.numel() for mask in now.values())
        kept = sum(int(mask.sum()) for mask in now.values())
        flips = sum(int((mask != self._last[name]).sum()) for name, mask in now.items() if name in self._last)
        empty = sum(
            empty_channels(parameter.detach(), record.reduction_axis) for _, parameter, record in sparse_parameters(self._model)
        )
        self._last = now
        return {"sparsity/density": kept / total, "sparsity/flips": flips / total, "sparsity/empty_channels": float(empty)}
