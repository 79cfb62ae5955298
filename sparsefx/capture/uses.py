"""How an op reads a weight: one table, shared by the rungs that see calls.

Ops go by their base name, which is the same for ``torch.nn.functional.linear``, ``torch.ops.aten.linear.default`` and an fx
node: ``linear``. A name that stands in no set here is an op that sparsefx does not know, and a parameter that it reads is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAME_ELEMENTS = frozenset(
    (
        "contiguous",
        "clone",
        "to",
        "_to_copy",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "type_as",
        "cpu",
        "cuda",
        "detach",
        "detach_",
        "alias",
        "requires_grad_",
        "__get__",
        "lift_fresh_copy",
    )
)
"""Ops that give the same elements at the same places: casts, copies, moves."""

VIEWS = frozenset(
    (
        "t",
        "T",
        "mT",
        "H",
        "mH",
        "transpose",
        "permute",
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "select",
        "slice",
        "narrow",
        "getitem",
        "__getitem__",
        "expand",
        "view_as",
        "swapaxes",
        "swapdims",
        "movedim",
        "tensor_split",
        "numpy_T",
        "adjoint",
    )
)
"""Ops whose result is a view of a dense tensor, so that its strides tell which axis is which."""

SCALINGS = frozenset(
    ("mul", "__mul__", "__rmul__", "div", "truediv", "__truediv__", "true_divide", "multiply", "divide", "imul", "idiv")
)
"""Ops that leave zeros zero, where the result has the weight's shape."""

METADATA = frozenset(
    (
        "size",
        "dim",
        "numel",
        "stride",
        "shape",
        "dtype",
        "device",
        "layout",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "ndim",
        "nelement",
        "ndimension",
        "storage_offset",
        "element_size",
        "data_ptr",
        "get_device",
        "__len__",
        "_assert_tensor_metadata",
        "sym_size",
        "sym_numel",
        "is_nested",
        "is_cuda",
        "names",
        "requires_grad",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "is_mkldnn",
        "is_xla",
        "is_mps",
        "is_xpu",
        "__repr__",
        "__hash__",
        "is_leaf",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "result_type",
    )
)
"""Ops that read no values."""

LIKE = frozenset(("to", "type_as", "view_as", "expand_as", "reshape_as"))
"""Ops that read no values of any argument but the first."""

EMBEDDINGS = frozenset(("embedding", "embedding_bag", "_embedding_bag"))

ONE_HOT = "one_hot"
"""The op whose result, in a product with a weight, picks rows of the weight: a lookup, written as a product."""

_CONVOLUTIONS = {f"conv{n}d": n for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d": n for n in (1, 2, 3)}
_PRODUCTS = {"matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "__matmul__": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_PRODUCTS.update({"addbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2), "matvec": (0, 1)})
GROUPED_PRODUCTS = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
"""Products of groups of rows with one matrix each, of a stack: mixtures of experts."""
_PRODUCTS.update(dict.fromkeys(GROUPED_PRODUCTS, (0, 1)))
# Fused ops, and how many leading arguments are activations: each matrix behind them is read as [out, in].
_FUSED = {
    "multi_head_attention_forward": 3,
    "_native_multi_head_attention": 3,
    "_transformer_encoder_layer_fwd": 1,
    "lstm": 2,
    "gru": 2,
    "rnn_tanh": 2,
    "rnn_relu": 2,
    "lstm_cell": 2,
    "gru_cell": 2,
    "rnn_tanh_cell": 2,
    "rnn_relu_cell": 2,
}


@dataclass(frozen=True)
class View:
    """A tensor that stands for a parameter: the parameter itself, a view of it, or a cast of one.

    Attributes:
        parameter: full name.
        shape, strides: of the parameter.
        view_shape, view_strides: of the view, in the parameter's storage.
    """

    parameter: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    view_shape: tuple[int, ...]
    view_strides: tuple[int, ...]

    @staticmethod
    def of(parameter: str, tensor: Tensor) -> View:
        """The parameter itself."""
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        return View(parameter, shape, strides, shape, strides)

    def like(self, tensor: Tensor) -> View:
        """Another view of the same parameter's storage."""
        return View(self.parameter, self.shape, self.strides, tuple(tensor.shape), tuple(tensor.stride()))

    def axis(self, dimension: int) -> int | None:
        """The axis of the parameter that this dimension of the view runs along, whole; None where there is none."""
        if not -len(self.view_shape) <= dimension < len(self.view_shape):
            return None
        size, stride = self.view_shape[dimension], self.view_strides[dimension]
        for axis, (full, step) in enumerate(zip(self.shape, self.strides, strict=True)):
            if (size, stride) == (full, step):
                return axis
        return None


