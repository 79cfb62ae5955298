"""Classes of channels that can only be removed together: a union-find over integers, by whole arrays at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
PINNED = 0
"""The label of everything that cannot be removed."""


class Labels:
    """Integer labels, some of which are known to stand for channels that are removed together.

    Label 0 is `PINNED`. Operations take arrays: their number grows with the nodes of a graph, not with its channels.
    """

    def __init__(self) -> None:
        self._parent: Integers = np.zeros(1024, dtype=np.int64)
        self.count = 1

    def copy(self) -> Labels:
        """The same classes, of which more can be made one without a change here."""
        made = Labels()
        made._parent, made.count = self._parent.copy(), self.count
        return made

    def fresh(self, number: int) -> Integers:
        """New labels, each of a class of its own; shape [number]."""
        first = self.count
        self.count += number
        if self.count > len(self._parent):
            grown = np.arange(max(self.count, 2 * len(self._parent)), dtype=np.int64)
            grown[:first] = self._parent[:first]
            self._parent = grown
        made = np.arange(first, self.count, dtype=np.int64)
        self._parent[first : self.count] = made
        return made

    def find(self, labels: Integers) -> Integers:
        """The smallest label of each label's class, in the same shape."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def union(self, first: Integers, second: Integers) -> None:
        """Make one class of each pair; the two arrays are broadcast against each other."""
        if first is second:
            return
        first, second = np.broadcast_arrays(first, second)
        first, second = first.ravel(), second.ravel()
        while True:
            first, second = self.find(first), self.find(second)
            different = first != second
            if not different.any():
                return
            first, second = first[different], second[different]
            # Of several pairs with one larger root only one is written: the others are still different in the next round.
            self._parent[np.maximum(first, second)] = np.minimum(first, second)

    def roots(self) -> Integers:
        """The root of every label; shape [count]."""
        return self.find(np.arange(self.count, dtype=np.int64))
