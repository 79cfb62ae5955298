"""Why channels stay that a user would expect to go."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsefx.passes.channels.carriers import carrier, input_groups, lost_constants
from sparsefx.passes.channels.facts import Facts
from sparsefx.passes.channels.labels import Integers
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
        self._pinned: dict[int, str] = {}
        for pin in facts.pins:
            for label in np.unique(solution.roots[pin.labels]).tolist():
                if label and label not in self._pinned:
                    self._pinned[label] = f"{pin.reason} ({pin.where})" if pin.where else pin.reason
        self._reader = _readers(layers, solution)
        self._carriers = set(_carriers(layers, solution))
        self._names = [layer.read.where or layer.read.weight.name for layer in layers]

    def pinned(self, classes: Integers) -> str:
        """Why some of these classes have to stay whoever reads them: the first reason that was met for each."""
        return "; ".join(sorted({self._pinned[label] for label in classes.tolist() if label in self._pinned}))

    def coupled(self, classes: Integers) -> str:
        """Why some of these classes stay though nothing pins them."""
        staying = [label for label in np.unique(classes[self._solution.stays[classes]]).tolist() if label not in self._pinned]
        return "; ".join(sorted({self._coupled(label) for label in staying if label}))

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
