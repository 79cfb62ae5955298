"""Products of two computed tensors, by their einsum equation: matmul, bmm, einsum."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from sparsefx.passes.channels.facts import Heads
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, along, constant_along, nothing_known


def contract(propagation: Propagation, node: fx.Node, operands: tuple[Value, Value], inputs: tuple[str, str], output: str) -> Any:
    """Sum over the letters that are not in ``output``.

    A letter that is summed over pairs the channels of both operands. A channel may go where one of the two is constantly
    zero, else it is needed. Where labels vary along a letter that both operands and the output have (attention heads), all
    that stands at one index of it goes together.
    """
    left, right = operands
    shape = shape_of(node)
    left_axes = {inputs[0][axis] for axis in left.varying}
    right_axes = {inputs[1][axis] for axis in right.varying}
    both = [letter for letter in output if letter in inputs[0] and letter in inputs[1]]
    shared = [letter for letter in both if letter in left_axes | right_axes]
    if len(shared) > 1 or any(len(set(letters)) != len(letters) for letters in inputs):
        return propagation.refuse(node, "meets channels along several axes")
    if shared:
        labels = _by_index(propagation, node, operands, inputs, shared[0])
        if labels is None:
            return propagation.refuse(node, "broadcasts along an axis of channels")
        # Of scores of attention, the letter that is summed over counts the channels of a head.
        inner = next((left.shape[axis] for axis, letter in enumerate(inputs[0]) if letter not in output), 0)
        propagation.facts.heads.append(Heads(module_path(node), labels, inner))
        sizes = tuple(shape[axis] if letter == shared[0] else 1 for axis, letter in enumerate(output))
        return Value(shape, labels.reshape(sizes), _zeros(operands, inputs, shared[0]).reshape(sizes))
    if len(left_axes) > 1 or len(right_axes) > 1:
        return propagation.refuse(node, "meets channels along several axes")
    for value in operands:
        if not value.varying:
            propagation.pin(value, f"{op_name(node)} reads it", module_path(node))
    summed = (left_axes | right_axes) - set(output)
    kept = [
        (value, letters, letters[axis])
        for value, letters in zip(operands, inputs, strict=True)
        for axis in value.varying
        if letters[axis] in output
    ]
    if summed:
        letter = summed.pop()
        if letter not in inputs[0] or letter not in inputs[1]:
            return propagation.refuse(node, "sums over channels")
        _summed(propagation, node, operands, inputs, letter)
    if len(kept) > 1:
        return propagation.refuse(node, "makes a table of channels by channels")
    if not kept:
        return Value(shape, np.zeros((1,) * len(shape), dtype=np.int64), nothing_known(len(shape)))
    value, letters, letter = kept[0]
    sizes = tuple(shape[axis] if letter == name else 1 for axis, name in enumerate(output))
    vector = along(value.labels, letters.index(letter), value.shape[letters.index(letter)])
    return Value(shape, vector.reshape(sizes), _zeros((value,), (letters,), letter).reshape(sizes))


def _zeros(operands: tuple[Value, ...], inputs: tuple[str, ...], letter: str) -> Floats:
    """0 where one of the operands is zero at this index of the letter, else NaN."""
    found: Floats = np.full(1, np.nan)
    for value, letters in zip(operands, inputs, strict=True):
        found = np.where(constant_along(value, letters.index(letter)) == 0, 0.0, found)
    return found


def _by_index(
    propagation: Propagation, node: fx.Node, operands: tuple[Value, Value], inputs: tuple[str, str], letter: str
) -> Any:
    """One class for all labels at each index of ``letter``; shape [size of its axis]."""
    size = max(value.shape[letters.index(letter)] for value, letters in zip(operands, inputs, strict=True))
    first = None
    for value, letters in zip(operands, inputs, strict=True):
        axis = letters.index(letter)
        if value.shape[axis] != size:
            propagation.pin(value, f"{op_name(node)} broadcasts it over channels", module_path(node))
            continue
        rows = np.moveaxis(value.labels, axis, 0).reshape(value.labels.shape[axis], -1)
        rows = np.broadcast_to(rows, (size, rows.shape[1]))
        first = rows[:, :1] if first is None else first
        propagation.labels.union(np.broadcast_to(first, rows.shape), rows)
    return None if first is None else np.ascontiguousarray(first[:, 0])


def _summed(propagation: Propagation, node: fx.Node, operands: tuple[Value, Value], inputs: tuple[str, str], letter: str) -> None:
    """Pair the channels that are summed over, and pin those of which neither side is zero."""
    vectors: list[Integers] = []
    zero: NDArray[np.bool_] = np.zeros(1, dtype=bool)
    for value, letters in zip(operands, inputs, strict=True):
        axis = letters.index(letter)
        if axis in value.varying:
            vectors.append(along(value.labels, axis, value.shape[axis]))
        zero = zero | (constant_along(value, axis) == 0)
    if len(vectors) < 2:
        # The other side has its channels elsewhere: its places along this axis stay, and with them what they meet.
        propagation.pin_labels(vectors[0], f"{op_name(node)} sums over it", module_path(node))
        return
    propagation.labels.union(vectors[0], vectors[1])
    propagation.pin_labels(vectors[0][~zero], f"{op_name(node)} sums over it", module_path(node))


def einsum(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """einsum of two tensors with plain letters."""
    equation = str(arguments["equation"]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    names = inputs.split(",")
    if "." in equation or not arrow or len(names) != 2:
        return propagation.refuse(node, "has an equation without a rule")
    left, right = (propagation.value(tensor) for tensor in arguments["tensors"])
    return contract(propagation, node, (left, right), (names[0], names[1]), output)


RULES: dict[str, Rule] = {"einsum": einsum}
