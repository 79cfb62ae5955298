"""Optimizers that follow a cut: parameters stay in their groups, their state is cut along, added biases find a group."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from sparsefx.capture.below import below
from sparsefx.errors import OptimizerError
from sparsefx.passes.channels.cut import cut
from sparsefx.passes.channels.plan import ChannelPlan

_REMEDY = "Prune without the optimizer, and make a new one"


@dataclass(frozen=True)
class Cut:
    """What is replaced in a model.

    Attributes:
        plan: that is carried out.
        names: first name of each parameter and buffer before, by identity, in the order of the model.
        shapes: theirs, by name.
        new: what comes in their place, by name; others stay.
        added: biases that the model did not have, by name.
    """

    plan: ChannelPlan
    names: Mapping[int, str]
    shapes: Mapping[str, tuple[int, ...]]
    new: Mapping[str, Tensor]
    added: Mapping[str, nn.Parameter]


@dataclass
class _Group:
    """What a group will hold.

    Attributes:
        optimizer: whose group it is.
        group: as it is now.
        params: its parameters then.
        names: of those in the model; empty for one that is not of the model.
        told: what the group itself calls them; None where it does not name them.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    params: list[Any]
    names: list[str]
    told: list[str] | None


class OptimizersFollow:
    """The optimizers of a model after a cut. All that can fail is done at once; `carry_out` then changes them.

    Raises:
        OptimizerError: an optimizer keeps something that cannot be cut along, or takes no bias.
    """

    def __init__(self, optimizers: Sequence[Optimizer], made: Cut) -> None:
        self._made = made
        self._optimizers = optimizers
        self._groups: list[_Group] = []
        self._states: list[dict[Any, Any]] = []
        for optimizer in optimizers:
            _check_own_lists(optimizer, made)
            self._states.append(_cut_states(optimizer, made))
            for group in optimizer.param_groups:
                names = [made.names.get(id(parameter), "") for parameter in group["params"]]
                params = [made.new.get(name, parameter) for name, parameter in zip(names, group["params"], strict=True)]
                told = list(group["param_names"]) if "param_names" in group else None
                self._groups.append(_Group(optimizer, group, params, names, told))
        order = {name: number for number, name in enumerate(made.names.values())}
        for name, bias in made.added.items():
            self._add(name, bias, order)

    def carry_out(self) -> None:
        """Put what was made in the place of what was there. Lists stay the same objects, since optimizers may hold them too."""
        for after in self._groups:
            after.group["params"][:] = after.params
            if after.told is not None:
                after.group["param_names"][:] = after.told
        for optimizer, states in zip(self._optimizers, self._states, strict=True):
            for parameter in [key for key in optimizer.state if self._made.names.get(id(key), "") in self._made.new]:
                del optimizer.state[parameter]
            optimizer.state.update(states)
            if isinstance(optimizer, LBFGS):
                optimizer._numel_cache = None

    def _add(self, name: str, bias: nn.Parameter, order: Mapping[str, int]) -> None:
        """Put a new bias into a group, in the order of the model's parameters; into none where its weight is in none."""
        weight = f"{name.removesuffix('bias')}weight"
        own = next((group for group in self._groups if weight in group.names), None)
        if own is None:
            return
        home = self._home(own, name, bias)
        # An optimizer that is made anew for the smaller model numbers parameters alike, and takes this one's state.
        behind = (number for number, other in enumerate(home.names) if order.get(other, -1) > order[weight])
        place = next(behind, len(home.names))
        if home.told is not None:
            called = own.told[own.names.index(weight)] if own.told is not None else weight
            home.told.insert(place, f"{called.removesuffix('weight')}bias" if called.endswith("weight") else name)
        home.params.insert(place, bias)
        home.names.insert(place, weight)

    def _home(self, own: _Group, name: str, bias: nn.Parameter) -> _Group:
        """The weight's group where it holds vectors too; else the group of vectors nearest in the model; else the weight's."""

        def nearness(group: _Group) -> tuple[bool, bool, int]:
            return group is own, group.optimizer is own.optimizer, max(_shared(name, other) for other in _vectors(group))

        with_vectors = [group for group in self._groups if _vectors(group)]
        if with_vectors:
            return max(with_vectors, key=nearness)
        refusal = _refusal_of_vectors(own, bias)
        if refusal is None:
            return own
        raise OptimizerError(
            f"a bias {name!r} has to be added, which would take over what constant channels contribute; but no group of "
            f"{' or '.join(sorted({type(one).__name__ for one in self._optimizers}))} holds any vector, and "
            f"{type(own.optimizer).__name__} takes none ({refusal}). Give that layer a bias of zeros and an optimizer for it, or "
            "prune without the optimizer"
        )


