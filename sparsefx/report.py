"""What sparsefx says of a model: one LayerReport for every Linear/Conv weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One Linear/Conv weight: whether it is sparse, and if not, why.

    Attributes:
        name: module path (``layer1.0.conv1``), or the parameter's name where no layer module owns it.
        parameter: full name of the weight; the key in ``masks(model)``.
        kind: ``Linear``, ``Conv2d``, ``ConvTranspose2d``, ``Conv1D``, ``MultiheadAttention.in_proj_weight``, ...
        shape: shape of the weight.
        sparse: True where a mask holds (or, before sparsify, would hold).
        reason: why the layer stays dense, in words with the remedy; empty where sparse.
        pattern: name of the pattern; empty where dense.
        density: share of weights that participate, measured on the mask; 1.0 where dense.
        empty_channels: output channels all of whose weights are zero.
        flops: floating point operations of all calls in one forward pass of the example inputs, computed
            dense; None where the shapes are unknown.
        rung: of the capture ladder, 1 (torch.export) to 4 (the module alone).
        call_sites: where the weight is used, in order.
        reduction_axis: 0 or 1, the axis along which the layer sums.
        tensor_core_reason: why Sparse Tensor Cores would not take it; empty where they would.
    """

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    sparse: bool
    reason: str
    pattern: str
    density: float
    empty_channels: int
    flops: int | None
    rung: int
    call_sites: tuple[str, ...]
    reduction_axis: int
    tensor_core_reason: str

    @property
    def effective_flops(self) -> int | None:
        """Operations on participating weights only: ``flops * density``."""
        return None if self.flops is None else round(self.flops * self.density)
