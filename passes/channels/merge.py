"""One entry for each weight: a weight that is read several times has one set of columns, and constants that agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sparsefx.passes.channel_rules.products import matrix
from sparsefx.passes.channels.added_bias import takes_a_bias
from sparsefx.passes.channels.facts import Read
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.propagation import Propagation
from sparsefx.passes.channels.value import Floats
from sparsefx.patterns import Channel
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


def merge_reads(model: nn.Module, propagation: Propagation, roots: Integers, *, trains: bool) -> list[Layer]:
    """Layers in the order of their first call.

    Args:
        model: the model itself.
        propagation: what was found out.
        roots: class of each label.
        trains: whether constants have to agree with train mode too. Otherwise its reads count for weights alone that eval mode
            does not read, those of auxiliary heads.
    """
    by_weight: dict[str, list[Read]] = {}
    for read in propagation.facts.reads:
        by_weight.setdefault(read.weight.name, []).append(read)
    return [_merged(model, propagation, reads, roots, trains) for reads in by_weight.values()]


def _that_count(reads: list[Read], trains: bool) -> list[Read]:
    evaluated = [read for read in reads if not read.training]
    return reads if trains or not evaluated else evaluated


def _merged(model: nn.Module, propagation: Propagation, all_reads: list[Read], roots: Integers, trains: bool) -> Layer:
    reads = _that_count(all_reads, trains)
    first = reads[0]
    uniform = all(read.uniform for read in reads)
    constant = first.constant.copy()
    same = all((read.out_axis, read.groups) == (first.out_axis, first.groups) for read in reads)
    for read in reads[1:]:
        constant = np.where(constant == read.constant, constant, np.nan) if same else np.full_like(constant, np.nan)
    fold = _fold(model, propagation, all_reads)
    carries = _keeps_its_pattern(model, first.weight.name) and _alone(propagation, first.weight.name, all_reads)
    if uniform and fold is None:
        constant = np.where(constant == 0, 0.0, np.nan)
    if not uniform and not carries:
        constant = np.where(constant == 0, 0.0, np.nan)
    used = (matrix(first) != 0).any(dim=2).cpu().numpy()
    merged = Read(
        first.where,
        first.weight,
        first.out_axis,
        first.in_axis,
        first.groups,
        first.out,
        first.into,
        constant,
        uniform,
        first.bias,
    )
    return Layer(merged, used, roots[first.out], roots[first.into], fold, carries)


def _fold(model: nn.Module, propagation: Propagation, reads: list[Read]) -> Fold | None:
    first = reads[0]
    if first.bias is not None:
        # A bias that something else reads too cannot take a constant over for this layer alone.
        mine = all(read.bias is not None and read.bias.name == first.bias.name for read in reads)
        return (
            Fold(first.bias.name, 1, False)
            if mine and first.bias.sliceable and _alone(propagation, first.bias.name, reads)
            else None
        )
    if any(read.bias is not None for read in reads):
        return None
    evaluated = [read for read in reads if not read.training]
    shifts = {read.shift for read in evaluated}
    if len(shifts) == 1 and (shift := shifts.pop()) and propagation.uses.get((shift, False), 0) == len(evaluated):
        return Fold(shift, -1, False)
    path, _, local_name = first.weight.name.rpartition(".")
    owner = model.get_submodule(path)
    if not isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) or local_name != "weight":
        return None
    # Elsewhere nobody adds a bias that the module holds: `F.linear(x, layer.weight)` in one of the modes, or a tied layer.
    if not all(_is_at(model, where, owner) for where in {read.where for read in reads}):
        return None
    if owner._parameters.get("bias", first) is None and _alone(propagation, first.weight.name, reads) and takes_a_bias(owner):
        return Fold(f"{path}.bias" if path else "bias", 1, True)
    return None


def _is_at(model: nn.Module, path: str, owner: nn.Module) -> bool:
    try:
        return model.get_submodule(path) is owner
    except AttributeError:  # a module that forward made itself
        return False


def _alone(propagation: Propagation, name: str, reads: list[Read]) -> bool:
    """Whether these reads are all uses of a parameter, in either mode."""
    return all(
        propagation.uses.get((name, training), 0) == sum(read.training == training for read in reads)
        for training in (False, True)
    )


def _keeps_its_pattern(model: nn.Module, name: str) -> bool:
    """Whether other columns may be added to one: not where masks choose among the weights of a row. An empty row stays empty."""
    path, _, local_name = name.rpartition(".")
    record = records_of(model.get_submodule(path)).get(local_name)
    return record is None or isinstance(record.pattern, Channel)
