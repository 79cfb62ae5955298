"""One entry for each weight: a weight that is read several times has one set of columns, and constants that agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sparsefx.layers import runs_own_forward
from sparsefx.passes.channel_rules.products import matrix
from sparsefx.passes.channels.facts import Read
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.propagation import Propagation
from sparsefx.passes.channels.value import Floats
from sparsefx.sparse_parameter import records_of

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Fold:
    """Where the constants that a product loses go: what is added to the bias, or taken from a running mean.

    Attributes:
        tensor: full name of the parameter or buffer.
        sign: 1 for a bias, -1 for a mean.
        new: whether the bias has to be added to its module first.
    """

    tensor: str
    sign: int
    new: bool


@dataclass(frozen=True)
class Layer:
    """All reads of one weight as one.

    Attributes:
        read: the first of them, with the constants in which all agree.
        used: which inputs (of its group) each output has a weight other than zero for; shape [K, C].
        out, into: roots of the labels; shapes [K] and [groups * C].
        fold: where constants go; None where only zeros can be dropped.
        carries: whether a constant of a padded input may be moved to the column of another one.
    """

    read: Read
    used: Mask
    out: Integers
    into: Integers
    fold: Fold | None
    carries: bool

    @property
    def constant(self) -> Floats:
        """The constants of the inputs, NaN where they are none that could be done without."""
        return self.read.constant


def merge_reads(model: nn.Module, propagation: Propagation, roots: Integers) -> list[Layer]:
    """Layers in the order of their first call.

    Args:
        model: the model itself.
        propagation: what was found out.
        roots: class of each label.
    """
    by_weight: dict[str, list[Read]] = {}
    for read in propagation.facts.reads:
        by_weight.setdefault(read.weight.name, []).append(read)
    return [_merged(model, propagation, reads, roots) for reads in by_weight.values()]


def _merged(model: nn.Module, propagation: Propagation, reads: list[Read], roots: Integers) -> Layer:
    first = reads[0]
    uniform = all(read.uniform for read in reads)
    constant = first.constant.copy()
    same = all((read.out_axis, read.groups) == (first.out_axis, first.groups) for read in reads)
    for read in reads[1:]:
        constant = np.where(constant == read.constant, constant, np.nan) if same else np.full_like(constant, np.nan)
    fold = _fold(model, propagation, reads)
    carries = not _is_sparse(model, first.weight.name)
    if uniform and fold is None:
        constant = np.where(constant == 0, 0.0, np.nan)
    if not uniform and not carries:
        constant = np.where(constant == 0, 0.0, np.nan)
    used = (matrix(first) != 0).any(dim=2).cpu().numpy()
    merged = Read(
        first.where, first.weight, first.out_axis, first.in_axis, first.groups, first.out, first.into, constant, uniform, first.bias
    )
    return Layer(merged, used, roots[first.out], roots[first.into], fold, carries)


def _fold(model: nn.Module, propagation: Propagation, reads: list[Read]) -> Fold | None:
    first = reads[0]
    if first.bias is not None:
        # A bias that something else reads too cannot take a constant over for this layer alone.
        mine = all(read.bias is not None and read.bias.name == first.bias.name for read in reads)
        alone = propagation.uses.get(first.bias.name, 0) == len(reads)
        return Fold(first.bias.name, 1, False) if mine and alone and first.bias.sliceable else None
    if any(read.bias is not None for read in reads):
        return None
    if first.shift and all(read.shift == first.shift for read in reads) and propagation.uses.get(first.shift, 0) == len(reads):
        return Fold(first.shift, -1, False)
    path, _, local_name = first.weight.name.rpartition(".")
    owner = model.get_submodule(path)
    plain = isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) and local_name == "weight" and runs_own_forward(owner)
    alone = propagation.uses.get(first.weight.name, 0) == len(reads)
    if plain and alone and owner._parameters.get("bias", first) is None:
        return Fold(f"{path}.bias" if path else "bias", 1, True)
    return None


def _is_sparse(model: nn.Module, name: str) -> bool:
    path, _, local_name = name.rpartition(".")
    return local_name in records_of(model.get_submodule(path))
