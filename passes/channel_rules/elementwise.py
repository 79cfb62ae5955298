"""Functions of single elements, broadcasting included: channels stay what they are, and constants are evaluated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_map

from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.labels import PINNED, Integers
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, Weight, nothing_known, shrunk

_NAMES = [
    "abs",
    "acos",
    "acosh",
    "add",
    "addcdiv",
    "addcmul",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "ceil",
    "celu",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clip",
    "copysign",
    "cos",
    "cosh",
    "deg2rad",
    "div",
    "divide",
    "elu",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "floor_divide",
    "fmod",
    "frac",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "heaviside",
    "hypot",
    "leaky_relu",
    "lerp",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_sigmoid",
    "logaddexp",
    "logaddexp2",
    "logit",
    "maximum",
    "minimum",
    "mish",
    "mul",
    "multiply",
    "nan_to_num",
    "neg",
    "negative",
    "pow",
    "reciprocal",
    "relu",
    "relu6",
    "remainder",
    "round",
    "rsqrt",
    "rsub",
    "selu",
    "sgn",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinc",
    "sinh",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "sub",
    "subtract",
    "tan",
    "tanh",
    "threshold",
    "true_divide",
    "trunc",
    "where",
    "xlogy",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equal_",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "not_equal",
    "logical_and",
    "logical_or",
    "logical_not",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_not",
    "bitwise_xor",
    "__and__",
    "__or__",
    "isnan",
    "isinf",
    "isfinite",
    "masked_fill",
    "fmax",
    "fmin",
    "digamma",
    "erfinv",
]
_BOUNDED = frozenset(("clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "fmax", "fmin"))
_PRODUCTS = frozenset(("mul", "multiply"))
# What these give for a constant depends on more than the elements that are tensors here.
_NEVER_CONSTANT = frozenset(("nan_to_num",))
# Arguments that say how a result is stored.
_OF_RESULTS = frozenset(("dtype", "layout", "device", "pin_memory", "memory_format", "out"))
# One or the other of two, by a condition that may depend on inputs.
_CHOOSING = {"where": ("self", "other"), "masked_fill": ("self", "value")}


def elementwise(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Any op of the table: labels of the operands meet, constants go through the op itself in float64."""
    given = {name: propagation.value(value) for name, value in arguments.items() if isinstance(value, (Value, Weight))}
    if any(
        isinstance(value, (list, tuple)) and any(isinstance(v, (Value, Weight)) for v in value) for value in arguments.values()
    ):
        return propagation.refuse(node, "was given lists of tensors")
    labels = meet(propagation, node, list(given.values()))
    constant = _constant(node, arguments, given)
    return propagation.compressed(Value(shape_of(node), labels, constant))


def meet(propagation: Propagation, node: fx.Node, operands: list[Value]) -> Integers:
    """Labels of a result that has its operands' channels. Operands that vary along other axes than the others are pinned."""
    shape = shape_of(node)
    rank = len(shape)
    if not operands:
        return np.full((1,) * rank, PINNED, dtype=np.int64)
    lifted = [operand.lifted(rank) for operand in operands]
    # Among equals one that is not repeated: its labels are those of the whole result.
    leader = max(lifted, key=lambda operand: (len(operand.varying), sum(operand.shape)))
    axes = leader.varying
    for operand in lifted:
        if operand is leader:
            continue
        repeated = {axis for axis in range(rank) if operand.shape[axis] == 1 and shape[axis] > 1}
        if not operand.varying <= axes:
            reason = f"{op_name(node)} meets channels along other axes"
            propagation.pin(operand, reason, module_path(node))
            if not axes <= repeated:
                propagation.pin(leader, reason, module_path(node))
        elif not repeated & axes:
            propagation.labels.union(leader.labels, operand.labels)
        elif axes <= repeated:
            propagation.pin(operand, f"{op_name(node)} broadcasts it over channels", module_path(node))
        else:
            line = tuple(1 if axis in repeated else size for axis, size in enumerate(leader.labels.shape))
            propagation.broadcast(leader.labels, np.broadcast_to(operand.labels, line))
    return leader.labels


def _constant(node: fx.Node, arguments: dict[str, Any], given: dict[str, Value]) -> Floats:
    rank = len(shape_of(node))
    name = op_name(node).removesuffix("_")
    constants = {key: value.lifted(rank).constant for key, value in given.items()}
    if name in _CHOOSING:
        one, other = (np.asarray(constants.get(key, arguments.get(key)), dtype=np.float64) for key in _CHOOSING[name])
        chosen = np.where(one == other, one, np.nan)
        return shrunk(chosen.reshape((1,) * (rank - chosen.ndim) + chosen.shape))
    if name in _BOUNDED:
        # Infinite bounds, which are no constants that channels could have, are bounds that can be computed with.
        constants |= {key: _infinite(value, rank) for key, value in arguments.items() if _is_infinite(value)}
    unknown = [np.isnan(constant) for constant in constants.values()]
    annihilates = name in _PRODUCTS and any((constant == 0).any() for constant in constants.values())
    if name in _NEVER_CONSTANT or not constants or (not annihilates and any(mask.all() for mask in unknown)):
        return nothing_known(rank)
    made = evaluate(
        node, {**arguments, **{key: np.where(np.isnan(constant), 0.0, constant) for key, constant in constants.items()}}
    )
    if made is None:
        return nothing_known(rank)
    missing = unknown[0]
    for mask in unknown[1:]:
        missing = missing | mask
    made = np.where(missing, np.nan, made)
    if annihilates:
        for constant in constants.values():
            made = np.where(constant == 0, 0.0, made)
    return shrunk(made)


