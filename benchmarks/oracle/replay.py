"""Runs a model with its products taken from a recorded run, so that a disturbance of one goes no further than to the next.

A product is a linear layer or a convolution. This works on what is computed, below modules and functions, and knows no other op:
attention, shuffles, norms are just run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsefx.passes.channels.precision import Widening

Call = tuple[tuple[Any, ...], dict[str, Any]]
LARGEST_RECORD = 3 * 2**30
"""Bytes of recorded inputs and outputs beyond which a model is too large to be looked at."""


class TooLarge(Exception):
    """A model cannot be looked at within the time or memory that is given to it."""


@dataclass(frozen=True)
class Product:
    """One call of a product with a parameter.

    Attributes:
        weight: name of the parameter.
        rows, columns: which indices of its output and input axis take part; with groups, columns of all groups.
        out_axis, in_axis: axes of the parameter.
        groups: of a convolution, else 1.
        channel: axis of channels in the input and in the output.
        inputs: index of the op's argument that is the input.
    """

    weight: str
    rows: range
    columns: range
    out_axis: int
    in_axis: int
    groups: int
    channel: int
    inputs: int


class ProductFinder:
    """Tells which calls are products with a parameter of a model."""

    def __init__(self, model: nn.Module) -> None:
        # Recurrent layers are one op each: a product of every step is not what is cut.
        steps = {
            id(parameter) for module in model.modules() if isinstance(module, nn.RNNBase) for parameter in module.parameters()
        }
        self._parameters = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in model.named_parameters()
            if id(parameter) not in steps
        }

    def find(self, func: Any, args: tuple[Any, ...]) -> Product | None:
        """The product that this call is, or None."""
        if func is torch.ops.aten.convolution.default:
            weight, transposed, groups = args[1], args[6], args[8]
            name, parameter = self._parameters.get(weight.untyped_storage().data_ptr(), ("", None))
            if parameter is None or weight.shape != parameter.shape or weight.storage_offset() != parameter.storage_offset():
                return None
            if transposed and groups > 1:
                return None
            out_axis, in_axis = (1, 0) if transposed else (0, 1)
            rows, columns = range(weight.shape[out_axis]), range(weight.shape[in_axis] * groups)
            return Product(name, rows, columns, out_axis, in_axis, groups, 1, 0)
        places = {torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.mm.default: (0, 1)}
        if func not in places:
            return None
        inputs, position = places[func]
        return self._linear(args[position], inputs)

    def _linear(self, weight: Tensor, inputs: int) -> Product | None:
        name, parameter = self._parameters.get(weight.untyped_storage().data_ptr(), ("", None))
        if parameter is None or parameter.dim() < 2 or math.prod(parameter.shape[2:]) != 1 or not parameter.is_contiguous():
            return None
        width = parameter.shape[1]
        first, left = divmod(weight.storage_offset() - parameter.storage_offset(), width)
        # Of a single column strides do not tell; as [in, out] it has one output.
        column = width == 1 and weight.shape[1] == 1
        if weight.stride() == (1, width) and not column:
            rows, columns, out_axis = range(first, first + weight.shape[1]), range(left, left + weight.shape[0]), 0
        elif weight.stride() == (width, 1):
            rows, columns, out_axis = range(left, left + weight.shape[1]), range(first, first + weight.shape[0]), 1
        else:
            return None
        return Product(name, rows, columns, out_axis, 1 - out_axis, 1, 1, inputs)


class _Mode(TorchDispatchMode):
    """Gives every product with a parameter to a function instead, with its number among them."""

    def __init__(self, model: nn.Module, handle: Callable[[int, Product, Any, tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._finder = ProductFinder(model)
        self._handle = handle
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = self._finder.find(func, args)
        if product is None:
            return func(*args, **kwargs)
        self._count += 1
        return self._handle(self._count - 1, product, func, args, kwargs)


def size_of_noise(made: Tensor) -> float:
    """Far beyond what is usual for the output of a product, so that it gets through thresholds."""
    return 30 * float(made.std(correction=0)) + 10


def disturbed(made: Tensor, product: Product, mine: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """The output of a product with noise, all of the sign of ``size``, on some channels of it."""
    changed = made.clone()
    turned = changed.movedim(product.channel, 0)
    noise = torch.rand(int(mine.sum()), *turned.shape[1:], generator=generator, dtype=made.dtype) + 1
    turned[mine] += noise * size
    return changed


def loosened(made: Tensor, product: Product, still: Tensor, generator: torch.Generator) -> Tensor:
    """The output of a product with noise where it is not constant, in the second half of a batch: the first is as it was."""
    noise = torch.randn(made.shape, generator=generator, dtype=made.dtype) * (2 * made.std(correction=0) + 3)
    if product.channel != 0:
        noise[: len(noise) // 2] = 0
    noise.movedim(product.channel, 0)[still] = 0
    return made + noise


def changed_channels(given: Tensor, before: Tensor, product: Product) -> Tensor:
    """Which channels of a product's input are not what they were; bool [C]."""
    others = [axis for axis in range(given.dim()) if axis != product.channel % given.dim()]
    changed = given != before
    return changed.any(others) if others else changed


