"""Search for an order of a weight's input channels in which 2:4 keeps more magnitude.

The permutation search of Pool and Yu, "Channel permutations for N:M sparsity" (NeurIPS 2021), as simulated annealing with swaps
of two columns, of which each costs two groups of four. Found orders are for the reduction axis of one weight; applying one to a
network means that whatever produces these channels is permuted alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from sparsefx.errors import NonFiniteError, OptionError, PatternError
from sparsefx.ops.permutation import COOL_EVERY, Chain, Floats, anneal, columns_of, start

# Moves of one chain, for each column: 64 columns of 128 rows then take about two seconds.
_MOVES_PER_COLUMN = 250_000
# First and last temperature, as shares of the spread of random swaps' gains. On a uniform 128 x 64 matrix, orders freeze in
# this range: slower cooling within it helps, and time above or below it is lost.
_HOT, _COLD = 0.16, 0.07
_SLICE = 0.1  # seconds between two looks at the clock


def kept_magnitude(weight: Tensor, permutation: Tensor | None = None, *, reduction_axis: int = 1) -> float:
    """The sum of |weight| that 2:4 along ``reduction_axis`` keeps, with the channels there in the order ``permutation``."""
    matrix = _matrix(weight, reduction_axis)
    return _kept(matrix, np.arange(matrix.shape[1]) if permutation is None else permutation.numpy())


def search_permutation(
    weight: Tensor,
    *,
    reduction_axis: int = 1,
    seconds: float = 10.0,
    moves: int | None = None,
    generator: torch.Generator | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """An order of the channels along ``reduction_axis`` in which 2:4 keeps more of ``weight``'s magnitude.

    Chains of moves run on all threads until time is up, each cooled to its end; the best order of all is given back. It keeps
    at least as much as the order that the channels have. A terminal shows the progress.

    Args:
        weight: of two axes or more; for a convolution ``[K, C, R, S]``, C channels are ordered and all K, R, S are rows.
        reduction_axis: the axis whose channels are ordered; its size is a multiple of four.
        seconds: how long to search. The result then depends on the speed of the machine.
        moves: search this many moves instead, however long it takes: the same seed then gives the same order.
        generator: on the CPU, seeds the search; None means a fresh one with a fixed seed.
        threads: how many chains run at a time; None means `torch.get_num_threads`. It does not change the result of ``moves``.
        progress: called with the share that is done, in place of the bar that a terminal shows.

    Returns:
        int64 of the size of that axis: ``weight.index_select(reduction_axis, result)`` is the permuted weight.

    Raises:
        PatternError: the axis is no multiple of four.
        OptionError: an axis, ``seconds`` or ``moves`` out of range.
        NonFiniteError: the weight holds NaN or infinity.
    """
    matrix = _matrix(weight, reduction_axis)
    if not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
        raise OptionError(f"seconds={seconds!r} was given; expected a positive number")
    if moves is not None and (not isinstance(moves, int) or isinstance(moves, bool) or moves < 1):
        raise OptionError(f"moves={moves!r} was given; expected a whole number of at least 1, or None")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**62, (), generator=generator))
    count = matrix.shape[1]
    identity = np.arange(count)
    spread = _spread(matrix, np.random.default_rng(seed))
    if count <= 4 or spread == 0:
        return torch.from_numpy(identity)
    columns = columns_of(matrix)
    workers = max(1, torch.get_num_threads() if threads is None else threads)
    length = _MOVES_PER_COLUMN * count
    with _bar() if progress is None else nullcontext(progress) as show:
        if moves is None:
            found = _until(columns, seed, length, time.monotonic() + seconds, seconds, spread, workers, show)
        else:
            found = _counted(columns, seed, length, moves, spread, workers, show)
    best = max([identity, *found], key=lambda order: _kept(matrix, order))
    return torch.from_numpy(np.ascontiguousarray(best))


@contextmanager
def _bar() -> Iterator[Callable[[float], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("searching a permutation", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _counted(
    columns: Floats, seed: int, length: int, moves: int, spread: float, workers: int, show: Callable[[float], None]
) -> list[Any]:
    """The best orders of chains that share ``moves`` moves."""
    chains = -(-moves // length)
    done = [0]

    def work(number: int) -> Any:
        chain = start(columns, seed + number)
        anneal(columns, chain, min(length, moves - number * length), _HOT * spread, _COLD * spread)
        done[0] += 1
        show(done[0] / chains)
        return chain.best

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(chains)))


def _until(
    columns: Floats,
    seed: int,
    length: int,
    end: float,
    seconds: float,
    spread: float,
    workers: int,
    show: Callable[[float], None],
) -> list[Any]:
    """The best orders of chains run until the time ``end``; the last of each thread cools faster, to be cold by then."""

    def work(first: int) -> list[Any]:
        found: list[Any] = []
        number = first
        slice_moves = COOL_EVERY
        while (began := time.monotonic()) < end - _SLICE / 2 or not found:
            chain = start(columns, seed + number)
            made, share = 0, 0.0
            while share < 1:
                looked = time.monotonic()
                by_time = (looked - began) / max(end - began, 1e-9)
                by_moves, ahead = made / length, min(1.0, (made + slice_moves) / length)
                share = max(by_time, by_moves)
                if share >= 1:
                    break
                following = max(ahead, min(1.0, by_time + _SLICE / max(end - began, 1e-9)))
                _slice(columns, chain, slice_moves, spread, share, following)
                made += slice_moves
                took = time.monotonic() - looked
                slice_moves = max(COOL_EVERY, int(slice_moves * min(4.0, _SLICE / max(took, 1e-6))) // COOL_EVERY * COOL_EVERY)
                show(1 - (end - time.monotonic()) / seconds)
            found.append(chain.best)
            number += workers
        return found

    with ThreadPoolExecutor(workers) as pool:
        return [order for orders in pool.map(work, range(workers)) for order in orders]


def _slice(columns: Floats, chain: Chain, moves: int, spread: float, share: float, following: float) -> None:
    """Moves of a chain between two shares of its way from hot to cold."""
    ratio = _COLD / _HOT
    anneal(columns, chain, moves, _HOT * spread * ratio**share, _HOT * spread * ratio**following)


def _matrix(weight: Tensor, axis: int) -> np.ndarray[Any, Any]:
    """Magnitudes ``[rows, channels]`` in float64."""
    if not isinstance(weight, Tensor):
        raise OptionError(f"a {type(weight).__name__} was given; expected a weight, a tensor of two axes or more")
    if weight.dim() < 2 or not -weight.dim() <= axis < weight.dim():
        raise OptionError(
            f"a weight of shape {tuple(weight.shape)} and reduction_axis={axis!r} were given; expected one of its axes"
        )
    if weight.shape[axis] % 4 or weight.numel() == 0:
        raise PatternError(
            f"{weight.shape[axis]} channels along axis {axis} were given; 2:4 needs a multiple of four, at least four"
        )
    values = weight.detach().movedim(axis, -1).reshape(-1, weight.shape[axis]).abs().double().cpu()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("the weight holds NaN or infinity; a permutation needs finite weights: load a sound checkpoint")
    return values.numpy()


def _kept(matrix: np.ndarray[Any, Any], order: np.ndarray[Any, Any]) -> float:
    groups = matrix[:, order].reshape(len(matrix), -1, 4)
    return float(np.partition(groups, 2, axis=2)[:, :, 2:].sum())


def _spread(matrix: np.ndarray[Any, Any], generator: np.random.Generator) -> float:
    """The standard deviation of the gains of random swaps, which sets the scale of temperatures."""
    count, gains = matrix.shape[1], []
    if count <= 4:
        return 0.0
    for _ in range(64):
        order = generator.permutation(count)[:8]
        before = _kept(matrix, order)
        order[[0, 4]] = order[[4, 0]]
        gains.append(_kept(matrix, order) - before)
    return float(np.std(gains))
