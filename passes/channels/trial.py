"""Runs a model without its channels: on the meta device for shapes, in float64 for values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsefx.capture.arguments import copies
from sparsefx.capture.model_copy import copy_model
from sparsefx.capture.state import unchanged
from sparsefx.errors import VerificationError
from sparsefx.passes.channels.other_sizes import other_batch, other_numbers, other_sizes
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.precision import Narrowing, Widening, widened
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


def copy_with(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the modules in which each parameter and buffer is what ``change`` makes of it; see `copy_model`."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        made = change(tensor.detach())
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy_model(model, memo)


def runs_in(model: nn.Module, arguments: Arguments, *, training: bool) -> bool:
    """Whether the model itself runs in a mode; on a copy, since train mode changes buffers."""
    copied = copy_with(model, torch.clone).train(training)
    args, kwargs = copies(*arguments)
    try:
        with unchanged(copied), torch.no_grad():
            copied(*args, **kwargs)
    except Exception:  # detectors want targets in train mode, and may raise anything without
        return False
    return True


class ShapeTrial:
    """Runs plans on copies of a model without memory."""

    def __init__(self, model: nn.Module, arguments: Arguments, modes: tuple[bool, ...]) -> None:
        self._model = model
        self._arguments = arguments
        self._modes = modes
        self._runs_on_meta: bool | None = None

    def failure(self, plan: ChannelPlan) -> Failure | None:
        """What goes wrong with this plan; None where it runs in every mode."""
        for training in self._modes:
            found = self._failure(plan, training)
            if found is not None:
                return found
        return None

    def _failure(self, plan: ChannelPlan, training: bool) -> Failure | None:
        if self._runs_on_meta is not False:
            found = self._run(self._pruned(plan, "meta"), training, "meta")
            if found is None or self._runs_on_meta:
                return found
            # Code that looks at values does not run without them, whatever its widths are.
            self._runs_on_meta = self._run(copy_with(self._model, _empty), training, "meta") is None
            if self._runs_on_meta:
                return found
        return self._run(self._pruned(plan, None), training, None)

    def _pruned(self, plan: ChannelPlan, device: str | None) -> nn.Module:
        # In train mode a run changes buffers.
        model = copy_with(self._model, _empty if device == "meta" else torch.clone)
        carry_out(model, plan)
        return model

    def _run(self, model: nn.Module, training: bool, device: str | None) -> Failure | None:
        model.train(training)
        args, kwargs = copies(*self._arguments)
        if device is not None:
            args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with unchanged(model), _running(model) as stack, torch.no_grad():
            try:
                model(*args, **kwargs)
            except Exception as error:  # whatever the model's own code raises on widths that it does not expect
                return Failure(stack[-1] if stack else "", _first_line(error))
        return None


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


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


class ValueTrial:
    """Runs plans in float64 on random inputs in the shapes of the example inputs, and compares the values of outputs.

    Args:
        model: is copied.
        arguments: example inputs.
        seed: of the inputs, and of what the model draws.
        training: the mode that it runs in.

    Raises:
        VerificationError: the model itself does not run in float64.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, seed: int, *, training: bool = False) -> None:
        self._model = copy_with(model, widened).train(training)
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._inputs = tree_map(lambda leaf: _random_like(leaf, self._generator), arguments)
        self._widens = False
        self._last: tuple[ChannelPlan, nn.Module] | None = None
        self._elsewhere: list[tuple[Any, list[Any]]] | None = None
        self._other_numbers: list[tuple[Any, list[Any]]] = []
        self._expected = self._first_outputs()
        if not all(_is_finite(leaf) for leaf in self._expected):
            # Random numbers are no input for this model; its own example is.
            self._inputs = tree_map(lambda leaf: widened(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
            self._expected = self._outputs(self._model)

    def difference(self, plan: ChannelPlan) -> float:
        """The largest difference of an output between the pruned and the unpruned model, relative to its largest value.

        Infinite where the pruned model does not run, or an output has another shape or type, or is not a number in other places.
        """
        model = self._pruned(plan)
        try:
            made = self._outputs(model)
        except Exception:  # what the model's own code raises, say on an index that is no channel any more
            return float("inf")
        return _difference(made, self._expected)

    def difference_elsewhere(self, plan: ChannelPlan) -> float:
        """The same in other sizes of batch, length and image, and with other numbers as arguments, as far as the unpruned model
        takes them; the largest.

        With other numbers code may take branches that no graph followed, whose layers no longer fit: these then raise, or make
        something else, for all to see. Only what the model gives without a complaint counts.
        """
        if self._elsewhere is None:
            self._elsewhere = list(self._other_runs())
            taken = (self._first_taken(candidates) for candidates in other_numbers(self._model, self._inputs))
            self._other_numbers = [found for found in taken if found is not None]
        model = self._pruned(plan)
        worst = 0.0
        for inputs, expected in self._elsewhere:
            try:
                worst = max(worst, _difference(self._outputs(model, inputs), expected))
            except Exception:  # what the model's own code raises
                return float("inf")
        for inputs, expected in self._other_numbers:
            try:
                made = self._outputs(model, inputs)
            except Exception:  # what the model's own code raises
                continue
            if list(map(_form, made)) == list(map(_form, expected)):
                worst = max(worst, _difference(made, expected))
        return worst

    def _pruned(self, plan: ChannelPlan) -> nn.Module:
        """The model after this plan. It is kept, since runs leave it as it was and the same plan is compared in several sizes."""
        if self._last is None or self._last[0] is not plan:
            model = copy_with(self._model, lambda tensor: tensor)
            carry_out(model, plan)
            self._last = plan, model
        return self._last[1]

    def _other_runs(self) -> Iterator[tuple[Any, list[Any]]]:
        smallest = self._inputs
        for candidates in other_sizes(self._inputs):
            found = self._first_taken(candidates)
            if found is not None:
                smallest = min(smallest, found[0], key=_elements)
                yield found
        # The batch of the smallest, since another one may be larger.
        found = self._first_taken(other_batch(smallest))
        if found is not None:
            yield found

    def _first_taken(self, candidates: list[Any]) -> tuple[Any, list[Any]] | None:
        for inputs in candidates:
            try:
                expected = self._outputs(self._model, inputs)
            except Exception:  # what the model's own code raises on sizes that it does not take
                continue
            if all(_is_finite(leaf) for leaf in expected):
                return inputs, expected
        return None

    def noise(self, rounding: float = 1e-15) -> float:
        """How far outputs move where every weight moves by rounding: code may compute in float32, or amplify what it is given."""

        def moved(tensor: Tensor) -> Tensor:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            change = torch.randn(tensor.shape, dtype=tensor.dtype, generator=self._generator).to(tensor.device)
            return tensor * (1 + rounding * change)

        return _difference(self._outputs(copy_with(self._model, moved)), self._expected)

    def draws(self) -> bool:
        """Whether outputs depend on random numbers that the model draws: another order of channels then draws others."""
        return _difference(self._outputs(self._model, seed=self._seed + 1), self._expected) > 0

    def narrows(self) -> bool:
        """Whether the model's own code goes on in float32 or less where it is given float64."""
        seen = Narrowing()
        with seen:
            self._outputs(self._model)
        return seen.found

    def _first_outputs(self) -> list[Any]:
        """Outputs of the model itself; where its code asks for a shorter format and fails beside float64, it gets float64."""
        try:
            return self._outputs(self._model)
        except Exception:  # what the model's own code raises
            self._widens = True
        try:
            return self._outputs(self._model)
        except Exception as error:
            raise VerificationError(
                f"outputs of {type(self._model).__name__} cannot be compared: it does not run in float64 ({_first_line(error)}). "
                "The model is as before. Prune those of its submodules that do, each with inputs of its own"
            ) from error

    def _outputs(self, model: nn.Module, inputs: Any = None, seed: int | None = None) -> list[Any]:
        args, kwargs = copies(*(self._inputs if inputs is None else inputs))
        widening = Widening() if self._widens else nullcontext()  # type: ignore[no-untyped-call]
        with unchanged(model), torch.no_grad(), widening:
            # Code that draws random numbers in eval mode draws the same ones.
            torch.manual_seed(self._seed if seed is None else seed)
            return tree_leaves(model(*args, **kwargs))


def _elements(inputs: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def _is_finite(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or bool(torch.isfinite(leaf).all())


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def _random_like(leaf: Any, generator: torch.Generator) -> Any:
    """Normal numbers in their longest format; integers and truth values in another order, since they may be indices and masks."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point() or leaf.is_complex():
        dtype = torch.complex128 if leaf.is_complex() else torch.float64
        return torch.randn(leaf.shape, dtype=dtype, generator=generator).to(leaf.device)
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return leaf.flatten()[order].view(leaf.shape)


def _difference(made: list[Any], expected: list[Any]) -> float:
    if len(made) != len(expected):
        return float("inf")
    return max((_of_one(first, second) for first, second in zip(made, expected, strict=True)), default=0.0)


def _of_one(made: Any, expected: Any) -> float:
    if isinstance(made, float) and isinstance(expected, float):
        made, expected = torch.tensor(made).double(), torch.tensor(expected).double()
    if not isinstance(made, Tensor) or not isinstance(expected, Tensor):
        # Of numbers such as how many channels there are the value counts; other objects are no two alike.
        alike = made == expected if isinstance(expected, (bool, int, str)) else True
        return 0.0 if alike and type(made) is type(expected) else float("inf")
    if made.shape != expected.shape:
        return float("inf")
    if not (made.is_floating_point() or made.is_complex()) or not made.numel():
        return 0.0 if torch.equal(made, expected) else float("inf")
    known = torch.isfinite(expected)
    if not torch.equal(known, torch.isfinite(made)):
        return float("inf")
    gap = (made - expected)[known].abs().max() if known.any() else torch.zeros(())
    scale = expected[known].abs().max() if known.any() else torch.ones(())
    return float(gap / scale) if scale > 0 else float(gap)
