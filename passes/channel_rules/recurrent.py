"""Recurrent layers and cells: a hidden unit is one channel of all gates, of the hidden weights' inputs and of the states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from sparsefx.passes.channels.facts import Blocks, Read
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.labels import PINNED, Integers
from sparsefx.passes.channels.propagation import Propagation, Rule
from sparsefx.passes.channels.value import Floats, Value, Weight, along, constant_along

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Kind:
    """A family of recurrent layers.

    Attributes:
        gates: blocks of rows in its weights, in each of which a hidden unit has a row.
        entrance: the block through which alone a state of zero can become another one: the cell gate of an LSTM (its state is
            ``f * c + i * tanh(g)``), the new gate of a GRU (``(1 - z) * tanh(n) + z * h``).
    """

    gates: int
    entrance: int


_KINDS = {"lstm": Kind(4, 2), "gru": Kind(3, 2), "rnn_tanh": Kind(1, 0), "rnn_relu": Kind(1, 0)}


@dataclass(frozen=True)
class Cell:
    """The weights of one layer in one direction: [gates * H, I], [gates * H, H] and twice [gates * H]."""

    into: Weight
    hidden: Weight
    biases: tuple[Weight, ...]


def layers(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """lstm, gru, rnn_tanh, rnn_relu of a padded batch.

    All layers and directions have one size of hidden state, so that equally many units have to stay in each.
    """
    kind = _KINDS[op_name(node)]
    value = propagation.value(arguments["input"])
    last, directions = len(value.shape) - 1, 2 if arguments.get("bidirectional") else 1
    cells = _cells(arguments.get("params"), biases=arguments.get("has_biases") is True)
    dropped = arguments.get("train") and arguments.get("dropout")
    if "data" in arguments or cells is None or len(cells) % directions:
        return propagation.refuse(node, "has a form without a rule")
    if value.varying - {last} or dropped:
        return propagation.refuse(node, "meets channels along other axes than its own, or drops some in training")
    units = _units(propagation, cells, kind)
    silent = _first_states(propagation, node, arguments["hx"], units)
    if silent is None:
        return propagation.refuse(node, "has first states with channels along other axes than its own")
    into, constant = along(value.labels, last, value.shape[last]), constant_along(value, last)
    zeros = np.zeros_like(silent)
    for first in range(0, len(cells), directions):
        for row in range(first, first + directions):
            zeros[row] = _read(propagation, node, cells[row], kind, (into, units[row]), (constant, silent[row]), value)
        into = units[first : first + directions].ravel()
        constant = _as_constant(zeros[first : first + directions]).ravel()
    propagation.add_blocks(Blocks(units))
    out, *left = node.meta["val"]
    made = [_behind(tuple(int(size) for size in out.shape), into, constant)]
    for state in left:
        shape = tuple(int(size) for size in state.shape)
        sizes = (len(cells), *(1,) * (len(shape) - 2), units.shape[1])
        known = _as_constant(zeros).reshape(sizes)
        made.append(Value(shape, units.reshape(sizes), known).with_constant(known))
    return tuple(made)


def cell(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell: one step."""
    kind = _KINDS[op_name(node).removesuffix("_cell")]
    value = propagation.value(arguments["input"])
    last = len(value.shape) - 1
    biases = [arguments[name] for name in ("b_ih", "b_hh") if arguments.get(name) is not None]
    cells = _cells([arguments["w_ih"], arguments["w_hh"], *biases], biases=len(biases) == 2)
    if cells is None or len(biases) == 1 or value.varying - {last}:
        return propagation.refuse(node, "has a form without a rule")
    units = _units(propagation, cells, kind)
    silent = _first_states(propagation, node, arguments["hx"], units)
    if silent is None:
        return propagation.refuse(node, "has states with channels along other axes than its own")
    read = (along(value.labels, last, value.shape[last]), units[0])
    known = _as_constant(_read(propagation, node, cells[0], kind, read, (constant_along(value, last), silent[0]), value))
    outputs = node.meta["val"]
    if isinstance(outputs, (tuple, list)):
        return tuple(_behind(tuple(int(size) for size in one.shape), units[0], known) for one in outputs)
    return _behind(tuple(int(size) for size in outputs.shape), units[0], known)


def _cells(weights: Any, *, biases: bool) -> list[Cell] | None:
    """Weights by layer and direction; None where they are computed, or states are projected."""
    if not isinstance(weights, (list, tuple)):
        return None
    length = 4 if biases else 2
    if len(weights) % length or not all(isinstance(weight, Weight) and weight.sliceable for weight in weights):
        return None
    if any(weight.order != tuple(range(weight.tensor.dim())) for weight in weights):
        return None
    found = []
    for start in range(0, len(weights), length):
        into, hidden, *rest = weights[start : start + length]
        if into.tensor.dim() != 2 or hidden.tensor.dim() != 2 or any(bias.tensor.dim() != 1 for bias in rest):
            return None
        found.append(Cell(into, hidden, tuple(rest)))
    sizes = {(one.hidden.shape[0], one.hidden.shape[1]) for one in found}
    return found if len(sizes) == 1 else None


