"""Inputs of other sizes than the example's: another batch, another length, another image; and other numbers.

A graph is captured for one size of everything, and what depends on sizes looks constant in it: a sum over places, a position that
is looked up, a division by the square root of a length. So does what depends on arguments that are numbers and no tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

MOST = 4
"""Different sizes (of lengths, images and whatever else) that are tried, and different numbers."""

_LARGE = 128
"""From this size on a quarter is tried first, which tells as much as half of it does and takes a fourth of the time in images."""
_SMALL = 2**16
"""Elements of inputs that take little time."""


def other_sizes(inputs: Any) -> Iterator[list[Any]]:
    """Ways to change the sizes of inputs, each a list of candidates: the first of them that a model takes is enough.

    Axes of one size change together, since they are likely one thing: the sides of an image, a sequence and its mask.
    """
    tensors = _tensors(inputs)
    sizes = dict.fromkeys(size for tensor in tensors for size in tensor.shape[1:] if size > 0)
    # The longest first: channels tend to be fewer than places.
    for size in sorted(sizes, reverse=True)[:MOST]:
        found = sorted({axis for tensor in tensors for axis in range(1, tensor.dim()) if tensor.shape[axis] == size})
        # A length may be as large as a number of channels by chance.
        together = [found, *([axis] for axis in found if len(found) > 1)]
        smaller = (size // 4 + 1, size // 2 + 1) if size >= _LARGE else (size // 2 + 1,)
        # Code may ask on which side of a number a length is; where that costs little, both are tried.
        sides = ((*smaller, size // 2), (2 * size,)) if _is_small(tensors, found, size) else ((*smaller, size // 2, 2 * size),)
        for side in sides:
            wanted = [one for one in dict.fromkeys(side) if one not in (0, size)]
            if wanted:
                yield [_resized(inputs, _of(axes, size), one) for axes in together for one in wanted]


def _is_small(tensors: Sequence[Tensor], axes: Sequence[int], size: int) -> bool:
    """Whether inputs are small enough to be tried in twice this size too."""
    longer = (sum(tensor.shape[axis] == size for axis in axes if axis < tensor.dim()) for tensor in tensors)
    return size < _LARGE and sum(tensor.numel() * 2**number for tensor, number in zip(tensors, longer, strict=True)) <= _SMALL


def other_batch(inputs: Any) -> list[Any]:
    """The inputs with another batch: the first axis of every tensor that has the first tensor's size there."""
    tensors = _tensors(inputs)
    if not tensors:
        return []
    batch = tensors[0].shape[0]
    return [_resized(inputs, lambda axis, size: axis == 0 and size == batch, batch // 2 if batch >= 4 else batch + 1)]


def other_numbers(model: nn.Module, inputs: Any) -> Iterator[list[Any]]:
    """Ways to change numbers and truth values among inputs, each a list of candidates like those of `other_sizes`.

    Arguments that forward has a number for count as given.
    """
    args, kwargs = inputs
    leaves, structure = tree_flatten((args, {**_defaults(model, args, kwargs), **kwargs}))
    found = [place for place, leaf in enumerate(leaves) if type(leaf) in (bool, int, float)]
    for place in found[:MOST]:
        for others in _others(leaves[place]):
            yield [tree_unflatten([*leaves[:place], one, *leaves[place + 1 :]], structure) for one in others]


def _defaults(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a forward that has none, or hides it
        return {}
    missing = [one for name, one in signature.parameters.items() if name not in given and one.kind != one.POSITIONAL_ONLY]
    return {one.name: one.default for one in missing if type(one.default) in (bool, int, float)}


def _others(number: bool | int | float) -> Iterator[list[bool | int | float]]:
    if isinstance(number, bool):
        yield [not number]
        return
    yield [number + 1, number - 1, 2 * number, number // 2] if isinstance(number, int) else [number / 2 or 0.5, number + 1]
    if number:
        # What a branch is likely to ask for.
        yield [type(number)(0)]


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]


def _of(axes: Sequence[int], size: int) -> Callable[[int, int], bool]:
    return lambda axis, old: axis in axes and old == size


def _resized(inputs: Any, chosen: Callable[[int, int], bool], size: int) -> Any:
    """The inputs with these axes cut to ``size``, or continued with their beginning."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis, old in enumerate(leaf.shape):
            if chosen(axis, old) and old:
                leaf = leaf.index_select(axis, torch.arange(size, device=leaf.device) % old)
        return leaf

    return tree_map(resized, inputs)


__all__ = ["MOST", "other_batch", "other_numbers", "other_sizes"]
