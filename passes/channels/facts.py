"""What an interpretation collects for the solver: who reads which channels, and which removals have to go together."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.value import Floats, Weight


@dataclass(frozen=True)
class Read:
    """A product with a weight, which sums over channels: a linear layer, a convolution or a transposed one.

    Attributes:
        where: path of the module that was running.
        weight: the weight as it stands in the model.
        out_axis, in_axis: of the weight. With groups, index ``j`` of the input axis is channel ``g * C + j`` for the outputs of
            group ``g``.
        groups: of a convolution, else 1.
        out: label of each output channel; shape [K].
        into: label of each input channel; shape [groups * C].
        constant: the constant that each input channel is, else NaN; shape [groups * C].
        uniform: whether a constant input adds the same to every place of the output: no padding, and no transposed convolution.
        bias: the bias of this call, where it is a parameter.
        shift: name of the running mean of the only reader of the output, a batch norm in eval mode; empty where there is none.
        training: whether the call was seen in train mode.
    """

    where: str
    weight: Weight
    out_axis: int
    in_axis: int
    groups: int
    out: Integers
    into: Integers
    constant: Floats
    uniform: bool
    bias: Weight | None = None
    shift: str = ""
    training: bool = False


@dataclass(frozen=True)
class Grid:
    """Labels that vary along several axes: what is left has to be a grid again.

    With ``line``, the labels along one or some of the axes of another tensor that is broadcast over the others (size 1 there): an
    index of these axes stays exactly where any element that stays has it.
    """

    cells: Integers
    line: Integers | None = None


@dataclass(frozen=True)
class Blocks:
    """Equally long runs of channels (rows) of which equally many have to stay, as grouped convolutions and chunks want it.

    With ``partner``, the rows of the other side of a grouped convolution: a row may go as a whole where its partner goes too.
    """

    rows: Integers
    partner: Integers | None = None


@dataclass(frozen=True)
class Pin:
    """Labels that have to stay, and why.

    With ``ordered``, each has to stay at its place; else their number counts, and they may change places among themselves.
    """

    labels: Integers
    reason: str
    where: str
    ordered: bool = True


@dataclass(frozen=True)
class Heads:
    """A call of attention.

    Attributes:
        where: path of the module that was running.
        labels: one label a head; shape [heads].
        size: channels of a head.
    """

    where: str
    labels: Integers
    size: int


@dataclass(frozen=True)
class Split:
    """A tensor of which code takes parts of given sizes.

    Attributes:
        where: path of the module that was running.
        parts: labels of the channels of each part.
    """

    where: str
    parts: tuple[Integers, ...]


@dataclass(frozen=True)
class Work:
    """A product with a weight.

    Attributes:
        weight: its name; where it is computed, ``weight`` in the module that was running, which need not have such a one.
        places: number of places that each of its values is multiplied at.
        training: whether this was seen in train mode.
        computed: whether it is no parameter or buffer.
    """

    weight: str
    places: int
    training: bool
    computed: bool = False


@dataclass
class Facts:
    """Everything the solver needs, in the order of the graph."""

    reads: list[Read] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    views: list[tuple[str, Integers]] = field(default_factory=list)
    """Module path and labels of each change of shape on channels, where code may hold their number."""
    work: list[Work] = field(default_factory=list)
    """Products with weights, one for every call."""
    axes: dict[tuple[str, int], Integers] = field(default_factory=dict)
    """Label of each index of an axis of a parameter or buffer."""
    elements: dict[str, Integers] = field(default_factory=dict)
    """Label of each element of a parameter that is used as it is, along several axes."""
    normalized: dict[str, Integers] = field(default_factory=dict)
    """Labels of the channels that a normalization in this module takes, which may have no parameters to tell their number."""
    heads: list[Heads] = field(default_factory=list)
    """Calls of attention: modules may hold their number of heads."""
    splits: list[Split] = field(default_factory=list)
    """Modules may hold the sizes of these parts."""
    gathered: dict[str, tuple[Integers, Integers]] = field(default_factory=dict)
    """Weights of grouped convolutions: labels of outputs and of inputs, one row a group."""