def _units(propagation: Propagation, cells: Sequence[Cell], kind: Kind) -> Integers:
    """Label of each hidden unit of each cell; shape [cells, H]."""
    found = []
    for one in cells:
        unit = propagation.axis(one.hidden, 1)
        rows = np.tile(unit, kind.gates)
        for weight in (one.into, one.hidden, *one.biases):
            propagation.labels.union(rows, propagation.axis(weight, 0))
        found.append(unit)
    return np.stack(found)


def _first_states(propagation: Propagation, node: fx.Node, states: Any, units: Integers) -> Mask | None:
    """Which units start at zero, shape [cells, H]; None where a state's channels do not stand along its last axis."""
    silent = np.ones(units.shape, dtype=bool)
    for given in states if isinstance(states, (list, tuple)) else [states]:
        state = propagation.value(given)
        rank = len(state.shape)
        if state.varying - {rank - 1} and not (rank == 3 and state.varying <= {0, 2}):
            return None
        zero = state.constant == 0
        if zero.all() and (state.labels == PINNED).all():
            # Made to measure by code that may hold the number of units: whether it does, a run of the result shows.
            propagation.facts.views.append((module_path(node), units))
            continue
        if not state.varying:
            propagation.pin(state, f"it is the first state of {op_name(node)}", module_path(node))
            propagation.pin_labels(
                units, f"it is the hidden state of {op_name(node)}, whose first state is given", module_path(node)
            )
        else:
            propagation.labels.union(units, state.labels.reshape(state.labels.shape[0] if rank == 3 else 1, -1))
        silent &= zero.all(axis=tuple(range(1 if rank == 3 else 0, rank - 1)), keepdims=True).reshape(
            zero.shape[0] if rank == 3 else 1, -1
        )
    return silent


def _read(
    propagation: Propagation,
    node: fx.Node,
    one: Cell,
    kind: Kind,
    labels: tuple[Integers, Integers],
    known: tuple[Floats, Mask],
    value: Value,
) -> Mask:
    """Note what the gates of a cell read, and tell which of its units are zero at all times; shape [H].

    Args:
        labels: of the inputs, and of the units.
        known: constants of the inputs, and which units start at zero.
        value: what the recurrent op is given: each step of each sample is a place.
    """
    (into, units), (constant, silent) = labels, known
    places = math.prod(value.shape[:-1])
    out = np.tile(units, kind.gates)
    zero = _stays_zero(one, kind, constant, silent)
    propagation.labels.union(into, propagation.axis(one.into, 1))
    bias = one.biases[0] if one.biases else None
    where = module_path(node)
    read = Read(where, one.into, 0, 1, 1, out, np.array(into), constant, True, bias)
    propagation.add_read(read, node, places=places)
    read = Read(where, one.hidden, 0, 1, 1, out, units, _as_constant(zero), True)
    propagation.add_read(read, node, places=places)
    return zero


def _stays_zero(one: Cell, kind: Kind, constant: Floats, silent: Mask) -> Mask:
    """Units that start at zero and whose entrance sums nothing but zeros: by induction over time they stay zero."""
    size = len(silent)
    rows = slice(kind.entrance * size, (kind.entrance + 1) * size)
    reads = (one.into.tensor[rows] != 0).cpu().numpy()
    zero: Mask = silent & ~reads[:, np.broadcast_to(constant != 0, reads.shape[1:])].any(axis=1)
    for bias in one.biases:
        zero &= (bias.tensor[rows] == 0).cpu().numpy()
    hidden = (one.hidden.tensor[rows] != 0).cpu().numpy()
    while True:
        left = zero & ~hidden[:, ~zero].any(axis=1)
        if (left == zero).all():
            return zero
        zero = left


def _as_constant(zero: Mask) -> Floats:
    return np.where(zero, 0.0, np.nan)


def _behind(shape: tuple[int, ...], labels: Integers, constant: Floats) -> Value:
    """Channels along the last axis."""
    sizes = (*(1,) * (len(shape) - 1), shape[-1])
    return Value(shape, labels.reshape(sizes), constant.reshape(sizes)).with_constant(constant.reshape(sizes))


RULES: dict[str, Rule] = {**dict.fromkeys(_KINDS, layers), **{f"{name}_cell": cell for name in _KINDS}}
