"""Why channels stay that a user would expect to go."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsefx.passes.channels.carriers import carrier, input_groups, lost_constants
from sparsefx.passes.channels.facts import Facts
from sparsefx.passes.channels.labels import PINNED, Integers
from sparsefx.passes.channels.merge import Layer
from sparsefx.passes.channels.solve import Solution, reading


class Reasons:
    """Reasons by class of channels.

    Args:
        facts, layers: what was found out about the model.
        solution: which channels stay.
        unrounded: which would stay without rounding widths up.
    """

    def __init__(self, facts: Facts, layers: list[Layer], solution: Solution, unrounded: Solution) -> None:
        self._solution = solution
        self._unrounded = unrounded
        self._pins = facts.pins
        # Of each class the first pin that was met; -1 where there is none.
        self._pinned = np.full(len(solution.roots), -1, dtype=np.int64)
        for number in range(len(facts.pins) - 1, -1, -1):
            self._pinned[solution.roots[facts.pins[number].labels]] = number
        self._pinned[PINNED] = -1
        self._reader = _readers(layers, solution)
        self._carriers = set(_carriers(layers, solution))
        self._names = [layer.read.where or layer.read.weight.name for layer in layers]

    def pinned(self, classes: Integers) -> str:
        """Why some of these classes have to stay whoever reads them: the first reason that was met for each."""
        met = [self._pins[number] for number in np.unique(self._pinned[classes]).tolist() if number >= 0]
        return "; ".join(sorted({f"{pin.reason} ({pin.where})" if pin.where else pin.reason for pin in met}))

    def coupled(self, classes: Integers) -> str:
        """Why some of these classes stay though nothing pins them."""
        staying = np.unique(classes[self._solution.stays[classes] & (self._pinned[classes] < 0)]).tolist()
        return "; ".join(sorted({self._coupled(label) for label in staying if label != PINNED}))

    def _coupled(self, label: int) -> str:
        if not self._unrounded.stays[label]:
            return "they fill up the width"
        if label in self._carriers:
            return "one constant channel stays, to carry those that go over padding"
        reader = int(self._reader[label])
        if reader < 0:
            return "heads, groups, halves or what is broadcast over them keep their sizes"
        return f"they go with channels that {self._names[reader]} reads, where they are not constant"


def _readers(layers: list[Layer], solution: Solution) -> Integers:
    """The first layer that needs each class as it is, by number; -1 where none does."""
    found = np.full(len(solution.roots), -1, dtype=np.int64)
    for number in range(len(layers) - 1, -1, -1):
        layer = layers[number]
        rows = solution.needed[layer.out]
        if rows.any():
            found[layer.into[reading(layer, rows) & np.isnan(layer.constant)]] = number
    return found


def _carriers(layers: list[Layer], solution: Solution) -> Iterator[int]:
    for layer in layers:
        if layer.read.uniform or not (lost := lost_constants(solution, layer)).any():
            continue
        for group in input_groups(layer):
            if lost[group].any() and (through := carrier(solution, layer, group)) is not None:
                yield int(layer.into[through])


__all__ = ["Reasons"]
