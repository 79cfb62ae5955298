"""The lottery ticket with rewinding (Frankle and Carbin 2019; Frankle et al., "Stabilizing the Lottery Ticket Hypothesis",
2019)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from sparsefx.algorithms.options import expect_steps
from sparsefx.api import attach, finalize, sparsify
from sparsefx.errors import OptionError, StateError
from sparsefx.model_record import has_records, model_records
from sparsefx.patterns import Pattern
from sparsefx.patterns import parse as parse_pattern
from sparsefx.runtime import MaskRuntime
from sparsefx.sparse_parameter import sparse_parameters

Model = TypeVar("Model", bound=nn.Module)
Train = Callable[[Any, int, int, Any], Any]


def lottery_ticket(
    model: Model,
    train: Train,
    *,
    total_steps: int,
    rewind_to: int | None = None,
    rounds: int = 1,
    pattern: str | Pattern = "unstructured",
    density: float | None = None,
    **options: Any,
) -> Model:
    """Train to the end, choose masks by magnitude, rewind the weights to an early step, and train again with the masks fixed.

    Args:
        model: dense; changed in place.
        train: ``state = train(model, first, last, state)`` makes the optimizer steps ``first + 1`` to ``last`` and returns
            whatever it wants to find again when it goes on from ``last``: the state_dicts of optimizer and learning rate
            schedule, say. ``state`` is None at step 0. It trains dense and sparse models alike: masks are kept without its help.
        total_steps: k, optimizer steps of a whole training run.
        rewind_to: e, the step that weights go back to; None stands for k / 20. 0 is the ticket as first published.
        rounds: of training to the end, pruning and rewinding; with n of them each keeps the n-th root of the density.
        pattern: as for `sparsefx.sparsify`; more than one round wants a pattern whose density is free.
        density: likewise.
        options: likewise: ``include``, ``exclude``, ``example_inputs``, ``eligibility``, ``densities``.

    Returns:
        The same object, trained, and sparsified with algorithm ``static``.

    Raises:
        StateError: the model is sparsified already, or ``train`` made no optimizer step on masked weights.
        OptionError: a number out of range, more rounds than the pattern allows, or ``train`` returned an optimizer itself.
    """
    expect_steps("total_steps", total_steps)
    expect_steps("rounds", rounds)
    if not callable(train):
        raise OptionError(f"train={train!r} was given; expected a function: state = train(model, first, last, state)")
    back = max(1, total_steps // 20) if rewind_to is None else rewind_to
    if not isinstance(back, int) or isinstance(back, bool) or not 0 <= back < total_steps:
        raise OptionError(f"rewind_to={rewind_to!r} was given; expected a step from 0 to total_steps - 1 = {total_steps - 1}")
    if has_records(model):
        raise StateError("lottery_ticket was given a model that is sparsified already; it trains a dense one first")
    chosen = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    last = chosen.resolve_density(density)
    if rounds > 1 and chosen.fixed_density is not None:
        raise OptionError(
            f"rounds={rounds} was given for pattern {chosen.name!r}, whose density is always {last:g}; leave it out"
        )
    state = train(model, 0, back, None) if back else None
    live = [type(leaf).__name__ for leaf in tree_leaves(state) if isinstance(leaf, (Optimizer, LRScheduler))]
    if live:
        raise OptionError(
            f"train returned a {live[0]} as its state; a copy of that would train nothing when weights are rewound. Return "
            "state_dict()s, and load them into new ones where train is given a state"
        )
    early_weights, early_state = _copies(model), copy.deepcopy(state)
    train(model, back, total_steps, state)
    for number in range(1, rounds + 1):
        if has_records(model):
            finalize(model)  # zeros stay, and rank last when masks are chosen again
        share = density if rounds == 1 else last ** (number / rounds)
        sparsify(model, pattern=chosen, density=share, algorithm="static", **options)
        _rewind(model, early_weights)
        with _masks_kept(model, total_steps):
            train(model, back, total_steps, copy.deepcopy(early_state))
    return model


def _copies(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in tensors.items()}


@torch.no_grad()
def _rewind(model: nn.Module, early: dict[str, Tensor]) -> None:
    """Give parameters and buffers their early values, in place, and masked weights those inside their masks."""
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in early.items():
        now[name].detach().copy_(value)
    for _, parameter, record in sparse_parameters(model):
        parameter.detach().masked_fill_(~record.mask, 0)


@contextmanager
def _masks_kept(model: nn.Module, total_steps: int) -> Iterator[None]:
    """Attach to whatever optimizers of masked weights step in here, before their first step."""
    attached: list[MaskRuntime] = []
    seen: set[int] = set()
    trained = False

    def follow(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal trained
        if id(optimizer) in seen:
            return
        seen.add(id(optimizer))
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        mine = [record for _, parameter, record in sparse_parameters(model) if id(parameter) in held]
        trained = trained or bool(mine)
        if mine and all(record.runtime is None or record.runtime() is None for record in mine):
            attached.append(attach(model, optimizer, total_steps=total_steps))

    remembered = [record for _, record in model_records(model)]
    for record in remembered:
        record.warned = True  # that no runtime is attached is so only until the first step
    handle = register_optimizer_step_pre_hook(follow)
    try:
        yield
    finally:
        handle.remove()
        for runtime in attached:
            runtime.detach()
        for record in remembered:
            record.warned = False
    if not trained:
        raise StateError(
            "train made no optimizer step on the masked model's weights; expected it to train them with a torch.optim optimizer"
        )
