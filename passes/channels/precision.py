"""What a model's own code does to float64: whether it goes on in less, and a mode in which it cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Narrowing(TorchDispatchMode):
    """Notes whether an op makes a shorter format of float64 or complex128."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        wide = any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.float64, torch.complex128) for leaf in tree_leaves((args, kwargs))
        )
        self.found |= wide and any(_is_short(leaf) for leaf in tree_leaves(made))
        return made


class Widening(TorchDispatchMode):
    """Makes float64 wherever code asks for, or makes, a shorter floating-point format, and complex128 of complex ones.

    Code that holds a format, as in ``grid.float()``, fails beside weights in float64; the same code computes the same function in
    float64. Ops that write into a tensor of the shorter format keep it. Products of mixtures of experts have no float64 kernel;
    they are taken apart.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default and (made := _grouped_product(*args, **kwargs)) is not None:
            return made
        return tree_map(_widened, func(*args, **kwargs))


def _grouped_product(
    rows: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor | None:
    """``rows[offs[g - 1] : offs[g]] @ weights[g]`` for each group; None for the other forms of the op."""
    if offs is None or bias is not None or rows.dim() != 2 or weights.dim() != 3:
        return None
    made = rows.new_zeros(rows.shape[0], weights.shape[2])
    start = 0
    for weight, end in zip(weights.unbind(0), offs.tolist(), strict=True):
        made[start:end] = rows[start:end] @ weight
        start = end
    return made


def widened(tensor: Tensor) -> Tensor:
    """Real and complex numbers in the longest format there is; others as they are."""
    return tensor.to(_longest(tensor.dtype))


def _longest(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _is_short(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype != _longest(leaf.dtype)


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return _longest(leaf)
    return widened(leaf) if isinstance(leaf, Tensor) else leaf


__all__ = ["Narrowing", "Widening", "widened"]