@dataclass(frozen=True)
class Use:
    """What one op does with one view of a parameter; see `sparsefx.program.CallSite`."""

    view: View
    op: str
    reduction_axis: int | None = None
    groups: int = 1
    flops: int | None = None
    problem: str = ""


def op_name(target: Any) -> str:
    """The base name of an fx node's target, or of a function that a TorchFunctionMode was handed."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].split(".")[0]
    return str(getattr(target, "__name__", type(target).__name__))


def is_known_product(name: str) -> bool:
    """Whether the op is a linear, convolution, matrix product or a fused op made of them."""
    return name in ("linear", "convolution", "einsum") or any(
        name in table for table in (_CONVOLUTIONS, _TRANSPOSED, _PRODUCTS, _FUSED)
    )


def read_uses(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    view_of: Callable[[Any], View | None],
    shape_of: Callable[[Any], tuple[int, ...] | None],
    result_shape: tuple[int, ...] | None,
) -> list[Use]:
    """The uses of parameters in one call.

    Args:
        name: see `op_name`.
        args, kwargs: of the call, with tensors (or nodes) at any depth of lists and tuples.
        view_of: the parameter that an argument stands for, or None.
        shape_of: the shape of an argument, or None where unknown.
        result_shape: of the call's (first) result, or None.
    """
    if name in METADATA:
        return []
    if name == "linear":
        return _read_linear(args, kwargs, view_of, shape_of)
    if name in _CONVOLUTIONS or name in _TRANSPOSED or name == "convolution":
        return _read_convolution(name, args, kwargs, view_of, shape_of, result_shape)
    if name in _PRODUCTS:
        return _read_product(name, args, kwargs, view_of, result_shape)
    if name == "einsum":
        return _read_einsum(args, view_of, shape_of)
    if name in _FUSED:
        return _read_fused(name, args, kwargs, view_of, shape_of)
    if name in LIKE:
        args, kwargs = args[:1], {}
    return [Use(view, name, problem="" if name in EMBEDDINGS else _unknown(name)) for view in _views(args, kwargs, view_of)]


def as_lookup(use: Use) -> Use:
    """The use, made by a product with a one-hot operand: an embedding, which sums over nothing."""
    return Use(use.view, "embedding")


def _unknown(name: str) -> str:
    return f"is used by {name!r}, an op through which zeros do not surely stay zeros"


def _views(args: Any, kwargs: Any, view_of: Callable[[Any], View | None]) -> list[View]:
    found: list[View] = []
    pending = [kwargs, args]
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple)):
            pending.extend(reversed(item))
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        else:
            view = view_of(item)
            if view is not None:
                found.append(view)
    return found


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, *names: str) -> Any:
    if index < len(args):
        return args[index]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _product(view: View, op: str, dimension: int, **fields: Any) -> Use:
    """A use that sums over one dimension of the view."""
    axis = view.axis(dimension)
    if axis is None:
        problem = f"{op} sums over something that is not one whole axis of the weight (a slice, or several axes at once)"
        return Use(view, op, problem=problem, **fields)
    if axis > 1 and (axis > 2 or len(view.shape) > 3):
        problem = f"{op} sums along axis {axis} of the weight; patterns run along axis 0 or 1, or the last of a stack of matrices"
        return Use(view, op, problem=problem, **fields)
    return Use(view, op, reduction_axis=axis, **fields)


def _as_activation(view: View, op: str) -> Use:
    return Use(view, op, problem=f"{op} reads the parameter where activations go, not as its weight")


def _others(args: Any, kwargs: Any, view_of: Callable[[Any], View | None], weight: Any, op: str) -> list[Use]:
    """Uses as anything but the weight; a bias (one axis) is nobody's concern."""
    views = _views([a for a in args if a is not weight], {k: v for k, v in kwargs.items() if v is not weight}, view_of)
    return [_as_activation(view, op) for view in views if len(view.shape) > 1]


def _read_linear(args: Any, kwargs: Any, view_of: Any, shape_of: Any) -> list[Use]:
    data, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    view = view_of(weight)
    uses = _others(args, kwargs, view_of, weight, "linear")
    if data is weight and view is not None:
        uses.append(_as_activation(view, "linear"))
    if view is not None:
        shape = shape_of(data)
        flops = None if shape is None else 2 * math.prod(shape) * math.prod(view.view_shape[:-1])
        uses.append(_product(view, "linear", 1 if len(view.view_shape) == 2 else -1, flops=flops))
    return uses


