"""Carries a plan out on a model: tensors, masks beside them, the state of optimizers, and numbers that modules hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsefx.dormant_values import compact_of
from sparsefx.errors import StateError
from sparsefx.model_record import is_watch, model_records, watch
from sparsefx.passes.channels.cut import cut
from sparsefx.passes.channels.optimizers import Cut, OptimizersFollow
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.sparse_parameter import records_of

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def check_fits(model: nn.Module, plan: ChannelPlan) -> None:
    """Raise StateError unless the plan was made for a model with these very parameters and widths."""
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise StateError(
                f"the plan cuts {name!r}, which {type(model).__name__} does not have; apply it to the same architecture"
            )
        found = tuple(tensors[name].shape)
        if found != shape:
            raise StateError(
                f"the plan cuts {name!r} of shape {list(shape)}, but here it has {list(found)}; apply it to an unpruned "
                "model of the same architecture"
            )
    for name in plan.new_biases:
        path, _, local_name = name.rpartition(".")
        if model.get_submodule(path)._parameters.get(local_name) is not None:
            raise StateError(f"the plan adds {name!r}, which is there already; apply it to an unpruned model")


@torch.no_grad()
def carry_out(model: nn.Module, plan: ChannelPlan, optimizers: Sequence[Optimizer] = ()) -> None:
    """Cut ``model`` in place, and the state of the optimizers that hold its parameters.

    Raises:
        StateError: the plan does not fit the model, or a parameter that would be replaced has hooks.
        OptimizerError: an optimizer keeps something that cannot be cut along, or takes no bias.
    """
    check_fits(model, plan)
    if plan.empty:
        return
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    named = {id(tensor): name for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    new = {name: _cut_parameter(tensors[name], plan, name) for name in plan.kept.keys() | plan.moved.keys() if name in tensors}
    _check_hooks([tensors[name] for name in new], named)
    added = _new_biases(model, plan)
    following = OptimizersFollow(optimizers, Cut(plan, named, shapes, new, added))
    for module in model.modules():
        every: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in every:
            for local_name, tensor in list(slots.items()):
                name = named.get(id(tensor), "") if tensor is not None else ""
                if name in new:
                    slots[local_name] = new[name]
                    _cut_record(module, local_name, plan.kept.get(name, {}))
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # its own list of its parameters
    for name, bias in added.items():
        path, _, local_name = name.rpartition(".")
        model.get_submodule(path)._parameters[local_name] = bias
    for attribute in plan.attributes:
        module = model.get_submodule(attribute.module)
        # In a file lists and tuples are the same.
        was_list = isinstance(getattr(module, attribute.name, None), list)
        setattr(module, attribute.name, list(attribute.after) if was_list else attribute.after)
    _refresh_records(model)
    following.carry_out()


def _check_hooks(replaced: Sequence[Tensor], named: Mapping[int, str]) -> None:
    """Hooks hold what they were written for, often the parameter or its shape: no other parameter can take them over."""
    hooked = [named[id(tensor)] for tensor in replaced if any(not is_watch(hook) for hook in _hooks_of(tensor))]
    if hooked:
        shown = ", ".join(sorted(hooked)[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
        raise StateError(
            f"{shown} would be replaced by smaller parameters, and {'has' if len(hooked) == 1 else 'have'} hooks "
            "(register_hook or register_post_accumulate_grad_hook), which would be lost. Remove them, prune, and register them "
            "on the new parameters"
        )


def _hooks_of(tensor: Tensor) -> list[Any]:
    every = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return [hook for hooks in every for hook in (hooks or {}).values()]


def _cut_parameter(tensor: Tensor, plan: ChannelPlan, name: str) -> Tensor:
    axes = plan.kept.get(name, {})
    layout = _CHANNELS_LAST.get(tensor.dim())
    if layout is not None and not tensor.is_contiguous(memory_format=layout):
        layout = None
    data = cut(tensor.detach(), axes)
    data = data.clone() if data.data_ptr() == tensor.data_ptr() else data
    if name in plan.moved:
        positions, values = plan.moved[name]
        exact = data.double().flatten()
        exact.index_add_(0, positions.to(data.device), values.to(data.device))
        data = exact.view(data.shape).to(data.dtype)
    if layout is not None and not tensor.is_contiguous():
        data = data.contiguous(memory_format=layout)
    if not isinstance(tensor, nn.Parameter):
        return data
    made = nn.Parameter(data, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    if tensor.grad is not None:
        made.grad = cut(tensor.grad, axes)
    return made


def _cut_record(module: nn.Module, local_name: str, axes: Mapping[int, Tensor]) -> None:
    record = records_of(module).get(local_name)
    if record is None:
        return
    dormant = record.dormant
    record.mask = cut(record.mask, axes)
    if dormant is not None:
        record.compact = compact_of(cut(dormant, axes), record.mask)
    record.threshold = None
    record.warning = None
    record.coupled = None  # with channels that are no more


def _refresh_records(model: nn.Module) -> None:
    """Bring what is remembered of a sparsified model to the new shapes."""
    for module, remembered in model_records(model):
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}
        remembered.layers = tuple(
            replace(layer, shape=shapes[layer.parameter], flops=_scaled(layer.flops, layer.shape, shapes[layer.parameter]))
            if layer.parameter in shapes
            else layer
            for layer in remembered.layers
        )
    watch(model)


def _scaled(flops: int | None, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    return None if flops is None else flops * math.prod(after) // max(1, math.prod(before))


def _new_biases(model: nn.Module, plan: ChannelPlan) -> dict[str, nn.Parameter]:
    added: dict[str, nn.Parameter] = {}
    for name in plan.new_biases:
        weight = model.get_submodule(name.rpartition(".")[0])._parameters["weight"]
        assert weight is not None
        _, values = plan.moved[name]
        added[name] = nn.Parameter(values.to(dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad)
    return added
