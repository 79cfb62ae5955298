"""Pooling and resampling: each channel by itself; a constant channel stays what it is, but where padding comes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Value, constant_along, nothing_known


def max_pool(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """max_pool1d to 3d, adaptive ones too: padding is minus infinity."""
    return _pooled(propagation, node, arguments, keeps=True)


def average_pool(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """avg_pool1d to 3d: padding counts as zero, unless it is left out of the count."""
    padding = arguments["padding"]
    pads = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    divides = arguments.get("divisor_override") is not None
    return _pooled(propagation, node, arguments, keeps=not divides and not (pads and arguments["count_include_pad"]))


def resampled(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """adaptive pooling, upsampling and interpolation: weights of every place sum to one."""
    return _pooled(propagation, node, arguments, keeps=True)


def _pooled(propagation: Propagation, node: fx.Node, arguments: dict[str, Any], *, keeps: bool) -> Any:
    value = propagation.value(arguments.get("self", arguments.get("input")))
    made = node.meta["val"]
    several = isinstance(made, (tuple, list))
    shape = tuple(int(size) for size in made[0].shape) if several else shape_of(node)
    spatial = frozenset(axis for axis, (old, new) in enumerate(zip(value.shape, shape, strict=True)) if axis >= 2 or old != new)
    if len(value.shape) < 3 or value.varying & spatial:
        return propagation.refuse(node, "pools over channels")
    known = constant_along(value, 1)
    sizes = tuple(shape[1] if axis == 1 else 1 for axis in range(len(shape)))
    uneven = None if keeps or np.isnan(known).all() else known.reshape(sizes)
    known = known if keeps else np.where(known == 0, 0.0, np.nan)
    pooled = Value(shape, value.labels, nothing_known(len(shape))).with_constant(known.reshape(sizes))
    pooled = replace(pooled, uneven=uneven)
    return (pooled, pooled.forgotten()) if several else pooled


_MAXIMA = [
    f"{prefix}max_pool{rank}d{suffix}" for prefix in ("", "adaptive_") for rank in (1, 2, 3) for suffix in ("", "_with_indices")
]
_RESAMPLED = [
    *(f"adaptive_avg_pool{rank}d" for rank in (1, 2, 3)),
    *(f"_adaptive_avg_pool{rank}d" for rank in (2, 3)),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
    *("upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
]

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MAXIMA, max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), average_pool),
    **dict.fromkeys(_RESAMPLED, resampled),
}
