"""Annealing over column orders: the compiled `permutation.c`, or the same moves in numpy where it was not built.

Both give the same order for the same random state; numpy is some hundred times slower.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np

LANES, COOL_EVERY = 16, 1024
_MASK = (1 << 64) - 1

Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Chain:
    """One chain of moves.

    Attributes:
        order: the column at each place now.
        values: what each group of four places keeps now.
        best: the best order so far.
        best_sum: what that keeps; a one-element array.
        state: of the random numbers; a one-element array.
    """

    order: Places
    values: Doubles
    best: Places
    best_sum: Doubles
    state: np.ndarray[Any, np.dtype[np.uint64]]


def columns_of(matrix: np.ndarray[Any, Any]) -> Floats:
    """Magnitudes of a matrix ``[rows, columns]``, a column in each row of the result, padded with zeros to whole lanes."""
    rows, count = matrix.shape
    columns = np.zeros((count, -(-rows // LANES) * LANES), np.float32)
    columns[:, :rows] = np.abs(matrix).T
    return columns


def start(columns: Floats, seed: int) -> Chain:
    """A chain that stands at the columns' own order."""
    order = np.arange(len(columns), dtype=np.int64)
    values = np.array([_kept(columns, order[place : place + 4]) for place in range(0, len(order), 4)])
    return Chain(order, values, order.copy(), np.array([values.sum()]), np.array([seed & _MASK], np.uint64))


def anneal(columns: Floats, chain: Chain, moves: int, hot: float, cold: float, *, compiled: bool = True) -> None:
    """Make ``moves`` moves, in place: each swaps two columns, and is taken back with probability 1 - exp(gain / temperature)
    where it loses. The temperature falls from ``hot`` to ``cold`` geometrically.
    """
    library = _library() if compiled else None
    if library is None:
        _anneal(columns, chain, moves, hot, cold)
        return
    pointers = [
        array.ctypes.data_as(ctypes.c_void_p) for array in (chain.order, chain.values, chain.best, chain.best_sum, chain.state)
    ]
    library.sparsefx_anneal(columns.ctypes.data_as(ctypes.c_void_p), columns.shape[1], len(columns), *pointers, moves, hot, cold)


def available() -> bool:
    """Whether the compiled library was built for this platform and loads."""
    return _library() is not None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_permutation" + suffix)
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            library.sparsefx_lanes.restype = ctypes.c_int64
            if library.sparsefx_lanes() != LANES:
                continue
            pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
            library.sparsefx_anneal.argtypes = [pointer, whole, whole, *([pointer] * 5), whole, real, real]
            library.sparsefx_anneal.restype = None
        except (OSError, AttributeError):
            continue
        return library
    return None


def _kept(columns: Floats, four: Places) -> float:
    """What 2:4 keeps of four columns, summed in the same order as in C."""
    largest = np.sort(columns[four], axis=0)[2:]
    lanes = (largest[1] + largest[0]).reshape(-1, LANES)
    total = np.zeros(LANES, np.float32)
    for row in lanes:
        total += row
    return float(sum(map(float, total)))


def _draw(state: int) -> tuple[int, int]:
    """The next state and the bits it gives (splitmix64)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    bits = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return state, bits ^ (bits >> 31)


def _anneal(columns: Floats, chain: Chain, moves: int, hot: float, cold: float) -> None:
    count, order, values = len(columns), chain.order, chain.values
    state, total, temperature = int(chain.state[0]), 0.0, hot
    for value in values:
        total += float(value)
    factor = math.pow(cold / hot, COOL_EVERY / moves) if moves > COOL_EVERY else 1.0
    for move in range(moves):
        if move and move % COOL_EVERY == 0:
            temperature *= factor
        state, bits = _draw(state)
        p, q = ((bits >> 32) * count) >> 32, ((bits & 0xFFFFFFFF) * count) >> 32
        state, bits = _draw(state)
        g, h = p // 4, q // 4
        if g == h:
            continue
        order[p], order[q] = order[q], order[p]
        first, second = _kept(columns, order[4 * g : 4 * g + 4]), _kept(columns, order[4 * h : 4 * h + 4])
        gain = first + second - float(values[g]) - float(values[h])
        if gain < 0 and (bits >> 11) * 2.0**-53 >= math.exp(gain / temperature):
            order[p], order[q] = order[q], order[p]
            continue
        values[g], values[h] = first, second
        total += gain
        if total > chain.best_sum[0] + 1e-9 * abs(float(chain.best_sum[0])):
            chain.best_sum[0] = total
            chain.best[:] = order
    chain.state[0] = state
