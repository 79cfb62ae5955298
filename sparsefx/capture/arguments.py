"""Example inputs in the forms that users have them, as positional and keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def split_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of example inputs; a tensor that is given several times stands there once and then as copies.

    torch.export takes one tensor in two places for one input, and the graph would then ignore the second.

    Args:
        example_inputs: a pair ``(args, kwargs)`` of a tuple or list and a dict with text keys; a tuple or list of positional
            arguments; a dict of keyword arguments; anything else is the only positional argument.
    """
    args, kwargs = _forms(example_inputs)
    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return tree_map(apart, (args, kwargs))  # type: ignore[no-any-return]


def copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with tensors of their own, for a run of a model that may change its inputs in place."""
    return tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf,
        (args, kwargs),
    )


def _forms(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)) and type(example_inputs) in (tuple, list):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], (tuple, list)) and _is_keywords(example_inputs[1]):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        if isinstance(example_inputs, tuple):
            return example_inputs, {}
    return (example_inputs,), {}


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def describe_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The arguments in words: shapes and dtypes of tensors, types of everything else."""
    parts = [_describe(value) for value in args]
    parts += [f"{name}={_describe(value)}" for name, value in kwargs.items()]
    return f"({', '.join(parts)})" if parts else "(no inputs)"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    leaves = tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return type(value).__name__
    inside = ", ".join(_describe(leaf) for leaf in leaves[:4])
    return f"{type(value).__name__}[{inside}{', ...' if len(leaves) > 4 else ''}]"
