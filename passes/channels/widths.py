"""Keeps some channels that could go: to a width that hardware computes no slower, and so that N:M groups stay whole."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.merge import Layer
from sparsefx.passes.channels.solve import Solution
from sparsefx.patterns import NOfM, Padded, Transposable
from sparsefx.sparse_parameter import records_of


def round_widths(solution: Solution, layers: list[Layer], multiple: int) -> None:
    """Keep as many dead outputs of each layer as the next multiple has room for, where the layer has that many.

    Channels that nothing relies on come first: they cost nothing but their own computation. Grouped convolutions
    keep the widths that their neighbours give them.
    """
    if multiple <= 1:
        return
    relied = _relied_on(solution, layers)
    while True:
        rounded = [_round(solution, layer.out, multiple, relied) for layer in layers if layer.read.groups == 1]
        if not any(rounded):
            return
        # What stays now may be read, so that others stay too.
        solution.settle()


def _relied_on(solution: Solution, layers: list[Layer]) -> Integers:
    """Classes that are constants to someone: to keep one of these means to compute it as before."""
    relied = np.zeros(len(solution.roots), dtype=np.int64)
    for layer in layers:
        relied[layer.into[~np.isnan(layer.constant)]] = 1
    return relied


def _round(solution: Solution, classes: Integers, multiple: int, relied: Integers) -> bool:
    stays = solution.stays[classes]
    count = int(stays.sum())
    target = -(-count // multiple) * multiple
    if target > len(classes) or target == count:
        return False
    changed = False
    absent = np.flatnonzero(~stays)
    order = absent[np.argsort(relied[classes[absent]], kind="stable")]
    for index in order:
        size = int((classes == classes[index]).sum())
        if solution.stays[classes[index]] or count + size > target:
            continue
        changed |= solution.keep(classes[index : index + 1])
        count += size
    return changed


def pattern_of(model: nn.Module, layer: Layer) -> tuple[int, int, bool] | None:
    """``(N, M, both axes)`` of the N:M pattern that this weight has: by its record, or 2:4 by what it holds."""
    path, _, local_name = layer.read.weight.name.rpartition(".")
    record = records_of(model.get_submodule(path)).get(local_name)
    if record is not None:
        pattern = record.pattern
        if isinstance(pattern, (NOfM, Padded, Transposable)):
            return pattern.n, pattern.m, isinstance(pattern, Transposable)
        return None
    used = layer.used
    weight = layer.read.weight.tensor
    # Sparse Tensor Cores take weights from 16 channels on.
    if (
        used.shape[1] % 16
        or int(torch.count_nonzero(weight)) > weight.numel() // 2
        or not holds(weight, layer.read.in_axis, 2, 4)
    ):
        return None
    # Groups of which two columns are empty anyway are no pattern: it has to leave more than two columns in use.
    columns = used.any(axis=0).reshape(-1, 4).sum(axis=1)
    return (2, 4, False) if (columns > 2).any() else None


def holds(weight: Tensor, axis: int, n: int, m: int) -> bool:
    """Whether every aligned group of ``m`` along ``axis`` has at most ``n`` weights other than zero."""
    if weight.shape[axis] % m:
        return False
    groups = (weight != 0).unflatten(axis, (-1, m)).sum(axis + 1)
    return bool((groups <= n).all())


def keep_groups(solution: Solution, classes: Integers, m: int) -> bool:
    """Of every aligned run of ``m`` channels (the last may be shorter) all stay where one does; True where that is news."""
    runs = np.split(classes, range(m, len(classes), m))
    return solution.keep(np.concatenate([run for run in runs if solution.stays[run].any()] or [classes[:0]]))
