"""Constants that cannot become a bias, because padding would not be padded with them, ride on one channel that stays.

Of all constant channels that a padded convolution loses, ``sum_k c_k w_k`` is added to the weights of one constant channel
that is kept, divided by that channel's constant: exact at the border too, whatever stride, padding and dilation are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsefx.passes.channels.merge import Layer
from sparsefx.passes.channels.solve import Solution, reading

Mask = NDArray[np.bool_]


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
    """Keep one constant channel wherever constants need one and none stays yet: the one with the largest constant."""
    changed = True
    while changed:
        changed = False
        for layer in layers:
            if layer.read.uniform:
                continue
            lost = lost_constants(solution, layer)
            if not lost.any():
                continue
            for group in input_groups(layer):
                if lost[group].any() and carrier(solution, layer, group) is None:
                    largest = int(np.argmax(np.where(lost[group], np.abs(np.nan_to_num(layer.constant[group])), 0)))
                    changed |= solution.need(layer.into[group][largest : largest + 1])
        if changed:
            solution.settle()
