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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsefx.dormant_values import compact_of, spread
from sparsefx.errors import StateError
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.coupled_channel import Coupled
from sparsefx.shards import Shards

if TYPE_CHECKING:  # algorithms work on these records, so they are imported after this file
    from sparsefx.algorithms.base import Algorithm

_KEY = "_sparsefx_parameters"
_USUAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(eq=False)
class SparseParameter:
    """The mask of one parameter, and the values that do not participate at the moment.

    Attributes:
        pattern: what masks are allowed.
        density: share of weights that participate.
        target: the density asked for, where an algorithm has yet to reach it.
        reduction_axis: 0 or 1; 2 for a stack of matrices.
        mask: bool, the parameter's shape, True where a weight participates. Moved in place while training.
        compact: the values n of the weights that do not participate, in the parameter's dtype, as `sparsefx.dormant_values` keeps
            them; None where the algorithm keeps none. `dormant` has them in their places.
        algorithm: that it was sparsified with; None where a mask was put there by hand.
        state: tensors that the algorithm keeps beside the weight.
        threshold: the last magnitude threshold, a hint for the next search that never changes its result.
        merged: True while the parameter holds dense weights, inside an optimizer step.
        runtime: the MaskRuntime that moves this mask, if one does; not copied and not pickled.
        warning: the hook that warns of training without a runtime; not copied and not pickled.
        coupled: for pattern ``channel:coupled``, the channels of this weight among those of all; None where that is not known.
        left_out: values of the last loaded state_dict that the mask has no room for, until the whole model is loaded.
        shards: how the parameter, and all that stands beside it, is cut among processes; None where this one has it whole.
        loading: the tensor that is about to be loaded into the parameter, while a state_dict is.
        mask_before: the mask of the last step, where another was chosen for loaded values since; not copied and not pickled.
    """

    pattern: Pattern
    density: float
    reduction_axis: int
    mask: Tensor
    compact: Tensor | None = None
    algorithm: Algorithm | None = None
    threshold: float | None = None
    merged: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    target: float | None = None
    shards: Shards | None = None
    runtime: weakref.ReferenceType[Any] | None = field(default=None, repr=False)
    warning: RemovableHandle | None = field(default=None, repr=False)
    loading: Tensor | None = field(default=None, repr=False)
    left_out: Tensor | None = field(default=None, repr=False)
    coupled: Coupled | None = field(default=None, repr=False)
    mask_before: Tensor | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runtime": None, "warning": None, "loading": None, "left_out": None, "mask_before": None}

    @property
    def dormant(self) -> Tensor | None:
        """The values n of the weights that do not participate, zero elsewhere: a new tensor of the parameter's shape, dtype and
        layout; None where the algorithm keeps none.

        Raises:
            StateError: the mask was changed without them.
        """
        return None if self.compact is None else spread(self.compact, self.mask)

    def keep(self, values: Tensor) -> None:
        """Let the dormant values, where there are any, become those of ``values`` (in the parameter's shape) that the mask leaves
        out."""
        if self.compact is not None:
            self.compact = compact_of(values.to(self.mask.device, self.compact.dtype), self.mask)

    def make_room(self, count: int) -> None:
        """Room for ``count`` dormant values, on the CPU; those that were there are gone where their number was another."""
        if self.compact is not None and self.compact.numel() != count:
            self.compact = torch.empty(count, dtype=self.compact.dtype)

    def remember_mask(self) -> None:
        """Before a mask is chosen for loaded values: what the algorithm keeps is of the present one."""
        if self.state and self.mask_before is None:
            self.mask_before = self.mask.clone()

    def follow(self, weight: Tensor) -> None:
        """Bring mask and dormant values to the weight's device, dtype and memory layout, where the user moved it."""
        if not _alongside(self.mask, weight):
            dormant = self.dormant
            # The same tensor object, so that graphs that hold the mask stay in step.
            self.mask = _moved(self.mask, torch.empty_like(weight, dtype=torch.bool))
            if dormant is not None:
                self.compact = compact_of(torch.empty_like(weight, requires_grad=False).copy_(dormant), self.mask)
        elif self.compact is not None and self.compact.dtype != weight.dtype:
            self.compact = self.compact.to(weight.dtype)
        for name, value in self.state.items():
            if value.device != weight.device:
                self.state[name] = value.to(weight.device)

    def distributed(self, value: Tensor) -> Tensor:
        """What stands beside this process's part of a sharded parameter as a DTensor like it; anything else as it is."""
        return value if self.shards is None or value.shape != self.mask.shape else self.shards.distributed(value)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Split a weight that an optimizer step left dense, by the mask that is in force."""
        if not self.merged:
            return
        self.follow(weight)
        self.keep(weight)
        weight.masked_fill_(~self.mask, 0)
        self.merged = False


def _alongside(tensor: Tensor, weight: Tensor) -> bool:
    if tensor.device != weight.device:
        return False
    stride = tensor.stride()
    if stride == weight.stride():
        return True
    # A weight that is a view with gaps: what stands beside it has the strides of a dense copy.
    return stride == torch.empty_like(weight, device="meta").stride()


def _moved(mask: Tensor, empty: Tensor) -> Tensor:
    empty.copy_(mask)
    if mask.is_meta or empty.is_meta:
        return empty
    mask.data = empty
    return mask


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
            name = f"{module_name}.{local_name}" if module_name else local_name
            parameter = module._parameters.get(local_name)
            if parameter is None:
                raise StateError(
                    f"{name} is sparse, but no longer a parameter of its module (a parametrization such as weight_norm or prune "
                    "took its place); remove that, or call sparsefx.finalize(model) before it"
                )
            yield name, parameter, record


def expect_masked(name: str, parameter: nn.Parameter, record: SparseParameter) -> None:
    """Raise StateError where a mask can no longer be laid on its parameter, which the user replaced or converted."""
    if parameter.dtype in _USUAL and record.shards is None and parameter.shape == record.mask.shape:
        return
    shape = record.mask.shape if record.shards is None else record.shards.shape
    if parameter.shape != shape:
        raise StateError(
            f"{name} has shape {tuple(parameter.shape)}, but its mask has {tuple(shape)}: the parameter was replaced "
            "after sparsify, or flattened, as FullyShardedDataParallel does (use torch.distributed.fsdp.fully_shard); put one of "
            "the old shape back, or build the model anew and sparsify it as it is now"
        )
    if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
        raise StateError(
            f"{name} has become {parameter.dtype}, in which masks cannot be moved; expected float16 or wider. Convert it back, "
            "or call sparsefx.finalize before converting"
        )


def empty_channels(weight: Tensor, reduction_axis: int) -> int:
    """How many output channels (along the axis of the first two that is not ``reduction_axis``) hold only zeros.

    Of a stack of matrices (``reduction_axis`` 2), rows of any of them.
    """
    by_channel = weight.flatten(0, 1) if reduction_axis == 2 else weight.movedim(1 - reduction_axis, 0).flatten(1)
    # Formats of eight bits have no aminmax, nor are they large.
    if not by_channel.numel() or not by_channel.is_floating_point() or by_channel.dtype.itemsize < 2:
        return int((by_channel == 0).all(dim=1).sum())
    low, high = by_channel.aminmax(dim=1)  # takes no memory of the weight's size, and passes NaN on
    return int(((low == 0) & (high == 0)).sum())
