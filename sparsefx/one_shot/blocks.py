"""Choose the masks of a pretrained model block by block, from calibration batches.

Blocks are taken in the order in which the model runs them. Each is looked at with the blocks before it sparse already, so that it
can make up for their errors, and the statistics of one block are in memory at a time. A block is an element of a ModuleList
or Sequential; what stands outside of one is a block of its own. The original weights wait in a file, for the case of a failure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sparsefx.capture.arguments import describe_arguments, split_arguments
from sparsefx.errors import CaptureError, NonFiniteError, OptionError
from sparsefx.one_shot.base import OneShotMethod
from sparsefx.one_shot.layout import Call, from_matrices, inputs_of, pattern_of_matrices, to_matrices
from sparsefx.one_shot.observe import Inputs, Stop, run
from sparsefx.one_shot.originals import Originals
from sparsefx.patterns import Pattern


@dataclass(frozen=True)
class Solution:
    """What was found; the model's weights hold it already.

    Attributes:
        masks: in the order of the names that were given; none where none were to be kept.
        undo: puts the weights back as they were, from the disk.
    """

    masks: list[Tensor]
    undo: Callable[[], None]


def solve(
    model: nn.Module,
    names: Sequence[str],
    *,
    pattern: Pattern,
    density: float,
    method: OneShotMethod,
    calibration: Iterable[Any] | None,
    keep_masks: bool = True,
) -> Solution:
    """Mask the named parameters of ``model``, in place, all or nothing.

    In memory at a time, beside the model and the masks: the statistics of one block's inputs, and what solving one layer takes.

    Args:
        model: runs in eval mode; buffers, modes and random generators stay as they are.
        names: full names of the parameters to mask.
        pattern: which masks are allowed.
        density: share of weights that participate.
        method: chooses each layer's mask.
        calibration: batches: a tensor, a tuple of arguments, a dict of keyword arguments or a pair of both. Positional values
            that the model's forward does not take, such as labels, are left out.
        keep_masks: whether masks are wanted, at a byte a weight; the zeros in the weights are there in any case.

    Raises:
        OptionError: no calibration batches, a pattern that the method cannot choose, or no room on the disk for the originals.
        CaptureError: the model does not run on a batch, or a weight is read in a way that cannot be watched.
        NonFiniteError: inputs of a layer hold NaN or infinity.
    """
    reason = method.refusal(pattern)
    if reason is not None:
        raise OptionError(f"algorithm {method.name!r} cannot be used with pattern {pattern.name!r}: {reason}")
    batches = _batches(model, calibration, method.name)
    parameters = {name: model.get_parameter(name) for name in names}
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    order = _order_of_calls(model, batches[0], by_id)
    unseen = [name for name in names if name not in order]
    if unseen:
        raise CaptureError(
            f"{', '.join(unseen[:3])}: no matrix product or convolution was seen to read {'it' if len(unseen) == 1 else 'them'} "
            f"directly on the first calibration batch, so {method.name} cannot look at the inputs; exclude={unseen[:3]!r}, or "
            f"use algorithm='static'"
        )
    originals = Originals()

    def undo() -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                originals.restore(name, parameter)

    masks: dict[str, Tensor] = {}
    try:
        blocks = _blocks(model, list(dict.fromkeys(order)))
        console = Console(stderr=True)
        for block in track(blocks, f"{method.name}", console=console, transient=True, disable=not console.is_terminal):
            statistics, calls = _look(model, batches, block, order, by_id, method)
            for name in block:
                originals.keep(name, parameters[name])
                mask = _mask(name, parameters[name], calls[name], statistics.pop(name), pattern, density, method)
                if keep_masks:
                    masks[name] = mask
    except BaseException:
        undo()
        raise
    return Solution([masks[name] for name in names if name in masks], undo)


def _batches(model: nn.Module, calibration: Iterable[Any] | None, method: str) -> list[Inputs]:
    if calibration is None or isinstance(calibration, (Tensor, dict, str)) or not isinstance(calibration, Iterable):
        raise OptionError(
            f"algorithm {method!r} was given calibration={type(calibration).__name__}; expected batches, such as a DataLoader or "
            f"a list of inputs"
        )
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    kinds = [parameter.kind for parameter in parameters]
    limited = bool(kinds) and inspect.Parameter.VAR_POSITIONAL not in kinds
    positional = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    found = []
    for batch in calibration:
        args, kwargs = split_arguments(tuple(batch) if type(batch) is list else batch)
        found.append((args[:positional] if limited else args, kwargs))
    if not found:
        raise OptionError(f"calibration held no batch; {method} needs at least one, and works better with a hundred samples")
    return found


def _order_of_calls(model: nn.Module, inputs: Inputs, by_id: dict[int, str]) -> list[str]:
    """The weights in the order of all their calls."""
    order: list[str] = []
    _run(model, inputs, by_id, lambda name, call: order.append(name))
    return order


def _blocks(model: nn.Module, order: list[str]) -> list[list[str]]:
    """The weights together that stand in the same element of a list of modules, in order of the first call of each."""
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for name in order:
        parts = name.split(".")
        inside = [
            ".".join(parts[: depth + 1])
            for depth in range(1, len(parts) - 1)
            if isinstance(modules.get(".".join(parts[:depth])), (nn.ModuleList, nn.Sequential))
        ]
        if len(parts) > 2 and isinstance(model, (nn.ModuleList, nn.Sequential)):
            inside = [parts[0]]
        found.setdefault(inside[0] if inside else name, []).append(name)
    return list(found.values())


def _look(
    model: nn.Module, batches: list[Inputs], block: list[str], order: list[str], by_id: dict[int, str], method: OneShotMethod
) -> tuple[dict[str, list[Tensor]], dict[str, Call]]:
    """The statistics of a block's inputs, one for each group of a convolution, and a call of each weight."""
    last = max(place for place, name in enumerate(order) if name in block)
    # A run may stop where a weight is read that is read only after the whole block.
    after = set(order[last + 1 :]) - set(order[: last + 1])
    statistics: dict[str, list[Tensor]] = {}
    calls: dict[str, Call] = {}

    def see(name: str, call: Call) -> None:
        if name in after:
            raise Stop
        if name not in block:
            return
        for inputs in inputs_of(call):
            if name not in statistics:
                statistics[name] = [method.empty(inputs.shape[2], call.weight) for _ in range(call.groups)]
            for statistic, part in zip(statistics[name], inputs, strict=True):
                method.add(statistic, part)
        if name not in calls:
            calls[name] = replace(call, input=call.input.new_empty(0))  # the inputs are not looked at any more

    for inputs in batches:
        _run(model, inputs, by_id, see)
    return statistics, calls


