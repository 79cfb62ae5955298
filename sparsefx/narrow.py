"""SMALL: the dense baseline of a sparse model, the same network with narrower layers and as many parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from sparsefx.algorithms.options import expect_share
from sparsefx.api import finalize
from sparsefx.capture.arguments import split_arguments
from sparsefx.errors import CaptureError, EligibilityError, OptionError, VerificationError
from sparsefx.layers import known_weights
from sparsefx.model_record import has_records
from sparsefx.narrow_modules import has_rows, heads_of, stand_in, with_attributes
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.pruning import apply_channel_plan, channel_plan
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_parameter import sparse_parameters

Model = TypeVar("Model", bound=nn.Module)
_WITH_ROWS = ("linear", "addmm", "multi_head_attention_forward")
# Plans that are made on the way to the one that fits; each is a capture of the model.
_TRIALS = 8
# Difference of factors that no width tells apart.
_FINEST = 1e-4
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

    Transformers become narrower in their residual stream, their attention and their feed-forward blocks, with as many heads as
    before in an nn.MultiheadAttention. Where code of the model holds a width or a number of heads, that stays, and the others
    become so much narrower; a bare encoder, which is given its width from outside, narrows its feed-forward blocks alone.

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
    """A cut to about ``density`` times the parameters that the model runs with; None where nothing has to go."""
    total = sum(parameter.numel() for parameter in model.parameters())
    target = density * total
    if total - target <= tolerance * target:
        return None
    if has_rows(model):
        try:
            plan = with_attributes(model, _nearest_plan(model, target, example_inputs, tolerance, rows=True))
            _run(apply_channel_plan(model, plan), example_inputs)
            return plan
        except (CaptureError, EligibilityError, VerificationError) as error:
            refusal = error
        try:  # without narrower rows
            return _nearest_plan(model, target, example_inputs, tolerance, rows=False)
        except EligibilityError:
            raise refusal from None
    return _nearest_plan(model, target, example_inputs, tolerance, rows=False)


@torch.no_grad()
def _run(small: nn.Module, example_inputs: Any) -> None:
    """Raise EligibilityError where a narrower model does not run."""
    args, kwargs = split_arguments(example_inputs)
    training = small.training
    try:
        small.eval()(*args, **kwargs)
    except Exception as error:  # whatever the model's own code raises
        raise EligibilityError(
            f"{type(small).__name__} does not run with narrower layers ({type(error).__name__}: {str(error)[:200]}), since its "
            "code holds their widths; build a narrower model by its own options"
        ) from error
    finally:
        small.train(training)


def _nearest_plan(model: nn.Module, target: float, example_inputs: Any, tolerance: float, *, rows: bool) -> ChannelPlan:
    """A cut to about ``target`` parameters; with ``rows``, of modules that compute with whole rows too."""
    total = sum(parameter.numel() for parameter in model.parameters())
    # Products of two widths are what most parameters are.
    factor, best, best_count, best_factor = math.sqrt(target / total), None, total, 1.0
    heads, held = heads_of(model) if rows else {}, dict[int, int]()
    for turn in range(2 if heads else 1):
        if turn:
            # Widths of attention go in steps of the number of heads; what they miss by is left to the others.
            held = {size: _width(size, True, best_factor, heads, {}) for size in heads}
        low, high = 0.0, 1.0
        for _ in range(_TRIALS):
            trial = _with_unread_channels(model, partial(_width, factor=factor, heads=heads, held=held))
            if rows:
                stand_in(trial)
            plan = _of_channels(model, channel_plan(trial, example_inputs, multiple=1))
            count = _count(model, _sizes(plan))
            if best is None or abs(count - target) < abs(best_count - target):
                best, best_count, best_factor = plan, count, factor
            if abs(count - target) <= tolerance * target / 10:
                return plan
            low, high = (factor, high) if count < target else (low, factor)
            factor = _next_factor(model, plan, factor, target, held)
            # Counts go in steps, over which a straight line can jump to and fro.
            if not low < factor < high:
                factor = (low + high) / 2
            if high - low < _FINEST:
                break
        if best is not None and abs(best_count - target) <= tolerance * target:
            return best
    assert best is not None
    pinned = [*sorted({row.pinned for row in best.report.layers if row.pinned}), *best.report.refused]
    raise EligibilityError(
        f"{type(model).__name__} was to have {target:.0f} of its {total} parameters, but with narrower layers it comes to "
        f"{best_count} at the nearest. Widths that stay: {'; '.join(pinned[:4]) or 'those of its inputs and outputs'}. "
        "Ask for a larger density or tolerance, or build a narrower model by its own options"
    )


def _of_channels(model: nn.Module, plan: ChannelPlan) -> ChannelPlan:
    """The plan with shapes alone: no constants that the trial's channels would leave behind, and no places that the example
    inputs did not reach, as positions behind the end of a short text are."""
    layers = {id(module._parameters.get(known.local_name)) for module in model.modules() for known in known_weights(module)}
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for name, axes in plan.kept.items():
        tensor = tensors[name]
        looked_up = tensor.dim() > 1 and id(tensor) not in layers
        left = {axis: indices for axis, indices in axes.items() if not looked_up or axis == tensor.dim() - 1}
        if left and tensor.is_floating_point():
            kept[name] = left
    return replace(plan, kept=kept, moved={}, new_biases={})


@torch.no_grad()
def _with_unread_channels(model: nn.Module, width: Callable[[int, bool], int]) -> nn.Module:
    """A copy with weights for which all but the first channels of each layer are zero whatever the inputs are; ``width`` gives
    their number, of the channels that there are and whether they may be those of a residual stream.

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
    layers: set[int] = set()
    for module in trial.modules():
        for known in known_weights(module):
            weight = module._parameters.get(known.local_name)
            if weight is None:
                continue
            layers.add(id(weight))
            if known.op in _WITH_ROWS or known.op.startswith("conv"):
                outputs = weight.movedim(0 if known.reduction_axis else 1, 0)
                # Queries, keys and values in one layer lose as many each; or it is a hidden layer three times as wide.
                parts = 3 if weight.dim() == 2 and outputs.shape[0] == 3 * outputs.shape[1] else 1
                for part in outputs.chunk(parts):
                    part[width(len(part), parts == 1 or known.op != "linear") :] = 0
    for parameter in trial.parameters():
        if parameter.dim() > 1 and id(parameter) not in layers:  # what is looked up or added: embeddings, positions, tokens
            parameter[..., width(parameter.shape[-1], True) :] = 0
    return trial


