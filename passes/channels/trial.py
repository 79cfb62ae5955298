"""Runs a model without its channels: on the meta device for shapes, in float64 for values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsefx.capture.arguments import copies
from sparsefx.capture.state import unchanged
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.surgery import carry_out

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Failure:
    """A run of a pruned model that did not go well.

    Attributes:
        where: path of the innermost module that was running; empty for the model itself, or where values differ.
        told: what happened, in one line.
    """

    where: str
    told: str


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without memory for its tensors."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


class ShapeTrial:
    """Runs plans on copies of a model without memory, and compares the shapes of outputs."""

    def __init__(self, model: nn.Module, arguments: Arguments, modes: tuple[bool, ...]) -> None:
        self._model = model
        self._arguments = arguments
        self._modes = modes
        self._expected: dict[bool, Any] = {}
        self._real = False

    def failure(self, plan: ChannelPlan) -> Failure | None:
        """What goes wrong with this plan; None where every output has its shape."""
        for training in self._modes:
            if training not in self._expected:
                self._expected[training] = self._shapes_expected(training)
            model = self._copy()
            carry_out(model, plan)
            made = self._run(model, training)
            if isinstance(made, Failure):
                return made
            if made != self._expected[training]:
                return Failure("", "an output has another shape")
        return None

    def _shapes_expected(self, training: bool) -> Any:
        made = self._run(self._copy(), training)
        if isinstance(made, Failure) and not self._real:
            # Code that looks at values does not run without them.
            self._real = True
            made = self._run(self._copy(), training)
        return made

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self._model) if self._real else meta_copy(self._model)

    def _run(self, model: nn.Module, training: bool) -> Any:
        model.train(training)
        args, kwargs = copies(*self._arguments)
        if not self._real:
            args, kwargs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with unchanged(self._model), _running(model) as stack, torch.no_grad():
            try:
                made = model(*args, **kwargs)
            except Exception as error:  # whatever the model's own code raises on widths that it does not expect
                return Failure(stack[-1] if stack else "", _first_line(error))
        return [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(made)]


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """A list that holds the paths of the modules that are running, outermost first; left as it was where one raises."""
    stack: list[str] = []
    handles = []
    for path, module in model.named_modules():

        def enter(_module: nn.Module, _args: Any, path: str = path) -> None:
            stack.append(path)

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def double_copy(model: nn.Module) -> nn.Module:
    """An eval-mode copy whose floating point parameters and buffers are float64."""
    return copy.deepcopy(model).double().eval()


class ValueTrial:
    """Runs plans in float64 on the example inputs and on random ones, and compares the values of outputs."""

    def __init__(self, model: nn.Module, arguments: Arguments, seed: int) -> None:
        self._model = double_copy(model)
        generator = torch.Generator().manual_seed(seed)
        wide = tree_map(_as_double, arguments)
        self._inputs = [wide, tree_map(lambda leaf: _random_like(leaf, generator), wide)]
        self._expected = [self._outputs(copy.deepcopy(self._model), inputs, seed) for inputs in self._inputs]
        self._seed = seed

    def difference(self, plan: ChannelPlan) -> float:
        """The largest difference of an output between the pruned and the unpruned model, relative to its largest value.

        Infinite where the pruned model does not run, or an output has another shape or type, or is not a number in other places.
        """
        model = copy.deepcopy(self._model)
        carry_out(model, plan)
        worst = 0.0
        for inputs, expected in zip(self._inputs, self._expected, strict=True):
            try:
                made = self._outputs(model, inputs, self._seed)
            except Exception:  # what the model's own code raises, say on an index that is no channel any more
                return float("inf")
            worst = max(worst, _difference(made, expected))
        return worst

    def _outputs(self, model: nn.Module, inputs: Arguments, seed: int) -> list[Any]:
        args, kwargs = copies(*inputs)
        with unchanged(model), torch.no_grad():
            # Code that draws random numbers in eval mode draws the same ones.
            torch.manual_seed(seed)
            return tree_leaves(model(*args, **kwargs))


def _as_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _random_like(leaf: Any, generator: torch.Generator) -> Any:
    """Normal numbers; integers and truth values in another order, since they may be indices and masks."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator).to(leaf.device)
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return leaf.flatten()[order].view(leaf.shape)


def _difference(made: list[Any], expected: list[Any]) -> float:
    if len(made) != len(expected):
        return float("inf")
    return max((_of_one(first, second) for first, second in zip(made, expected, strict=True)), default=0.0)


def _of_one(made: Any, expected: Any) -> float:
    if not isinstance(made, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if type(made) is type(expected) else float("inf")
    if made.shape != expected.shape:
        return float("inf")
    if not made.is_floating_point() or not made.numel():
        return 0.0 if torch.equal(made, expected) else float("inf")
    known = torch.isfinite(expected)
    if not torch.equal(known, torch.isfinite(made)):
        return float("inf")
    gap = (made - expected)[known].abs().max() if known.any() else torch.zeros(())
    scale = expected[known].abs().max() if known.any() else torch.ones(())
    return float(gap / scale) if scale > 0 else float(gap)