def _by_channel(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).flatten(1)


def run(model: nn.Module, call: Call, handle: Callable[..., Tensor], *, exact: bool = False) -> list[Tensor]:
    """The outputs of the model with its products given to ``handle(number, product, func, args, kwargs)``.

    ``exact`` for a model in float64: all of it is computed in float64, whatever its code asks for.
    """
    torch.manual_seed(0)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), Widening() if exact else nullcontext(), _Mode(model, handle):
            return [leaf.clone() for leaf in tree_leaves(model(*call[0], **call[1])) if isinstance(leaf, Tensor)]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class Ranges:
    """Smallest and largest value seen of each channel; shapes [number of channels]."""

    low: dict[int, Tensor] = field(default_factory=dict)
    high: dict[int, Tensor] = field(default_factory=dict)

    def see(self, number: int, tensor: Tensor, axis: int) -> None:
        """Widen the ranges of a product's channels."""
        flat = _by_channel(tensor, axis)
        low, high = flat.amin(1), flat.amax(1)
        if number in self.low:
            low, high = torch.minimum(low, self.low[number]), torch.maximum(high, self.high[number])
        self.low[number], self.high[number] = low, high

    def constant(self, number: int) -> Tensor:
        """Whether each channel had one value only, up to rounding."""
        low, high = self.low[number], self.high[number]
        return (high - low) <= 1e-9 * torch.maximum(low.abs(), high.abs()).clamp_min(1e-30)


def ranges(model: nn.Module, calls: Sequence[Call]) -> tuple[list[Product], Ranges, Ranges]:
    """The products of a model, and what their inputs and outputs were over these calls, in float64."""
    exact = copy.deepcopy(model).double()
    products: list[Product] = []
    inputs, outputs = Ranges(), Ranges()

    def note(number: int, product: Product, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        made: Tensor = func(*args, **kwargs)
        if number == len(products):
            products.append(product)
        inputs.see(number, args[product.inputs], product.channel)
        outputs.see(number, made, product.channel)
        return made

    for call in calls:
        run(exact, double(call), note, exact=True)
    return products, inputs, outputs


def double(call: Call) -> Call:
    """The same arguments in float64."""
    made: Call = tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, call)
    return made


class Recording:
    """One run of a model, and further ones of which products give what was recorded, but where they are disturbed.

    Args:
        model: in eval mode; not changed.
        call: its arguments.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.products: list[Product] = []
        self._inputs: list[Tensor] = []
        self._made: list[Tensor] = []
        self._sizes: list[float] = []
        self._bytes = 0
        self._outputs = run(model, call, self._record)
        self._generator = torch.Generator().manual_seed(1)

    def _record(self, number: int, product: Product, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        made: Tensor = func(*args, **kwargs)
        self.products.append(product)
        self._inputs.append(args[product.inputs].clone())
        self._made.append(made.clone())
        self._sizes.append(size_of_noise(made))
        self._bytes += 4 * (made.numel() + args[product.inputs].numel())
        if self._bytes > LARGEST_RECORD:
            raise TooLarge("its activations do not fit")
        return made

    def disturb(self, rows: Mapping[str, Tensor]) -> tuple[list[Tensor | None], bool]:
        """Add noise to output channels of products, and look how far it gets.

        Args:
            rows: by weight, which of its output channels; bool [K].

        Returns:
            For each product which channels of its input changed (None: none did), and whether an output of the model did.
        """
        found: list[Tensor | None] = [None] * len(self.products)
        outputs = False
        # Where a tensor has few places, noise of one sign may end at a ReLU.
        for sign in (1, -1):
            try:
                made = run(self.model, self.call, self._replay(rows, found, sign))
            except (RuntimeError, IndexError, ValueError):
                # Code that looks at values went another way: all depends on all.
                return [torch.ones(len(product.columns), dtype=torch.bool) for product in self.products], True
            outputs |= len(made) != len(self._outputs) or not all(map(torch.equal, made, self._outputs))
        return found, outputs

    def _replay(self, rows: Mapping[str, Tensor], found: list[Tensor | None], sign: int) -> Callable[..., Tensor]:
        def replay(number: int, product: Product, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if number >= len(self.products) or product != self.products[number]:
                raise RuntimeError("the model takes another way")
            given, before = args[product.inputs], self._inputs[number]
            if given.shape != before.shape:
                raise RuntimeError("the model takes another way")
            if not torch.equal(given, before):
                changed = changed_channels(given, before, product)
                earlier = found[number]
                found[number] = changed if earlier is None else changed | earlier
            made = self._made[number]
            chosen = rows.get(product.weight)
            if chosen is not None and (mine := chosen[product.rows.start : product.rows.stop]).any():
                return disturbed(made, product, mine, sign * self._sizes[number], self._generator)
            return made.clone()

        return replay


__all__ = [
    "Call",
    "Product",
    "ProductFinder",
    "Ranges",
    "Recording",
    "TooLarge",
    "changed_channels",
    "disturbed",
    "double",
    "loosened",
    "ranges",
    "run",
    "size_of_noise",
]
