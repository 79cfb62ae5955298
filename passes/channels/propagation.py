"""The state of an interpretation of ATen graphs over channels, and what rules may do to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from sparsefx.passes.channels.facts import Blocks, Facts, Grid, Pin, Read, Work
from sparsefx.passes.channels.graph import ChannelGraph, module_path, op_name
from sparsefx.passes.channels.labels import PINNED, Integers, Labels
from sparsefx.passes.channels.value import Value, Weight, nothing_known

# A parameter with more elements, used element by element, is pinned: it is a weight that code computes with.
_LARGEST_ELEMENTWISE = 2**21

Rule = Callable[["Propagation", fx.Node, dict[str, Any]], Any]
"""What an op makes of abstract values: takes the node and its arguments by name, returns a `Value` or a tuple of them."""


class Propagation:
    """The state of one interpretation; rules call its methods. Several graphs of a model may be followed one after another."""

    def __init__(self, rules: Mapping[str, Rule], *, only_zeros: bool = False) -> None:
        self._rules = rules
        self._only_zeros = only_zeros
        self._changing: frozenset[str] = frozenset()
        self.labels = Labels()
        self.facts = Facts()
        self.training = False
        self.uses: dict[tuple[str, bool], int] = {}
        self._values: dict[fx.Node, Any] = {}
        self._stored: set[fx.Node] = set()
        self._unknown: set[int] = {PINNED}

    def follow(self, captured: ChannelGraph, progress: Callable[[int], None] | None = None) -> None:
        """Interpret every node of a graph, in order."""
        self._values = {}
        self._stored = set()
        self.training = captured.training
        self._changing = frozenset() if captured.training else captured.changing
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._given(node, captured)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
                if all(source in self._stored for source in node.all_input_nodes):
                    self._stored.add(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    if source.name in captured.outputs:
                        self.pin_node(source, "it is an output of the model", "")
                    elif not captured.training:
                        self.pin_node(source, "a buffer becomes it", "")
            else:
                self._values[node] = self.unknown_of(node, "it is computed by a graph of its own")
            if progress is not None:
                progress(1)
        self._count_uses(captured)

    def _count_uses(self, captured: ChannelGraph) -> None:
        """How many nodes read each weight, itself or in another order of axes."""
        for node, value in self._values.items():
            name = value.name if isinstance(value, Weight) else None
            if name is None and node.name in captured.weights:
                name = captured.weights[node.name].name  # one that changes
            if name is not None:
                readers = sum(not isinstance(self._values.get(user), Weight) for user in node.users)
                self.uses[name, self.training] = self.uses.get((name, self.training), 0) + readers

    def _given(self, node: fx.Node, captured: ChannelGraph) -> Any:
        weight = captured.weights.get(node.name)
        if weight is None:
            return self.unknown_of(node, "it meets an input of the model")
        self._stored.add(node)
        # What the next run finds there is another number: data, and no weight that could be read as it stands.
        return self._as_data(weight) if weight.name in self._changing else weight

    def _call(self, node: fx.Node) -> Any:
        rule = self._rules.get(op_name(node)) or self._rules.get(op_name(node).removesuffix("_"))
        if rule is None:
            return self.refuse(node, "has no rule")
        arguments = self.arguments(node)
        if any(
            0 in (leaf.tensor if isinstance(leaf, Weight) else leaf.labels).shape for leaf in _leaves(list(arguments.values()))
        ):
            return self.refuse(node, "has a layer without channels")
        self._note_computed(node, arguments)
        made = rule(self, node, arguments)
        return tree_map(_zeros_of, made) if self._only_zeros else made

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by the names of the op's schema, defaults included; tensors are `Value` or `Weight`."""
        given = tree_map(
            lambda leaf: self._values.get(leaf) if isinstance(leaf, fx.Node) else leaf, (node.args, dict(node.kwargs))
        )
        if not isinstance(node.target, torch._ops.OpOverload):
            return {**{str(number): value for number, value in enumerate(given[0])}, **given[1]}
        bound: dict[str, Any] = {}
        for number, argument in enumerate(node.target._schema.arguments):
            if number < len(given[0]):
                bound[argument.name] = given[0][number]
            elif argument.name in given[1]:
                bound[argument.name] = given[1][argument.name]
            else:
                bound[argument.name] = argument.default_value if argument.has_default_value() else None
        return bound

    def refuse(self, node: fx.Node, why: str) -> Any:
        """Pin everything that the node reads; what it makes is unknown."""
        reason = f"{op_name(node)} {why}"
        self.pin_all(node, reason)
        return self.unknown_of(node, reason)

    def unknown_of(self, node: fx.Node, reason: str) -> Any:
        """What can be anything and cannot be removed, in the structure of what the node makes.

        Its one label is pinned for this reason, which is then also that of all channels that meet it.
        """
        label = self.labels.fresh(1)
        self._unknown.add(int(label[0]))
        self.pin_labels(label, reason, module_path(node))

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            rank = leaf.dim()
            return Value(tuple(int(size) for size in leaf.shape), label.reshape((1,) * rank), nothing_known(rank))

        return tree_map(made, node.meta.get("val"))

    def is_unknown(self, value: Value) -> bool:
        """Whether this is what `unknown_of` made, as it was made or changed in its shape: nothing of it can be removed."""
        return value.labels.size == 1 and int(value.labels.flat[0]) in self._unknown

    def pin_all(self, node: fx.Node, reason: str) -> None:
        """Pin the channels of every input of a node."""
        for source in node.all_input_nodes:
            self.pin_node(source, reason, module_path(node))

    def pin_node(self, node: fx.Node, reason: str, where: str) -> None:
        """Pin the channels of what a node made."""
        for leaf in _leaves(self._values.get(node)):
            self.pin(leaf, reason, where)

    def pin(self, value: Value | Weight, reason: str, where: str, *, ordered: bool = True) -> None:
        """Channels of this tensor have to stay, see `Pin`."""
        if isinstance(value, Weight):
            for axis in range(value.tensor.dim()):
                self.pin_labels(self.axis(value, axis), reason, where, ordered=ordered)
            if value.name in self.facts.elements:
                self.pin_labels(self.facts.elements[value.name], reason, where, ordered=ordered)
        else:
            self.pin_labels(value.labels, reason, where, ordered=ordered)

    def pin_labels(self, labels: Integers, reason: str, where: str, *, ordered: bool = True) -> None:
        """These channels have to stay, see `Pin`."""
        if labels.any():
            self.facts.pins.append(Pin(labels, reason, where, ordered))

    def axis(self, weight: Weight, axis: int) -> Integers:
        """Labels of the indices of an axis of the tensor; all pinned where it is no parameter or buffer."""
        size = weight.tensor.shape[axis]
        if not weight.sliceable:
            return np.full(size, PINNED, dtype=np.int64)
        key = (weight.name, axis)
        if key not in self.facts.axes:
            self.facts.axes[key] = self.labels.fresh(size)
        return self.facts.axes[key]

    def value(self, given: Any) -> Value:
        """A weight as data: labels along its axes, constants what it holds."""
        if isinstance(given, Value):
            return given
        if isinstance(given, Weight):
            return self._as_data(given)
        raise TypeError(f"a rule asked for a tensor and found {type(given).__name__}")

    def is_stored(self, node: Any) -> bool:
        """Whether what a node makes is computed from parameters, buffers and constants alone, whatever the inputs are."""
        return node in self._stored

    def _as_data(self, weight: Weight) -> Value:
        tensor = weight.tensor
        long = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1]
        small = tensor.numel() <= _LARGEST_ELEMENTWISE
        readable = small and not tensor.is_complex() and tensor.device.type != "meta" and tensor.layout == torch.strided
        readable = readable and weight.name not in self._changing
        constant = tensor.double().cpu().numpy() if readable else nothing_known(tensor.dim())
        if not weight.sliceable:
            labels = np.full((1,) * tensor.dim(), PINNED, dtype=np.int64)
        elif not small:
            self.pin(weight, "it is used element by element and is too large to be followed", weight.name)
            labels = np.full((1,) * tensor.dim(), PINNED, dtype=np.int64)
        elif len(long) <= 1:
            axis = long[0] if long else 0
            labels = self.axis(weight, axis).reshape(tensor.shape) if tensor.dim() else np.zeros((), dtype=np.int64)
        else:
            labels = self._elements(weight)
        value = Value(tuple(tensor.shape), labels, np.where(np.isfinite(constant), constant, np.nan))
        return Value(weight.shape, value.labels.transpose(weight.order), value.constant.transpose(weight.order))

    def _elements(self, weight: Weight) -> Integers:
        if weight.name not in self.facts.elements:
            made = self.labels.fresh(weight.tensor.numel()).reshape(tuple(weight.tensor.shape))
            self.facts.elements[weight.name] = made
            self.facts.grids.append(Grid(made))
        return self.facts.elements[weight.name]

    def compressed(self, value: Value) -> Value:
        """Without the axes along which labels have become one class each; what still varies along two axes is a grid."""
        labels = value.labels
        if len(value.varying) < 2:
            return value
        labels = self.labels.find(labels)
        for axis in value.varying:
            first = labels.take([0], axis=axis)
            if (labels == first).all():
                labels = first
        if sum(size > 1 for size in labels.shape) > 1:
            self.facts.grids.append(Grid(labels))
        return Value(value.shape, labels, value.constant)

    def changed_shape(self, node: fx.Node, value: Value) -> Value:
        """Note that code may hold the number of these channels."""
        if value.varying:
            self.facts.views.append((module_path(node), value.labels))
        return self.compressed(value)

    def add_read(self, read: Read, node: fx.Node, *, axis: int = 1, places: int | None = None) -> None:
        """A product with a weight; the batch norm behind it, where nothing else reads its result, can take a constant over.

        ``axis`` is the one of its channels in the output. ``places`` is the number of places that each value of the weight is
        multiplied at, where the output does not tell.
        """
        # Batch norm has a mean for each index of axis 1.
        shift = self._shift_behind(node) if axis == 1 else ""
        self.facts.reads.append(replace(read, shift=shift, training=self.training))
        if places is None:
            self.count(node, read.weight, len(read.out))
        else:
            self.facts.work.append(Work(read.weight.name, places, self.training))

    def count(self, node: fx.Node, weight: Weight, outputs: int) -> None:
        """Note how often a call multiplies by each value of its weight."""
        self.facts.work.append(Work(weight.name, self._places(node, outputs), self.training))

    def _places(self, node: fx.Node, outputs: int) -> int:
        made = node.meta["val"]
        made, channels = (made[0] if isinstance(made, (tuple, list)) else made), outputs
        if op_name(node).startswith("conv_transpose") or self.arguments(node).get("transposed"):
            # Each place of the input is multiplied by the whole weight; strides make more places than that of the output.
            made = node.all_input_nodes[0].meta["val"]
            channels = int(made.shape[1])
        return max(1, math.prod(int(size) for size in made.shape) // channels)

    def _note_computed(self, node: fx.Node, arguments: Mapping[str, Any]) -> None:
        """Note a product with a weight that is no parameter, by the name that the module running it would have for it."""
        linear = op_name(node) == "linear"
        if (linear or op_name(node).startswith("conv")) and isinstance(weight := arguments.get("weight"), Value):
            outputs = weight.shape[0] if linear else shape_of(node)[1]
            name = f"{module_path(node)}.weight".removeprefix(".")
            self.facts.work.append(Work(name, self._places(node, outputs), self.training, computed=True))

    def _shift_behind(self, node: fx.Node) -> str:
        readers = list(node.users)
        if len(readers) != 1 or op_name(readers[0]) not in ("batch_norm", "_native_batch_norm_legit_no_training"):
            return ""
        mean = self.arguments(readers[0]).get("running_mean")
        return mean.name if isinstance(mean, Weight) and mean.sliceable and not self.training else ""

    def add_blocks(self, blocks: Blocks) -> None:
        """Runs of channels of which equally many stay."""
        self.facts.blocks.append(blocks)

    def broadcast(self, cells: Integers, line: Integers) -> None:
        """``line`` (of size 1 along the axes that it is repeated over) meets ``cells`` element by element."""
        self.facts.grids.append(Grid(cells, line))


def _zeros_of(value: Any) -> Any:
    return value.with_constant(np.where(value.constant == 0, 0.0, np.nan)) if isinstance(value, Value) else value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that a node makes."""
    return tuple(int(size) for size in node.meta["val"].shape)


def _leaves(value: Any) -> list[Value | Weight]:
    if isinstance(value, (Value, Weight)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return []
