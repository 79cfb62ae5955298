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
from sparsefx.errors import OptimizerError, StateError
from sparsefx.model_record import model_records, watch
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.sparse_parameter import records_of


def cut(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """What stays of a tensor.

    Args:
        tensor: of the shape before.
        axes: indices by axis; for the input axis of a grouped convolution one row of indices for each group that stays.
    """
    for axis, indices in sorted(axes.items()):
        indices = indices.to(tensor.device)
        if indices.dim() == 1:
            tensor = tensor.index_select(axis, indices)
        else:
            # Outputs were cut before: each group has equally many left, and takes inputs of its own.
            by_row = indices.repeat_interleave(tensor.shape[0] // len(indices), dim=0)
            by_row = by_row.view(*by_row.shape, *(1,) * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            tensor = tensor.gather(axis, by_row)
    return tensor


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
        StateError: the plan does not fit the model.
        OptimizerError: the optimizer's state of a parameter cannot be cut with it.
    """
    check_fits(model, plan)
    if plan.empty:
        return
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    named = {id(tensor): name for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    new = {name: _cut_parameter(tensors[name], plan, name) for name in plan.kept.keys() | plan.moved.keys() if name in tensors}
    for optimizer in optimizers:
        _check_state(optimizer, named, plan, shapes)
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
    added = _add_biases(model, plan)
    for attribute in plan.attributes:
        module = model.get_submodule(attribute.module)
        # In a file lists and tuples are the same.
        was_list = isinstance(getattr(module, attribute.name, None), list)
        setattr(module, attribute.name, list(attribute.after) if was_list else attribute.after)
    _refresh_records(model)
    for optimizer in optimizers:
        _follow(optimizer, named, new, added, plan)


def _cut_parameter(tensor: Tensor, plan: ChannelPlan, name: str) -> Tensor:
    axes = plan.kept.get(name, {})
    layout = torch.channels_last if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) else None
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


def _add_biases(model: nn.Module, plan: ChannelPlan) -> dict[str, nn.Parameter]:
    added: dict[str, nn.Parameter] = {}
    for name in plan.new_biases:
        path, _, local_name = name.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters["weight"]
        assert weight is not None
        _, values = plan.moved[name]
        bias = nn.Parameter(values.to(dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad)
        module._parameters[local_name] = bias
        added[name] = bias
    return added


def _check_state(
    optimizer: Optimizer, named: Mapping[int, str], plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for parameter, state in optimizer.state.items():
        name = named.get(id(parameter), "")
        if name not in plan.kept:
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) != shapes[name]:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for {name!r} of shape "
                    f"{list(shapes[name])}: it cannot be cut along. Prune without the optimizer, and make a new one"
                )


def _follow(
    optimizer: Optimizer,
    named: Mapping[int, str],
    new: Mapping[str, Tensor],
    added: Mapping[str, nn.Parameter],
    plan: ChannelPlan,
) -> None:
    """Put the cut parameters in the place of the old ones; an added bias joins the group of its weight."""
    biases = {name.rpartition(".")[0]: bias for name, bias in added.items()}
    state: dict[Any, Any] = dict(optimizer.state)
    for group in optimizer.param_groups:
        followed: list[Any] = []
        for parameter in group["params"]:
            name = named.get(id(parameter), "")
            replacement = new.get(name, parameter)
            if replacement is not parameter:
                old = state.pop(parameter, None)
                if old is not None:
                    optimizer.state.pop(parameter)
                    axes = plan.kept.get(name, {})
                    optimizer.state[replacement] = {
                        key: cut(value, axes) if isinstance(value, Tensor) and value.dim() > 0 else value
                        for key, value in old.items()
                    }
            followed.append(replacement)
            path, _, local_name = name.rpartition(".")
            if local_name == "weight" and path in biases:
                followed.append(biases[path])
        group["params"] = followed
