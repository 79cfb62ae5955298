"""SMALL: the dense baseline of a sparse model, the same network with narrower layers and as many parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from sparsefx.algorithms.options import expect_share
from sparsefx.api import finalize
from sparsefx.errors import EligibilityError, OptionError
from sparsefx.layers import known_weights
from sparsefx.model_record import has_records
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.pruning import apply_channel_plan, channel_plan
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_parameter import sparse_parameters

Model = TypeVar("Model", bound=nn.Module)
# Plans that are made on the way to the one that fits; each is a capture of the model.
_TRIALS = 8
_SEED = 0


def small_baseline(
    model: Model,
    density: float | None,
    example_inputs: Any,
    *,
    tolerance: float = 0.05,
    fresh: bool | Callable[[nn.Module], object] = True,
    seed: int = 0,
) -> Model:
    """The same network with all layer widths reduced by one factor, so that it has ``density`` times the parameters.

    It is the SMALL of "Advances in Sparse Neural Model Training": what a sparse model is to be compared with. Widths are cut by
    the surgery of `prune_channels`: channels that residual connections, concatenations and groups tie together stay tied, and
    widths that the model's inputs, outputs or code dictate stay as they are. The given model is untouched.

    What has to stay can be much: a LayerNorm holds the width of a transformer's residual stream, and nn.MultiheadAttention its
    own, so that there only the hidden layers of the feed-forward blocks become narrower.

    Args:
        model: any module that torch.export takes.
        density: parameters of the result as a share of the model's. None, for a sparsified model: the share that it uses, its
            participating weights and all that is dense.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a pair of both.
        tolerance: how far the number of parameters may be off, as a share of the number asked for.
        fresh: True gives every module with a ``reset_parameters`` new random weights; a function is called with the result, to
            initialise it as the model was. False keeps what the channels that stay hold, which is of use only where the model is
            at its start; its outputs are others in any case.
        seed: of the new weights, which change nothing in the global random state.

    Returns:
        A dense model of the same class, in the same mode.

    Raises:
        EligibilityError: widths cannot be reduced that far.
        OptionError: a number out of range.
        And what `channel_plan` raises.
    """
    refuse_distributed(model, "small_baseline")
    if density is None:
        density = _used(model)
    expect_share("density", density)
    expect_share("tolerance", tolerance)
    if density == 0:
        raise OptionError("density=0 was given; expected a share of the model's parameters above 0")
    dense = copy.deepcopy(model)
    if has_records(dense):
        finalize(dense)
    for parameter in dense.parameters():
        parameter.grad = None
    plan = _plan(dense, density, example_inputs, tolerance)
    small = dense if plan is None else apply_channel_plan(dense, plan)
    if callable(fresh):
        with _seeded(seed):
            fresh(small)
    elif fresh:
        with _seeded(seed):
            _reset(small)
    return small


def _plan(model: nn.Module, density: float, example_inputs: Any, tolerance: float) -> ChannelPlan | None:
    """A cut to about ``density`` times the parameters; None where nothing has to go."""
    total = sum(parameter.numel() for parameter in model.parameters())
    target = density * total
    if total - target <= tolerance * target:
        return None
    # Products of two widths are what most parameters are.
    factor, best, best_count = math.sqrt(density), None, total
    tried: set[float] = set()
    for _ in range(_TRIALS):
        if factor in tried:
            break
        tried.add(factor)
        plan = channel_plan(_with_unread_channels(model, factor), example_inputs, multiple=1)
        # Only shapes count here: what constants the trial's channels would leave behind does not.
        plan = replace(plan, moved={}, new_biases={})
        count = _count(model, _sizes(plan))
        if best is None or abs(count - target) < abs(best_count - target):
            best, best_count = plan, count
        if abs(count - target) <= tolerance * target / 10:
            break
        factor = _next_factor(model, plan, factor, target)
    assert best is not None
    if abs(best_count - target) > tolerance * target:
        pinned = sorted({row.pinned for row in best.report.layers if row.pinned})
        raise EligibilityError(
            f"{type(model).__name__} was to have {target:.0f} of its {total} parameters, but with narrower layers it comes to "
            f"{best_count} at the nearest. Widths that stay: {'; '.join(pinned[:4]) or 'none, but they are small already'}. "
            "Ask for a larger density or tolerance, or build a narrower model by its own options"
        )
    return best


@torch.no_grad()
def _with_unread_channels(model: nn.Module, factor: float) -> nn.Module:
    """A copy with weights for which all but the first channels of each layer are zero whatever the inputs are.

    Other weights become random, lest channels go because they start at zero (the last norm of a residual block, say).
    """
    trial = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in trial.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel()))
        else:
            # Without biases a channel of zeros stays one through norms and most functions.
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for module in trial.modules():
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            buffer = module._buffers.get(name)
            if buffer is not None:
                buffer.fill_(value)
    for module in trial.modules():
        for known in known_weights(module):
            weight = module._parameters.get(known.local_name)
            if weight is not None and (known.op == "linear" or known.op.startswith("conv")):
                rows = weight.movedim(0 if known.reduction_axis else 1, 0)
                rows[_width(len(rows), factor) :] = 0
    return trial


def _width(channels: int, factor: float) -> int:
    return max(1, round(channels * factor))


def _sizes(plan: ChannelPlan) -> dict[str, dict[int, int]]:
    """Size after the cut, by parameter and axis."""
    return {name: {axis: int(kept.shape[-1]) for axis, kept in axes.items()} for name, axes in plan.kept.items()}


def _count(model: nn.Module, kept: Mapping[str, Mapping[int, int]]) -> int:
    """Parameters after a cut to these sizes of axes."""
    return sum(
        math.prod(kept.get(name, {}).get(axis, size) for axis, size in enumerate(parameter.shape))
        for name, parameter in model.named_parameters()
    )


def _next_factor(model: nn.Module, plan: ChannelPlan, factor: float, target: float) -> float:
    """The factor that would hit the target if every axis that was cut went on in proportion."""
    cut = _sizes(plan)

    def predicted(other: float) -> int:
        return _count(
            model,
            {
                name: {axis: max(1, min(plan.shapes[name][axis], round(size * other / factor))) for axis, size in axes.items()}
                for name, axes in cut.items()
            },
        )

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) < target else (low, middle)
    return high if cut else factor / 2


def _used(model: nn.Module) -> float:
    """The share of its parameters that a sparsified model uses."""
    masked = {id(parameter): int(record.mask.sum()) for _, parameter, record in sparse_parameters(model)}
    if not masked:
        raise OptionError("small_baseline was given density=None and a model that is not sparsified; give a density")
    sizes = [(parameter.numel(), masked.get(id(parameter), parameter.numel())) for parameter in model.parameters()]
    return sum(used for _, used in sizes) / sum(size for size, _ in sizes)


def _reset(model: nn.Module) -> None:
    """New weights for every module that can make them; parents come last, since some set their children's."""
    for module in reversed(list(model.modules())):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random state under a seed, for code that draws from nothing else; as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