def _read_convolution(name: str, args: Any, kwargs: Any, view_of: Any, shape_of: Any, result: Any) -> list[Use]:
    data, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    view = view_of(weight)
    uses = _others(args, kwargs, view_of, weight, name)
    if view is None:
        return uses
    if name == "convolution":
        transposed, groups = bool(_argument(args, kwargs, 6, "transposed")), _argument(args, kwargs, 8, "groups")
        name = f"conv{'_transpose' if transposed else ''}{len(view.view_shape) - 2}d"
    else:
        transposed = name in _TRANSPOSED
        groups = _argument(args, kwargs, 6, "groups")
    groups = 1 if groups is None else groups
    if not isinstance(groups, int):
        return [*uses, Use(view, name, problem=f"{name} takes its groups from data")]
    # Each input position meets weight / C_in values in a transposed convolution, each output position weight / C_out.
    spread = shape_of(data) if transposed else result
    flops = None if spread is None else 2 * math.prod(spread) * math.prod(view.view_shape[1:])
    use = _product(view, name, 0 if transposed else 1, groups=groups, flops=flops)
    return [*uses, use]


def _read_product(name: str, args: Any, kwargs: Any, view_of: Any, result: Any) -> list[Use]:
    first, second = _PRODUCTS[name]
    op = "matmul" if name == "__matmul__" else name
    left = _argument(args, kwargs, first, "input", "self", "mat1", "batch1")
    right = _argument(args, kwargs, second, "other", "mat2", "batch2", "vec")
    uses: list[Use] = []
    for operand, dimension in ((left, -1), (right, -2)):
        view = view_of(operand)
        if view is not None and len(view.shape) > 1:
            if len(view.view_shape) == 1:
                dimension = -1
            size = view.view_shape[dimension]
            flops = None if result is None else 2 * math.prod(result) * size
            uses.append(_product(view, op, dimension, flops=flops))
    summand = _argument(args, kwargs, 0, "input", "self") if first == 1 else None
    view = view_of(summand)
    return uses if view is None or len(view.shape) < 2 else [*uses, _as_activation(view, op)]


def _read_einsum(args: Any, view_of: Any, shape_of: Any) -> list[Use]:
    equation = args[0] if args and isinstance(args[0], str) else None
    operands = list(args[1]) if len(args) > 1 and isinstance(args[1], (list, tuple)) else list(args[1:])
    found = [(index, view) for index, view in ((i, view_of(operand)) for i, operand in enumerate(operands)) if view is not None]
    if not found:
        return []
    if equation is None or "->" not in equation or "..." in equation.split("->")[0].split(",")[found[0][0]]:
        return [Use(view, "einsum", problem="is used by an einsum whose equation sparsefx cannot read") for _, view in found]
    equation = equation.replace(" ", "")
    terms, result = equation.split("->")[0].split(","), equation.split("->")[1]
    uses: list[Use] = []
    for index, view in found:
        letters = terms[index]
        summed = [position for position, letter in enumerate(letters) if letter not in result]
        if len(summed) != 1 or len(set(letters)) != len(letters):
            uses.append(Use(view, "einsum", problem=f"einsum {equation!r} does not sum over exactly one axis of the weight"))
        else:
            uses.append(_product(view, "einsum", summed[0], flops=_einsum_flops(terms, operands, shape_of)))
    return uses


def _einsum_flops(terms: list[str], operands: list[Any], shape_of: Any) -> int | None:
    sizes: dict[str, int] = {}
    for letters, operand in zip(terms, operands, strict=False):
        shape = shape_of(operand)
        if shape is None or "..." in letters or len(shape) != len(letters):
            return None
        sizes.update(zip(letters, shape, strict=True))
    return 2 * math.prod(sizes.values())


def _read_fused(name: str, args: Any, kwargs: Any, view_of: Any, shape_of: Any) -> list[Use]:
    count = _FUSED[name]
    names = ("query", "key", "value")
    activations = [_argument(args, kwargs, index, key) for index, key in zip(range(count), names, strict=False)]
    views = _views(args[count:], {k: v for k, v in kwargs.items() if k not in names}, view_of)
    uses = [_as_activation(view, name) for view in _views(activations, {}, view_of)]
    shape = shape_of(activations[0]) if activations and not isinstance(activations[0], (list, tuple)) else None
    for view in views:
        if len(view.view_shape) == 2:
            flops = None if shape is None or len(shape) < 2 else 2 * math.prod(shape[:-1]) * math.prod(view.view_shape)
            uses.append(_product(view, name, 1, flops=flops))
        elif len(view.shape) > 1:
            uses.append(Use(view, name))
    return uses
