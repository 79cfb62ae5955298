"""Channel permutation across a network: an order of channels in which 2:4 keeps more of the weights, with the same outputs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from sparsefx.capture.arguments import split_arguments
from sparsefx.errors import OptionError, StateError
from sparsefx.passes.analyze_eligibility import analyze
from sparsefx.passes.eligibility import Eligibility
from sparsefx.passes.permute_channels import ChannelOrder, order_channels
from sparsefx.patterns import NOfM
from sparsefx.permutation import search_permutation
from sparsefx.pruning import apply_channel_plan
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_parameter import sparse_parameters

Model = TypeVar("Model", bound=nn.Module)


def channel_order(
    model: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 60.0,
    moves: int | None = None,
    include: Any = None,
    exclude: Any = None,
    seed: int = 0,
) -> ChannelOrder:
    """Find an order of the channels of ``model`` in which 2:4 keeps more magnitude. Nothing is changed.

    Each set of channels that may change places (hidden units of a block, a residual stream, channels of a head or of a group
    of a convolution) is ordered by `search_permutation` for all weights that sum over it. The result is compared with the model
    in float64, in eval mode, before it is handed out; orders that change an output are left out and told. Layers that only run in
    train mode get the order too; layers that ``forward`` runs in neither mode (say, of a method of their own) are not looked at.

    Args:
        model: a dense model that torch.export takes, say a pretrained one, before `sparsify`.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a pair of both.
        seconds: for all searches together, shared out by size. The result then depends on the speed of the machine.
        moves: moves for each set of channels instead: the same seed then gives the same order.
        include, exclude: as for `sparsify`: the order is sought for the weights that it would make 2:4.
        seed: of the searches, and of the random inputs of the comparison.

    Raises:
        CaptureError: torch.export refuses the model.
        StateError: the model is sparse already: a new order would break its pattern; or it has no values yet.
        VerificationError: the model gives other outputs each time.
        OptionError: ``seconds`` or ``moves`` out of range.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"channel_order was given a {type(model).__name__}; expected a torch.nn.Module")
    refuse_distributed(model, "channel_order")
    if next(iter(sparse_parameters(model)), None) is not None:
        raise StateError(
            "channel_order was given a model that is sparse already, and another order of channels would break its pattern; "
            "call it before sparsefx.sparsify"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter) or parameter.device.type == "meta":
            raise StateError(f"channel_order was given a model whose {name} has no values; load weights first")
    if not (isinstance(seconds, (int, float)) and 0 < seconds < float("inf")):
        raise OptionError(f"seconds={seconds!r} was given; expected a positive number")
    analysis = analyze(
        model,
        example_inputs=example_inputs,
        pattern=NOfM(2, 4),
        density=0.5,
        eligibility=Eligibility(),
        include=include,
        exclude=exclude,
    )
    weights = {layer.parameter for layer in analysis.layers if layer.sparse}
    generator = torch.Generator().manual_seed(seed)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("ordering channels", total=1.0)

        def search(matrix: Tensor, share: float) -> Tensor:
            done = progress.tasks[task].completed

            def show(part: float) -> None:
                progress.update(task, completed=done + share * part)

            order = search_permutation(
                matrix, seconds=max(seconds * share, 0.05), moves=moves, generator=generator, progress=show
            )
            progress.update(task, completed=done + share)
            return order

        return order_channels(model, split_arguments(example_inputs), weights, search, seed)


def permute_channels(
    model: Model, example_inputs: Any, *, seconds: float = 60.0, moves: int | None = None, seed: int = 0
) -> Model:
    """A copy of ``model`` whose channels have an order in which 2:4 keeps more magnitude. The given model is untouched.

    It has the same class, names and shapes, and the same outputs up to rounding. Args and Raises: as for `channel_order`, which
    also tells what was gained.
    """
    order = channel_order(model, example_inputs, seconds=seconds, moves=moves, seed=seed)
    return apply_channel_plan(model, order.plan)
