"""Example inputs without their values: what is kept of them beside a model, so that it can be captured again later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class BlankTensor:
    """Shape, dtype and device of a tensor that was an example input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def without_values(example_inputs: Any) -> Any:
    """The same structure with each tensor replaced by a `BlankTensor`; plain values stay.

    None where there are other values among them: a model must stay fit for pickling, whatever its inputs are.
    """
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in tree_leaves(example_inputs)):
        return None
    return tree_map(
        lambda leaf: BlankTensor(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf,
        example_inputs,
    )


def with_zeros(blank_inputs: Any) -> Any:
    """The same structure with each `BlankTensor` replaced by a tensor of zeros."""
    return tree_map(
        lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, BlankTensor) else leaf,
        blank_inputs,
    )
