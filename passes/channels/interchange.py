"""Which channels may change places: those that stand in the same axes, groups, heads and rows, none of them at a fixed place.

Channels that can be removed need not be interchangeable. What this finds is where they stand; that the outputs stay as they are
is for a run to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsefx.passes.channels.facts import Facts
from sparsefx.passes.channels.labels import PINNED, Integers, Labels

Position = tuple[str, int, int, int]
"""Kind of place, its number, the row in it, and how often the channel stands there."""


@dataclass(frozen=True)
class Interchange:
    """Channels by where they stand.

    Attributes:
        roots: class of each label; channels that have to change places alike are one class.
        groups: sets of classes that may change places among themselves, each rising; shape [n] each.
    """

    roots: Integers
    groups: tuple[Integers, ...]


def find_interchange(facts: Facts, labels: Labels) -> Interchange:
    """The sets of interchangeable channels of a model.

    Args:
        facts: of an interpretation.
        labels: its labels; they are not changed.
    """
    joined = labels.copy()
    for grid in facts.grids:
        if grid.line is not None:
            # What is broadcast along the other axes meets every row in the same order.
            joined.union(grid.cells, grid.line)
    roots = joined.roots()
    fixed = np.zeros(len(roots), dtype=bool)
    fixed[PINNED] = True
    for pin in facts.pins:
        if pin.ordered:
            fixed[roots[pin.labels]] = True
    for labels_of in facts.elements.values():
        cells = roots[labels_of]
        if len(varying(cells)) > 1:
            fixed[cells] = True
    places: dict[int, list[Position]] = {}
    for kind, number, row, classes in _places(facts, roots):
        found, counts = np.unique(classes, return_counts=True)
        for one, count in zip(found.tolist(), counts.tolist(), strict=True):
            places.setdefault(one, []).append((kind, number, row, count))
    by_place: dict[tuple[Position, ...], list[int]] = {}
    for one in sorted(places):
        if not fixed[one]:
            by_place.setdefault(tuple(places[one]), []).append(one)
    # Up to four are one group of four, whose order changes nothing.
    return Interchange(roots, tuple(np.array(group, dtype=np.int64) for group in by_place.values() if len(group) > 4))


def varying(cells: Integers) -> tuple[int, ...]:
    """Axes along which classes differ."""
    return tuple(axis for axis in range(cells.ndim) if (cells != cells.take([0], axis=axis)).any())


def _places(facts: Facts, roots: Integers) -> Iterator[tuple[str, int, int, Integers]]:
    for number, ((name, axis), labels) in enumerate(facts.axes.items()):
        if name not in facts.elements and not (name in facts.gathered and axis == 1):
            yield "axis", number, 0, roots[labels]
    for number, labels in enumerate(facts.elements.values()):
        yield "elements", number, 0, roots[labels].ravel()
    for number, (_, columns) in enumerate(facts.gathered.values()):
        yield from (("group", number, row, classes) for row, classes in enumerate(roots[columns]))
    for number, blocks in enumerate(facts.blocks):
        yield from (("block", number, row, classes) for row, classes in enumerate(roots[blocks.rows]))
    seen: set[bytes] = set()
    for number, grid in enumerate(facts.grids):
        cells = roots[grid.cells]
        axes = varying(cells)
        if len(axes) < 2 or cells.tobytes() in seen:
            continue
        seen.add(cells.tobytes())
        # Heads, and other parts that a reshape made: places change within a row along the last axis.
        rows = np.moveaxis(cells, axes[-1], -1).reshape(-1, cells.shape[axes[-1]])
        yield from (("row", number, row, classes) for row, classes in enumerate(rows))
