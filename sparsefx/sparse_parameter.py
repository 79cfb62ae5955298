"""What sparsefx keeps beside one sparse parameter, and where it keeps it.

The record stands in the ``__dict__`` of the module that owns the parameter, under the parameter's local name. So it is
copied by ``copy.deepcopy`` and pickled with the module, and is in no state_dict, no buffer list and no DDP broadcast.
It holds no reference to the parameter itself: the owner's current Parameter is looked up each time, which survives
``load_state_dict(assign=True)``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.patterns.base import Pattern

_KEY = "_sparsefx_parameters"


@dataclass(eq=False)
class SparseParameter:
    """The mask of one parameter, and the values that do not participate at the moment.

    Attributes:
        pattern: what masks are allowed.
        density: share of weights that participate, as asked for.
        reduction_axis: 0 or 1.
        mask: bool, the parameter's shape, True where a weight participates. Moved in place while training.
        dormant: the values n of the weights that do not participate, zero elsewhere, in the parameter's shape and
            dtype; None where the algorithm keeps none.
        threshold: the last magnitude threshold, a hint for the next search that never changes its result.
        runtime: the MaskRuntime that moves this mask, if one does; not copied and not pickled.
        loading: True while a state_dict that holds the parameter is being loaded.
    """

    pattern: Pattern
    density: float
    reduction_axis: int
    mask: Tensor
    dormant: Tensor | None = None
    threshold: float | None = None
    runtime: weakref.ReferenceType[Any] | None = field(default=None, repr=False)
    loading: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runtime": None, "loading": False}

    def follow(self, weight: Tensor) -> None:
        """Bring mask and dormant values to the weight's device, dtype and memory layout, where the user moved it."""
        mask = self.mask
        if mask.device != weight.device or mask.stride() != weight.stride():
            self.mask = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
        dormant = self.dormant
        if dormant is not None and (
            dormant.device != weight.device or dormant.dtype != weight.dtype or dormant.stride() != weight.stride()
        ):
            self.dormant = torch.empty_like(weight, requires_grad=False).copy_(dormant)


def records_of(module: nn.Module) -> dict[str, SparseParameter]:
    """The module's own records by local parameter name; an empty dict where it has none."""
    found: dict[str, SparseParameter] = module.__dict__.get(_KEY, {})
    return found


def add_record(module: nn.Module, local_name: str, record: SparseParameter) -> None:
    """Put a record beside ``module``'s parameter ``local_name``."""
    module.__dict__.setdefault(_KEY, {})[local_name] = record


def remove_records(module: nn.Module) -> None:
    """Take away all records of this module itself (not of its children)."""
    module.__dict__.pop(_KEY, None)


def sparse_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, SparseParameter]]:
    """Every sparse parameter below ``model``: full name, the Parameter now in place, and its record."""
    for module_name, module in model.named_modules():
        for local_name, record in records_of(module).items():
            parameter = module._parameters[local_name]
            assert parameter is not None
            yield (f"{module_name}.{local_name}" if module_name else local_name), parameter, record


def empty_channels(weight: Tensor, reduction_axis: int) -> int:
    """How many output channels (along the axis of the first two that is not ``reduction_axis``) hold only zeros."""
    by_channel = weight.movedim(1 - reduction_axis, 0).flatten(1)
    return int((by_channel == 0).all(dim=1).sum())
