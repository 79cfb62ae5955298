"""Rows of an audit as the model is now: the decisions that `sparsify` stored, with what has changed since."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sparsefx.report import LayerReport
from sparsefx.sparse_parameter import SparseParameter, empty_channels


def dense_row(layer: LayerReport) -> LayerReport:
    """The row of a layer that is not masked, of a model that is sparsified in other parts."""
    reason = layer.reason or "was no part of the model when that was sparsified"
    return replace(layer, sparse=False, reason=reason, pattern="", density=1.0, tensor_core_reason="is dense")


def live_row(layer: LayerReport, weight: Tensor, record: SparseParameter | None) -> LayerReport:
    """The decision stored at sparsify, with density and empty channels as they are now."""
    if weight.is_meta:
        return layer
    if weight.shape != layer.shape:
        row = replace(layer, shape=tuple(weight.shape), sparse=True, reason="was replaced since the model was sparsified")
        return live_row(replace(row, flops=None), weight, record)
    empty = empty_channels(weight.detach(), layer.reduction_axis)
    if record is None:
        reason = layer.reason or "was finalized: its zeros are baked in, and nothing keeps them"
        tensor_core = layer.tensor_core_reason if layer.reason else "is dense"
        return replace(
            layer,
            sparse=False,
            reason=reason,
            pattern="",
            density=1.0,
            empty_channels=empty,
            tensor_core_reason=tensor_core,
            backend="",
        )
    return replace(layer, density=float(record.mask.float().mean()), empty_channels=empty)
