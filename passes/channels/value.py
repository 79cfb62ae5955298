"""What is known of a tensor while a graph is interpreted: whose channels its elements are, and which of them are constant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsefx.passes.channels.labels import Integers

Floats = NDArray[np.float64]
Numbers = TypeVar("Numbers", Integers, Floats)


@dataclass(frozen=True)
class Value:
    """The abstract value of one tensor.

    Attributes:
        shape: the tensor's shape.
        labels: label of the channel that each element belongs to. Of the tensor's rank; an axis along which labels do not vary
            has size 1, so that batch and image axes cost nothing.
        constant: the value that each element has whatever the inputs are, NaN where it is unknown; like ``labels``.
        uneven: the same up to a factor by place that is one for all channels, as an average over padding makes it; None where
            nothing such is known.
    """

    shape: tuple[int, ...]
    labels: Integers
    constant: Floats
    uneven: Floats | None = None

    @property
    def varying(self) -> frozenset[int]:
        """Axes along which labels vary."""
        return frozenset(axis for axis, size in enumerate(self.labels.shape) if size > 1)

    def with_constant(self, constant: Floats) -> Value:
        """The same labels with another constant."""
        return replace(self, constant=shrunk(constant), uneven=None)

    def forgotten(self) -> Value:
        """The same labels with nothing constant."""
        return replace(self, constant=nothing_known(len(self.shape)), uneven=None)

    def lifted(self, rank: int) -> Value:
        """With axes of size 1 in front, as broadcasting puts them."""
        missing = (1,) * (rank - len(self.shape))
        if not missing:
            return self
        return Value(
            missing + self.shape,
            self.labels.reshape(missing + self.labels.shape),
            self.constant.reshape(missing + self.constant.shape),
        )


@dataclass(frozen=True)
class Weight:
    """A parameter, buffer or constant tensor of the model as it stands, up to the order of its axes.

    Attributes:
        name: full name, the first one where it has several; of a constant that is in no state_dict, the name in the graph.
        tensor: the tensor, in the model's own order of axes.
        order: axis ``i`` of the value is axis ``order[i]`` of the tensor.
        sliceable: whether it is a parameter or buffer of a module.
    """

    name: str
    tensor: Tensor
    order: tuple[int, ...]
    sliceable: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.tensor.shape[axis] for axis in self.order)


def nothing_known(rank: int) -> Floats:
    """The constant of a tensor of which no element is known."""
    return np.full((1,) * rank, np.nan)


def shrunk(constant: Floats) -> Floats:
    """Without its axes where nothing is known; infinities are not known."""
    known = np.isfinite(constant)
    if not known.any():
        return nothing_known(constant.ndim)
    return constant if known.all() else np.where(known, constant, np.nan)


def spread(array: Numbers, shape: tuple[int, ...], axes: frozenset[int]) -> Numbers:
    """``array`` with these axes repeated to their full size."""
    wanted = tuple(shape[axis] if axis in axes else size for axis, size in enumerate(array.shape))
    made: Numbers = np.broadcast_to(array, wanted)
    return made


def along(array: Integers, axis: int, size: int) -> Integers:
    """The vector of an array that varies along one axis at most; shape [size]."""
    vector: Integers = np.moveaxis(array, axis, 0).reshape(array.shape[axis])
    return np.broadcast_to(vector, (size,))


def constants_read(value: Value, axis: int, *, uniform: bool) -> tuple[Floats, bool]:
    """The constants of an axis as a product with a weight sees them, and whether they are the same at every place.

    Where they are not, another constant channel has the same factor at every place, and can carry what is lost.
    """
    if value.uneven is None:
        return constant_along(value, axis), uniform
    return constant_along(replace(value, constant=value.uneven), axis), False


def constant_along(value: Value, axis: int) -> Floats:
    """The constant of each index of an axis, NaN where it is not the same everywhere else; shape [size of the axis]."""
    moved = np.moveaxis(value.constant, axis, 0).reshape(value.constant.shape[axis], -1)
    same = (moved == moved[:, :1]).all(axis=1)
    vector: Floats = np.where(same, moved[:, 0], np.nan)
    return np.broadcast_to(vector, (value.shape[axis],))
