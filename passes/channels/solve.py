"""Decides which channels stay: those whose values are needed, and those that the shape of what is left needs.

A class of channels is *needed* where it is pinned, or where a needed output reads it through a weight other than zero and it is
no constant that could be folded away. What is needed is computed exactly as before. A class that stays without being needed is a
*filler*: nobody relies on its value. Both sets only grow, so that the result is the largest removal that these facts allow.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from sparsefx.passes.channels.facts import Facts, Grid
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.merge import Layer

Mask = NDArray[np.bool_]


class Solution:
    """Which classes are needed and which stay, as masks over labels (only roots count)."""

    def __init__(self, facts: Facts, layers: list[Layer], roots: Integers) -> None:
        self.roots = roots
        self.needed: Mask = np.zeros(len(roots), dtype=bool)
        self.stays: Mask = np.zeros(len(roots), dtype=bool)
        self._layers = list(reversed(layers))
        self._rows_seen = [-1] * len(layers)
        self._reading: list[Mask] = [np.zeros(0, dtype=bool)] * len(layers)
        self._grids = [
            (roots[grid.cells], None if grid.line is None else roots[grid.line])
            for grid in reversed(_different(facts.grids, roots))
        ]
        self._blocks = [
            (roots[blocks.rows], None if blocks.partner is None else roots[blocks.partner]) for blocks in reversed(facts.blocks)
        ]
        self._axes = [roots[labels] for labels in facts.axes.values()]
        self._axes += [layer.into.reshape(layer.read.groups, -1).ravel() for layer in layers]
        self.need(np.zeros(1, dtype=np.int64))
        for pin in facts.pins:
            self.need(roots[pin.labels])

    def need(self, classes: Integers) -> bool:
        """Mark classes as needed; True where that is news."""
        if self.needed[classes].all():
            return False
        self.needed[classes] = True
        self.stays[classes] = True
        return True

    def keep(self, classes: Integers) -> bool:
        """Mark classes as staying; True where that is news."""
        if self.stays[classes].all():
            return False
        self.stays[classes] = True
        return True

    def settle(self) -> None:
        """Draw all conclusions."""
        while True:
            changed = self._read_all()
            if not changed:
                changed = self._shape_all()
            if not changed:
                return

    def _read_all(self) -> bool:
        changed = False
        for number, layer in enumerate(self._layers):
            rows = self.needed[layer.out]
            count = int(rows.sum())
            if not count:
                continue
            if count != self._rows_seen[number]:
                self._rows_seen[number] = count
                self._reading[number] = reading(layer, rows)
            wanted = self._reading[number] & (np.isnan(layer.constant) | self.stays[layer.into])
            changed |= self.need(layer.into[wanted])
        return changed

    def _shape_all(self) -> bool:
        changed = False
        for cells, line in self._grids:
            changed |= self._grid(cells, line)
        for rows, partner in self._blocks:
            changed |= self._block(rows, partner)
        for classes in self._axes:
            if len(classes) and not self.stays[classes].any():
                changed |= self.keep(classes[:1])
        return changed

    def _grid(self, cells: Integers, line: Integers | None) -> bool:
        stays, changed = self.stays[cells], False
        if line is not None:
            repeated = tuple(axis for axis in range(cells.ndim) if line.shape[axis] == 1 and cells.shape[axis] > 1)
            changed = self.need(line[self.needed[cells].any(axis=repeated, keepdims=True)])
            changed |= self.keep(line[stays.any(axis=repeated, keepdims=True)])
        kept = np.ones_like(stays)
        for axis in range(cells.ndim):
            others = tuple(other for other in range(cells.ndim) if other != axis)
            along = stays.any(axis=others, keepdims=True)
            if line is not None and line.shape[axis] == cells.shape[axis] and cells.shape[axis] > 1:
                along = along | self.stays[line].any(axis=others, keepdims=True)
            kept &= along
        return self.keep(cells[kept]) or changed

    def _block(self, rows: Integers, partner: Integers | None) -> bool:
        stays = self.stays[rows]
        counts = stays.sum(axis=1)
        wanted = np.full(len(rows), counts.max())
        if partner is not None:
            beside = self.stays[partner].any(axis=1)
            wanted = np.where((counts > 0) | beside, max(1, counts.max()), 0)
        changed = False
        for row in np.flatnonzero(counts < wanted):
            missing = int(wanted[row] - counts[row])
            changed |= self.keep(rows[row][np.flatnonzero(~self.stays[rows[row]])[:missing]])
        return changed


def reading(layer: Layer, rows: Mask) -> Mask:
    """Which inputs these outputs have a weight other than zero for; shape [groups * C]."""
    groups = layer.read.groups
    if groups == 1:
        chosen = layer.used if rows.all() else layer.used[rows]
        return np.asarray(chosen.any(axis=0))
    used = layer.used & rows[:, None]
    by_group: Mask = used.reshape(groups, -1, used.shape[1]).any(axis=1).ravel()
    return by_group


def _different(grids: Iterable[Grid], roots: Integers) -> list[Grid]:
    """Each grid once: deep networks ask for the same one at every residual."""
    seen: set[tuple[bytes, tuple[int, ...], bytes]] = set()
    found = []
    for grid in grids:
        line = b"" if grid.line is None else roots[grid.line].tobytes()
        key = (roots[grid.cells].tobytes(), grid.cells.shape, line)
        if key not in seen:
            seen.add(key)
            found.append(grid)
    return found
