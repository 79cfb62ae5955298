"""Removal of empty channels: a smaller model of the same class, with the same outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsefx.capture.arguments import split_arguments
from sparsefx.capture.model_copy import copy_model
from sparsefx.errors import NonFiniteError, OptionError, StateError
from sparsefx.passes.channels.compose import compose
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.surgery import carry_out, check_fits
from sparsefx.passes.prune_channels import ChannelPlanner
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_parameter import sparse_parameters

Model = TypeVar("Model", bound=nn.Module)
_KEY = "_sparsefx_channel_plan"


def channel_plan(
    model: nn.Module, example_inputs: Any, *, multiple: int | str = "auto", trains: bool = False, seed: int = 0
) -> ChannelPlan:
    """Which channels of ``model`` can go without a change of its outputs. Nothing is changed.

    A channel can go where it is constant whatever the inputs are, or where everything that reads it has zero weights for it; a
    channel is everything that has to go with it, through residual connections, concatenations, reshapes and shared weights.
    Constants go into the bias or the running mean behind the next layer, or, where padding stands in the way, ride on one
    constant channel that stays. In a model that sparsefx made sparse a weight counts as what it holds at rest: the values that
    participate; dormant ones go with their channels.

    The plan is checked before it is handed out: carried out on a float64 copy, outputs on the example inputs and on random ones
    are compared with the unpruned model's in eval mode.

    Args:
        model: any module that torch.export takes.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a pair of both.
        multiple: widths are rounded up to multiples of this where a layer has enough channels: time falls in steps. ``"auto"`` is
            16 with AVX-512 and on CUDA, else 8; 1 removes all it can.
        trains: count only constants on which train and eval mode agree, so that the next training step gives the same loss.
        seed: of the random inputs.

    Returns:
        The plan; ``plan.report`` has the widths, and why channels had to stay.

    Raises:
        CaptureError: torch.export refuses the model.
        VerificationError: the model does not run in float64; or outputs differ, which is a bug in sparsefx.
        StateError: the model is on the meta device, or sharded among processes, or holds what cannot be copied.
        NonFiniteError: a weight holds NaN or infinity.
        OptionError: ``multiple`` is neither "auto" nor a positive number.
    """
    _expect(model, "channel_plan", multiple)
    args, kwargs = split_arguments(example_inputs)
    with _progress() as tell:
        planner = ChannelPlanner(model, args, kwargs, multiple=multiple, trains=trains, seed=seed, progress=tell)
        return planner.plan()


def prune_channels(model: Model, example_inputs: Any, *, multiple: int | str = "auto", seed: int = 0) -> Model:
    """A copy of ``model`` without its empty channels, with the same outputs in eval mode. The given model is untouched.

    The copy has the same class, the same parameter names (biases may be added, `channel_plan_of` lists them), masks if
    it had masks, and can be trained, exported and saved. Its state_dict loads into ``apply_channel_plan(fresh_model, plan)``.

    Args and Raises: as for `channel_plan`.
    """
    plan = channel_plan(model, example_inputs, multiple=multiple, seed=seed)
    return _applied(model, plan)


def apply_channel_plan(model: Model, plan: ChannelPlan) -> Model:
    """A copy of ``model`` that is cut as the plan says. The given model is untouched.

    With the weights that the plan was made for it gives the outputs of the unpruned model. A fresh model of the same architecture
    gets the same shapes: load the state_dict of the pruned model into it.

    Raises:
        StateError: the plan does not fit the model, or the model is sharded among processes, or it was pruned before and
            changed by hand since.
    """
    _expect(model, "apply_channel_plan")
    return _applied(model, plan)


def _applied(model: Model, plan: ChannelPlan) -> Model:
    whole = _whole_plan(model, plan)
    pruned = copy_model(model)
    carry_out(pruned, plan)
    pruned.__dict__[_KEY] = whole
    return pruned


def prune_channels_(
    model: nn.Module,
    example_inputs: Any,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    *,
    multiple: int | str = "auto",
    seed: int = 0,
) -> ChannelPlan:
    """Remove empty channels in place, from the state of the optimizers too, so that training goes on with the smaller model.

    With an optimizer only constants on which train and eval mode agree are removed: batch norm in train mode turns a constant
    channel into its shift whatever the running statistics are. The loss of the next step is that of the unpruned model. All or
    nothing: on failure model and optimizers are as before.

    Args:
        model: as for `channel_plan`. Its parameters are replaced: what else holds them (EMA copies, DDP) has to be made again.
        example_inputs: as for `channel_plan`.
        optimizer: one or several that hold the parameters; parameters and their state are cut and stay in their groups. A bias
            that is added joins the group of its weight where that has vectors too, else the nearest group with vectors.
        multiple, seed: as for `channel_plan`.

    Returns:
        The plan that was carried out.

    Raises:
        StateError: a MaskRuntime follows the model; detach it first, and attach it again afterwards. Or the model was pruned
            before and changed by hand since. Or a parameter that would be replaced has hooks.
        OptimizerError: an optimizer keeps state that cannot be cut along, or lists of parameters beside its groups; or a bias has
            to be added that it does not take.
        And what `channel_plan` raises.
    """
    _expect(model, "prune_channels_", multiple)
    for name, _, record in sparse_parameters(model):
        if record.merged or (record.runtime is not None and record.runtime() is not None):
            raise StateError(
                f"prune_channels_ was given a model whose {name} is followed by a MaskRuntime; call runtime.detach(), prune, and "
                "attach again"
            )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    plan = channel_plan(model, example_inputs, multiple=multiple, trains=bool(optimizers), seed=seed)
    whole = _whole_plan(model, plan)
    carry_out(model, plan, optimizers)
    model.__dict__[_KEY] = whole
    return plan


def channel_plan_of(model: nn.Module) -> ChannelPlan:
    """The plan that a pruned model was cut by.

    Of a model that was pruned several times it is one plan for all of it, from the model before the first time; its report is
    that of the last time that anything was cut.

    Raises:
        StateError: the model was not pruned by sparsefx.
    """
    plan = model.__dict__.get(_KEY)
    if not isinstance(plan, ChannelPlan):
        raise StateError(f"{type(model).__name__} was not pruned by sparsefx.prune_channels; there is no plan of its channels")
    return plan


def _whole_plan(model: nn.Module, plan: ChannelPlan) -> ChannelPlan:
    """The plan that leads from the unpruned model to what this one will be once ``plan`` is carried out on it."""
    check_fits(model, plan)
    before = model.__dict__.get(_KEY)
    if not isinstance(before, ChannelPlan):
        return plan
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return compose(before, plan, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def _expect(model: object, caller: str, multiple: int | str = "auto") -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"{caller} was given a {type(model).__name__}; expected a torch.nn.Module")
    whole = isinstance(multiple, int) and not isinstance(multiple, bool) and multiple >= 1
    if not whole and multiple != "auto":
        raise OptionError(f"multiple={multiple!r} was given to {caller}; expected 'auto' or a positive number such as 16")
    refuse_distributed(model, caller)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter) or parameter.device.type == "meta":
            raise StateError(f"{caller} was given a model whose {name} has no values; load weights before pruning")
        if parameter.is_floating_point() and not _is_finite(parameter.detach()):
            raise NonFiniteError(f"{name}: the weight holds NaN or infinity; expected finite values. Load a good checkpoint")


def _is_finite(tensor: Tensor) -> bool:
    # A sum with a NaN or an infinity in it is none of the finite numbers; it is found much faster, but may overflow by itself.
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # formats of 8 bits know no sum
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


@contextmanager
def _progress() -> Iterator[Any]:
    """Tells on stderr what is being done, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda told: None
        return
    with console.status("pruning channels") as status:
        yield lambda told: status.update(f"pruning channels: {told}")