def _is_infinite(value: Any) -> bool:
    return (
        isinstance(value, Weight)
        and value.tensor.numel() == 1
        and value.tensor.device.type != "meta"
        and value.tensor.is_floating_point()
        and math.isinf(float(value.tensor))
    )


def _infinite(weight: Weight, rank: int) -> Floats:
    return np.full((1,) * rank, float(weight.tensor))


def evaluate(node: fx.Node, arguments: dict[str, Any]) -> Floats | None:
    """The op itself on float64 arrays in place of its tensors; None where it cannot take them, or makes no such numbers."""
    packet = getattr(torch.ops.aten, op_name(node).removesuffix("_"), None)
    target = node.target
    if packet is None or not isinstance(target, torch._ops.OpOverload):
        return None
    converted = tree_map(
        lambda leaf: torch.from_numpy(np.ascontiguousarray(leaf)) if isinstance(leaf, np.ndarray) else leaf, arguments
    )
    positional = [converted[argument.name] for argument in target._schema.arguments if not argument.kwarg_only]
    keyword = {
        argument.name: converted[argument.name]
        for argument in target._schema.arguments
        if argument.kwarg_only and argument.name not in _OF_RESULTS
    }
    try:
        made = packet(*positional, **keyword)
    except (RuntimeError, TypeError):
        return None
    if not isinstance(made, torch.Tensor) or made.dtype != torch.float64:
        return None
    found: Floats = made.numpy()
    return found


def identity(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Ops that change neither values nor layout, in eval mode or at all."""
    given = next(iter(arguments.values()))
    return given if isinstance(given, Weight) else propagation.value(given)


def cast(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """A change of dtype or device: constants survive among floating point types."""
    value = propagation.value(next(iter(arguments.values())))
    other = arguments.get("other")
    if isinstance(other, (Value, Weight)):
        propagation.pin(other, f"{op_name(node)} looks at it", module_path(node))
    return value if node.meta["val"].is_floating_point() else value.forgotten()


def dropout(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """In train mode only zero stays what it is."""
    value = propagation.value(next(iter(arguments.values())))
    trains = arguments.get("train", arguments.get("training", False))
    if not trains or arguments.get("p") == 0:
        return value
    return value.with_constant(np.where(value.constant == 0, 0.0, np.nan))


def alpha_dropout(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """In train mode zero does not stay zero either: dropped elements get the negative limit of SELU, and all are rescaled."""
    value = propagation.value(next(iter(arguments.values())))
    return value.forgotten() if arguments["train"] and arguments["p"] != 0 else value


def like(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """A new tensor in the shape of another: it follows that one's channels."""
    value = propagation.value(next(iter(arguments.values())))
    fill = {
        "zeros_like": 0.0,
        "ones_like": 1.0,
        "full_like": arguments.get("fill_value"),
        "zero": 0.0,
        "fill": arguments.get("value"),
    }
    known = fill.get(op_name(node).removesuffix("_"))
    constant = np.full((1,) * len(value.shape), float(known) if isinstance(known, (int, float)) else np.nan)
    return Value(value.shape, value.labels, constant)


def filled(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """A new tensor of one value, of a size that code computed."""
    shape = shape_of(node)
    known = {"zeros": 0.0, "new_zeros": 0.0, "ones": 1.0, "new_ones": 1.0}.get(op_name(node), arguments.get("fill_value"))
    constant = np.full((1,) * len(shape), float(known) if isinstance(known, (int, float)) else np.nan)
    return Value(shape, np.full((1,) * len(shape), PINNED, dtype=np.int64), constant)


def nothing(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Checks that make no tensor."""
    return None


def prelu(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """One slope a channel, along axis 1, or one for all."""
    value, slope = propagation.value(arguments["self"]), propagation.value(arguments["weight"])
    rank = len(value.shape)
    if slope.shape in ((1,), ()):
        propagation.pin(slope, "it is one slope for all channels", module_path(node))
        shaped = Value((1,) * rank, np.zeros((1,) * rank, dtype=np.int64), slope.constant.reshape((1,) * rank))
    else:
        sizes = tuple(slope.shape[0] if axis == 1 else 1 for axis in range(rank))
        shaped = Value(sizes, slope.labels.reshape(sizes), slope.constant.reshape(sizes))
        labels = meet(propagation, node, [value, shaped])
        value = Value(value.shape, labels, value.constant)
    made = np.where(value.constant >= 0, value.constant + 0 * shaped.constant, value.constant * shaped.constant)
    return propagation.compressed(value.with_constant(made))


RULES: dict[str, Rule] = {
    **dict.fromkeys(_NAMES, elementwise),
    **dict.fromkeys(("alias", "detach", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "resolve_conj"), identity),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "half", "double"), cast),
    **dict.fromkeys(("dropout", "feature_dropout", "native_dropout_eval"), dropout),
    "alpha_dropout": alpha_dropout,
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "zero", "fill"), like),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), filled),
    **dict.fromkeys(("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"), nothing),
    "prelu": prelu,
    "_prelu_kernel": prelu,
}