def _width(channels: int, coupled: bool, factor: float, heads: Mapping[int, int], held: Mapping[int, int]) -> int:
    """How many channels stay: those held, a multiple of the number of heads, or what the factor says."""
    if coupled and channels in held:
        return held[channels]
    step = heads.get(channels, 1) if coupled else 1
    return max(1, round(channels * factor / step)) * step


def _sizes(plan: ChannelPlan) -> dict[str, dict[int, int]]:
    """Size after the cut, by parameter and axis."""
    return {name: {axis: int(kept.shape[-1]) for axis, kept in axes.items()} for name, axes in plan.kept.items()}


def _count(model: nn.Module, kept: Mapping[str, Mapping[int, int]]) -> int:
    """Parameters after a cut to these sizes of axes."""
    return sum(
        math.prod(kept.get(name, {}).get(axis, size) for axis, size in enumerate(parameter.shape))
        for name, parameter in model.named_parameters()
    )


def _next_factor(model: nn.Module, plan: ChannelPlan, factor: float, target: float, held: Mapping[int, int]) -> float:
    """The factor that would hit the target if every axis that was cut, and whose width is not held, went on in proportion."""
    cut = _sizes(plan)

    def scaled(before: int, size: int, other: float) -> int:
        return size if before in held else max(1, min(before, round(size * other / factor)))

    def predicted(other: float) -> int:
        return _count(
            model,
            {
                name: {axis: scaled(plan.shapes[name][axis], size, other) for axis, size in axes.items()}
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
