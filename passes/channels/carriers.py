"""Constants that cannot become a bias, because padding would not be padded with them, ride on one channel that stays.

Of all constant channels that a padded convolution loses, ``sum_k c_k w_k`` is added to the weights of one constant channel
that is kept, divided by that channel's constant: exact at the border too, whatever stride, padding and dilation are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.merge import Layer
from sparsefx.passes.channels.solve import Solution, reading
from sparsefx.passes.channels.value import Floats

Mask = NDArray[np.bool_]
_WEAKEST = 0.1
"""Smallest constant of a carrier, relative to the largest that it carries."""


def lost_constants(solution: Solution, layer: Layer) -> Mask:
    """Which inputs go although needed outputs read them: constants other than zero; shape [groups * C]."""
    rows = solution.needed[layer.out]
    lost: Mask = reading(layer, rows) & ~solution.stays[layer.into] & (layer.constant != 0) & ~np.isnan(layer.constant)
    return lost


def carrier(solution: Solution, layer: Layer, group: slice) -> int | None:
    """The constant channel of a group of inputs that stays, with the largest constant; None where there is none."""
    constant = np.nan_to_num(layer.constant[group])
    usable = solution.needed[layer.into[group]] & (constant != 0)
    if not usable.any():
        return None
    largest = int(np.argmax(np.where(usable, np.abs(constant), 0)))
    return int(group.start) + largest


def input_groups(layer: Layer) -> list[slice]:
    """The inputs of each group of a convolution."""
    size = len(layer.into) // layer.read.groups
    return [slice(group * size, (group + 1) * size) for group in range(layer.read.groups)]


def choose_carriers(solution: Solution, layers: list[Layer]) -> None:
    """Keep a constant channel wherever constants need one and none stays yet: one that serves as many layers as it can.

    Layers along a residual stream read the same channels, but the constant of a channel changes from block to block and may
    become zero; a channel that has a constant for all of them serves them all.
    """
    while True:
        pending = list(_without_carrier(solution, layers))
        if not pending:
            return
        serves = np.zeros(len(solution.roots), dtype=np.int64)
        for _, _, classes, strength in pending:
            serves[np.unique(classes[strength >= _WEAKEST])] += 1
        for layer, group, classes, strength in pending:
            if carrier(solution, layer, group) is None:
                # The division by a carrier's constant must not amplify what it carries.
                usable = np.where(strength >= _WEAKEST, serves[classes] + strength / 2, 0)
                best = int(np.argmax(usable))
                solution.need(classes[best : best + 1])
        solution.settle()


def _without_carrier(solution: Solution, layers: list[Layer]) -> Iterator[tuple[Layer, slice, Integers, Floats]]:
    """Groups of inputs that lose constants and have no carrier: their classes, and constants relative to the largest lost."""
    for layer in layers:
        if layer.read.uniform:
            continue
        lost = lost_constants(solution, layer)
        if not lost.any():
            continue
        for group in input_groups(layer):
            if lost[group].any() and carrier(solution, layer, group) is None:
                size = np.where(lost[group], np.abs(np.nan_to_num(layer.constant[group])), 0)
                yield layer, group, layer.into[group], size / size.max()
