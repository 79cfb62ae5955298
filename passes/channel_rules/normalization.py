"""Normalizations: batch norm is a function of each channel; those that take statistics over channels keep them exact or pin."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channel_rules.elementwise import meet
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, Weight, constant_along


def batch_norm(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """batch_norm: with running statistics ``c -> (c - mean) / sqrt(var + eps) * w + b``, without ``c -> b``."""
    value = propagation.value(arguments["input"])
    made = _per_channel(propagation, node, value, arguments)
    if made is None:
        return _in_form(
            node, propagation.refuse(node, "meets channels along other axes than its own, or has computed parameters")
        )
    vectors, labelled = made
    own_statistics = bool(arguments.get("training")) or "functional" in op_name(node) or arguments.get("running_mean") is None
    constant = constant_along(labelled, 1)
    constant = _normalized(constant, vectors, arguments["eps"], own_statistics=own_statistics)
    sizes = tuple(value.shape[1] if axis == 1 else 1 for axis in range(len(value.shape)))
    return _in_form(node, labelled.with_constant(constant.reshape(sizes)))


def instance_norm(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """instance_norm: each channel by statistics of its own, or by running ones."""
    value = propagation.value(arguments["input"])
    made = _per_channel(propagation, node, value, arguments)
    if made is None:
        return propagation.refuse(node, "meets channels along other axes than its own, or has computed parameters")
    vectors, labelled = made
    constant = _normalized(constant_along(labelled, 1), vectors, arguments["eps"], own_statistics=arguments["use_input_stats"])
    sizes = tuple(value.shape[1] if axis == 1 else 1 for axis in range(len(value.shape)))
    return labelled.with_constant(constant.reshape(sizes))


def _normalized(constant: Floats, vectors: dict[str, Floats], eps: float, *, own_statistics: bool) -> Floats:
    scale, shift = vectors.get("weight", np.ones(1)), vectors.get("bias", np.zeros(1))
    if own_statistics:
        # A channel without variance is its mean everywhere.
        made = np.where(np.isnan(constant), np.nan, 0.0)
    else:
        made = (constant - vectors["running_mean"]) / np.sqrt(vectors["running_var"] + eps)
    return np.where(scale == 0, 0.0, made * scale) + shift


def _per_channel(
    propagation: Propagation, node: fx.Node, value: Value, arguments: dict[str, Any]
) -> tuple[dict[str, Floats], Value] | None:
    """The parameters along axis 1 as numbers, and the value with their labels joined to its own."""
    if value.varying - {1} or len(value.shape) < 2:
        return None
    propagation.facts.normalized[module_path(node)] = np.broadcast_to(value.labels.reshape(-1), (value.shape[1],))
    vectors: dict[str, Floats] = {}
    labels = value.labels
    for name in ("weight", "bias", "running_mean", "running_var"):
        given = arguments.get(name)
        if given is None:
            continue
        if not isinstance(given, Weight):
            return None
        vectors[name] = given.tensor.double().cpu().numpy()
        sizes = tuple(value.shape[1] if axis == 1 else 1 for axis in range(len(value.shape)))
        joined = propagation.axis(given, 0).reshape(sizes)
        propagation.labels.union(labels, joined)
        labels = joined
    return vectors, Value(value.shape, labels, value.constant)


def _in_form(node: fx.Node, value: Any) -> Any:
    """As one tensor, or as the first of several results, of which the others are statistics."""
    made = node.meta["val"]
    if not isinstance(made, (tuple, list)):
        return value
    if isinstance(value, tuple):
        return value
    return (value, *(None for _ in made[1:]))


def group_norm(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """group_norm: statistics are taken over each group of channels, so that a group stays or goes as a whole."""
    value = propagation.value(arguments["input"])
    groups = arguments["num_groups"]
    made = _per_channel(propagation, node, value, arguments)
    if made is None:
        return propagation.refuse(node, "meets channels along other axes than its own, or has computed parameters")
    vectors, labelled = made
    channels = value.shape[1]
    flat = np.broadcast_to(labelled.labels.reshape(-1), (channels,))
    rows = flat.reshape(groups, -1)
    if groups < channels:
        propagation.labels.union(np.broadcast_to(rows[:, :1], rows.shape), rows)
        propagation.facts.views.append((module_path(node), flat))
    constant = constant_along(labelled, 1).reshape(groups, -1)
    mean, variance = constant.mean(axis=1, keepdims=True), constant.var(axis=1, keepdims=True)
    normal = ((constant - mean) / np.sqrt(variance + arguments["eps"])).reshape(-1)
    scale, shift = vectors.get("weight", np.ones(1)), vectors.get("bias", np.zeros(1))
    known = np.where(scale == 0, 0.0, normal * scale) + shift
    sizes = tuple(channels if axis == 1 else 1 for axis in range(len(value.shape)))
    labels = np.ascontiguousarray(flat).reshape(sizes)
    return Value(value.shape, labels, value.constant).with_constant(known.reshape(sizes))


def layer_norm(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """layer_norm, rms_norm: channels that statistics are taken over are pinned; a channel whose weight is zero is its bias."""
    value = propagation.value(arguments["input"])
    rank = len(value.shape)
    over = frozenset(range(rank - len(arguments["normalized_shape"]), rank))
    if value.varying & over:
        propagation.pin(value, f"{op_name(node)} takes statistics over it", module_path(node), ordered=False)
    operands = [value]
    constant: Any = np.full((1,) * rank, np.nan)
    for name in ("weight", "bias"):
        if arguments.get(name) is not None:
            operands.append(propagation.value(arguments[name]))
    labels = meet(propagation, node, operands)
    if arguments.get("weight") is not None:
        scale = propagation.value(arguments["weight"]).lifted(rank).constant
        shift = (
            propagation.value(arguments["bias"]).lifted(rank).constant
            if arguments.get("bias") is not None
            else np.zeros((1,) * rank)
        )
        constant = np.where(scale == 0, 0.0, np.nan) + shift
    return propagation.compressed(Value(shape_of(node), labels, value.constant).with_constant(constant))


def softmax(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """softmax, log_softmax and other functions of whole rows: over channels they pin."""
    value = propagation.value(arguments.get("self", arguments.get("input")))
    return tied(propagation, node, value, _axes(value, arguments["dim"]), ordered=False).forgotten()


def _axes(value: Value, axis: int) -> frozenset[int]:
    return frozenset((axis % max(1, len(value.shape)),))


def tied(propagation: Propagation, node: fx.Node, value: Value, axes: frozenset[int], *, ordered: bool) -> Value:
    """What is computed from whole rows along these axes: a row stays or goes as one; pinned where it is all there is.

    ``ordered`` says whether the order within a row matters.
    """
    if not value.varying & axes:
        return value
    if not value.varying - axes:
        propagation.pin(value, f"{op_name(node)} runs over channels", module_path(node), ordered=ordered)
        return value
    first = value.labels
    for axis in value.varying & axes:
        first = first.take([0], axis=axis)
    propagation.labels.union(value.labels, first)
    return Value(value.shape, first, value.constant)


def cumulative(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """cumsum, cumprod."""
    value = propagation.value(arguments["self"])
    return tied(propagation, node, value, _axes(value, arguments["dim"]), ordered=True).forgotten()


RULES: dict[str, Rule] = {
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional"), batch_norm),
    "instance_norm": instance_norm,
    "group_norm": group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod"), cumulative),
}