def _vectors(group: _Group) -> list[str]:
    return [name for name, parameter in zip(group.names, group.params, strict=True) if name and parameter.dim() == 1]


def _shared(name: str, other: str) -> int:
    """How many modules two parameters have in common, from the outermost one on."""
    paths = zip(name.split(".")[:-1], other.split(".")[:-1], strict=False)
    return next((depth for depth, (one, two) in enumerate(paths) if one != two), min(name.count("."), other.count(".")))


def _refusal_of_vectors(group: _Group, bias: nn.Parameter) -> str | None:
    """Why an optimizer like that of this group does not take a vector; None where it makes a step with it."""
    kind: Any = type(group.optimizer)
    vector = nn.Parameter(torch.zeros_like(bias))
    vector.grad = torch.zeros_like(bias)
    try:
        taken = inspect.signature(kind.__init__).parameters.keys() - {"self", "params"}
        # Some draw random numbers.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            trial = kind([vector], **{key: value for key, value in group.group.items() if key in taken})
            if "closure" in inspect.signature(kind.step).parameters:
                trial.step(lambda: torch.zeros(()))
            else:
                trial.step()
    except Exception as error:  # whatever an optimizer raises on what it does not take
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return None


def _cut_states(optimizer: Optimizer, made: Cut) -> dict[Any, Any]:
    """State of the parameters that are replaced, by what they are replaced with."""
    states: dict[Any, Any] = {}
    if isinstance(optimizer, LBFGS) and any(True for _ in _tensors_in(list(optimizer.state.values()))):
        held = {made.names.get(id(parameter), "") for parameter in optimizer.param_groups[0]["params"]}
        if held & made.plan.kept.keys() or any(f"{name.removesuffix('bias')}weight" in held for name in made.added):
            raise OptimizerError(f"LBFGS keeps gradients of all parameters as one vector, which cannot be cut along. {_REMEDY}")
    for parameter, state in optimizer.state.items():
        name = made.names.get(id(parameter), "")
        if name in made.new:
            axes = made.plan.kept.get(name, {})
            states[made.new[name]] = {
                key: _cut_entry(optimizer, key, value, name, made.shapes[name], axes) if axes else value
                for key, value in state.items()
            }
    return states


def _cut_entry(optimizer: Optimizer, key: str, value: Any, name: str, shape: tuple[int, ...], axes: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value
        if tuple(value.shape) == shape:
            try:
                return cut(value, axes)
            except Exception as error:  # a tensor of a class of its own, as states in 8 bits are
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps {key!r} for {name!r} as a {type(value).__name__}, which cannot be cut "
                    f"({error}). {_REMEDY}"
                ) from error
    for tensor in _tensors_in(value):
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps {key!r} {'' if tensor is value else 'with a tensor '}of shape "
            f"{list(tensor.shape)} for {name!r} of shape {list(shape)}: it cannot be cut along. {_REMEDY}"
        )
    return value


def _check_own_lists(optimizer: Optimizer, made: Cut) -> None:
    """Refuse an optimizer that holds parameters elsewhere than in its groups: it would go on with the old ones."""
    lists = {id(group["params"]) for group in optimizer.param_groups}
    held = {key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state")}
    for group in optimizer.param_groups:
        held |= {key: value for key, value in group.items() if key != "params"}
    for key, value in held.items():
        for tensor in _tensors_in(value, passed_over=lists):
            if made.names.get(id(tensor), "") in made.new:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps parameters in its {key!r} too, which would go on holding "
                    f"{made.names[id(tensor)]!r} as it was. {_REMEDY}"
                )


def _tensors_in(value: Any, passed_over: Collection[int] = ()) -> Iterator[Tensor]:
    """Tensors with at least one axis below a value."""
    return (item for item in below(value, passed_over=passed_over) if isinstance(item, Tensor) and item.dim() > 0)


__all__ = ["Cut", "OptimizersFollow"]
