"""Numbers of filters that end at the steps in which hardware gets faster, for training that empties whole filters.

A convolution with 100 filters takes as long as one with 112. Where every layer loses the same share of its filters, most
layers end between two steps, and what was emptied below the upper one pays nothing. Here layers end at steps: of two layers,
filters are emptied first where fewest are missing to the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsefx.errors import OptionError


def step_densities(density: float, filters: Sequence[int], weights: Sequence[int], step: int) -> list[float]:
    """The share of filters that participate in each layer: a multiple of ``step``, or all.

    Args:
        density: the largest share of all weights that may participate.
        filters: filters of each layer.
        weights: weights of one filter of each layer.
        step: multiple that widths pay at, such as 16.

    Returns:
        One density a layer. Together they come as near below ``density`` as whole steps allow.

    Raises:
        OptionError: one step of each layer is more than ``density``; nothing gets faster below a step.
    """
    # A product of floats may fall below the whole number that was meant.
    budget = density * sum(count * size for count, size in zip(filters, weights, strict=True)) * (1 + 1e-12)
    least = [min(step, count) for count in filters]
    smallest = sum(count * size for count, size in zip(least, weights, strict=True))
    if smallest > budget:
        needed = smallest / sum(count * size for count, size in zip(filters, weights, strict=True))
        raise OptionError(
            f"densities='steps' was given with density {density:g}, but one step of {step} filters in each layer is "
            f"{needed:.3f} of all weights, and nothing gets faster below a step; choose a density of at least that, or "
            "densities='uniform'"
        )
    uniform = [density * count for count in filters]
    left = list(filters)
    total = sum(count * size for count, size in zip(left, weights, strict=True))
    emptied: list[tuple[int, int]] = []
    while total > budget:
        layer = min(
            (number for number, count in enumerate(left) if count > least[number]),
            key=lambda number: (uniform[number] - _below(left[number], step), number),
        )
        emptied.append((layer, left[layer]))
        total -= (left[layer] - _below(left[layer], step)) * weights[layer]
        left[layer] = _below(left[layer], step)
    # The last step may have freed more than was asked for; steps that fit into the rest come back, the last that went first.
    for layer, before in reversed(emptied):
        cost = (before - left[layer]) * weights[layer]
        if before - left[layer] <= step and total + cost <= budget:
            left[layer] = before
            total += cost
    return [count / whole for count, whole in zip(left, filters, strict=True)]


def _below(count: int, step: int) -> int:
    """The largest multiple of the step that is smaller."""
    return (count - 1) // step * step