def _mask(
    name: str,
    parameter: nn.Parameter,
    call: Call,
    statistics: list[Tensor],
    pattern: Pattern,
    density: float,
    method: OneShotMethod,
) -> Tensor:
    """Solve one layer, write its weights, and give its mask in the parameter's shape."""
    if not all(bool(torch.isfinite(statistic).all()) for statistic in statistics):
        raise NonFiniteError(f"{name}: its inputs on the calibration batches hold NaN or infinity; expected finite values")
    with torch.no_grad():
        matrices = to_matrices(parameter.detach(), call)
        allowed = pattern_of_matrices(pattern, call)
        solved = [
            method.solve(matrix, statistic, allowed, density) for matrix, statistic in zip(matrices, statistics, strict=True)
        ]
        parameter.detach().copy_(from_matrices(torch.stack([weight for weight, _ in solved]), parameter, call))
        return from_matrices(torch.stack([mask for _, mask in solved]), parameter, call).contiguous()


def _run(model: nn.Module, inputs: Inputs, by_id: dict[int, str], see: Callable[[str, Call], None]) -> None:
    try:
        run(model, inputs, by_id, see)
    except Exception as error:
        raise CaptureError(
            f"the model does not run on the calibration batch {describe_arguments(*inputs)}: {type(error).__name__}: {error}; "
            f"give batches that model(*args, **kwargs) accepts in eval mode"
        ) from error
