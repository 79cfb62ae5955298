"""What drop, growth and redistribution go by: small functions of one layer, to be combined freely."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.algorithms.layer import Layer
from sparsefx.ops.select import picked
from sparsefx.patterns.selection import summation_dtype
from sparsefx.shards import totals


def magnitude(layer: Layer) -> Tensor:
    """``|w|``."""
    return layer.weight.abs()


def magnitude_by_sign(layer: Layer) -> Tensor:
    """How large a weight is among those of its own sign: rank over number, so that as large a share of each sign is dropped.

    The rule of SET: the smallest positive and the largest negative weights go (Mocanu et al. 2018).
    """
    ranks = torch.zeros_like(layer.weight, dtype=torch.float32)
    for sign in (1, -1):
        chosen = (layer.weight * sign > 0) & layer.mask
        values = layer.weight[chosen].abs()
        order = values.argsort(stable=True, descending=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), 0, -1, device=order.device)
        ranks[chosen] = place.to(torch.float32) / max(1, len(order))
    return ranks


def gradient(layer: Layer) -> Tensor:
    """``|dense gradient|``."""
    return layer.gradient.abs()


def momentum(layer: Layer) -> Tensor:
    """``|momentum|``, in the units of the optimizer's steps."""
    return layer.momentum.abs()


def random(layer: Layer) -> Tensor:
    """Uniform, from the run's generator."""
    return layer.random()


def mean_momentum(layer: Layer) -> float:
    """The mean ``|momentum|`` of the weights that participate."""
    return _mean(layer, layer.momentum)


def mean_magnitude(layer: Layer) -> float:
    """The mean ``|w|`` of the weights that participate."""
    return _mean(layer, layer.weight)


def _mean(layer: Layer, values: Tensor) -> float:
    chosen, shards = picked(values, layer.mask, dtype=summation_dtype(values)).abs_(), layer.record.shards
    total, count = totals([float(chosen.sum()), float(chosen.numel())], [shards, shards])
    return total / count if count else float("nan")
