"""Example inputs in the forms that users have them, as positional and keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def split_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of example inputs.

    Args:
        example_inputs: a pair ``(args, kwargs)`` of a tuple or list and a dict with text keys; a tuple or list of positional
            arguments; a dict of keyword arguments; anything else is the only positional argument.
    """
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
