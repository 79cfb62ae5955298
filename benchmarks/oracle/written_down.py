"""Runs a model again and again with its products disturbed, and computes only what a disturbance reaches.

The ops of one run are written down, without mutation, and their results kept. A disturbance of a product's output is followed
from op to op as they stand; what gives the same as before is not followed further, and neither are products. It is what
`replay.Recording` finds by running the whole model, in a fraction of the time, for models whose ops can be written down.

Products are held at what they gave, or at that with noise: a ReLU that is zero on all that one input gives hides what is
multiplied by it, and the next input would not.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from benchmarks.oracle.replay import Call, Product, ProductFinder, changed_channels, disturbed, loosened, run, size_of_noise

LARGEST_VALUES = 8 * 2**30
"""Bytes of results beyond which they are not kept."""


Wanted = tuple[Sequence[Tensor], bool]
"""Channels of each product's input that are asked for (bool [C]), and whether the outputs are."""


class NotWrittenDown(Exception):
    """The ops of a model cannot be written down, or do not fit into memory."""


class WrittenDown:
    """One run of a model by its ops.

    Args:
        model: in eval mode; not changed.
        call: its arguments.
        still: of each product, which of its output channels are constant (bool [K]); the others are held at what they were
            with noise. None: all are held at what they were.

    Raises:
        NotWrittenDown: use `replay.Recording`.
    """

    def __init__(self, model: nn.Module, call: Call, still: Sequence[Tensor] | None = None) -> None:
        leaves, spec = tree_flatten(call)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        # Code that keeps what it computes must not keep what stands for tensors while ops are written down.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        copied = copy.deepcopy(model, shared)

        def function(*tensors: Tensor) -> list[Tensor]:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            args, kwargs = tree_unflatten(given, spec)
            return [leaf for leaf in tree_leaves(copied(*args, **kwargs)) if isinstance(leaf, Tensor)]

        tensors = [leaves[place] for place in places]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                module = make_fx(functionalize(function))(*tensors)
        except Exception as error:  # whatever code does that can run but cannot be traced
            raise NotWrittenDown(f"{type(error).__name__}: {error}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        self._nodes = list(module.graph.nodes)
        self._order = {node: number for number, node in enumerate(self._nodes)}
        self._values: dict[fx.Node, Any] = {}
        self._products: dict[fx.Node, int] = {}
        self.products: list[Product] = []
        self._sizes: list[float] = []
        self._of: dict[str, list[fx.Node]] = {}
        self._generator = torch.Generator().manual_seed(1)
        self._stored = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *tensors)}
        self._follows: dict[fx.Node, bool] = {}
        for node in self._nodes:
            follows = node.op == "placeholder" or _multiplies(node)
            self._follows[node] = follows or any(self._follows[source] for source in node.all_input_nodes)
        self._fill(module, tensors, ProductFinder(model))
        self._compare(model, call)
        if still is not None:
            self._loosen(module, tensors, still)
        self._ends: dict[fx.Node, int] = {}
        for node in reversed(self._nodes):
            self._ends[node] = self._ends_of(node)

    def disturb(self, rows: Mapping[str, Tensor], wanted: Wanted | None = None) -> tuple[list[Tensor | None], bool]:
        """As `Recording.disturb`, which finds more than is wanted; what leads nowhere else is not computed."""
        found: list[Tensor | None] = [None] * len(self.products)
        outputs = False
        for sign in (1, -1):
            open_ends = self._open_ends(found, outputs, wanted)
            made: dict[fx.Node, Any] = {}
            for name, chosen in rows.items():
                for node in self._of.get(name, ()):
                    number = self._products[node]
                    product = self.products[number]
                    mine = chosen[product.rows.start : product.rows.stop]
                    if mine.any() and self._ends[node] & open_ends:
                        made[node] = disturbed(self._values[node], product, mine, sign * self._sizes[number], self._generator)
            outputs |= self._follow(made, found, open_ends)
        return found, outputs

    def _open_ends(self, found: Sequence[Tensor | None], outputs: bool, wanted: Wanted | None) -> int:
        """The products, and the outputs, of which not all that is wanted was found: a bit each."""
        ends = 0
        for number, (product, seen) in enumerate(zip(self.products, found, strict=True)):
            channels = torch.ones(len(product.columns), dtype=torch.bool) if wanted is None else wanted[0][number]
            if bool((channels if seen is None else channels & ~seen).any()):
                ends |= 1 << number
        return ends | (not outputs and (wanted is None or wanted[1])) << len(self.products)

    def _follow(self, made: dict[fx.Node, Any], found: list[Tensor | None], open_ends: int) -> bool:
        """Compute what these values reach, as far as products; whether an output is among it."""
        pending = {user for node in made for user in node.users}
        # Ops stand in an order in which they can be computed.
        for node in self._nodes[min((self._order[node] for node in pending), default=len(self._nodes)) :]:
            if node not in pending:
                continue
            if node.op == "output":
                return True
            number = self._products.get(node)
            if number is not None:
                given = node.args[self.products[number].inputs]
                if given in made:
                    changed = changed_channels(made[given], self._values[given], self.products[number])  # type: ignore[index]
                    earlier = found[number]
                    found[number] = changed if earlier is None else changed | earlier
            elif self._ends[node] & open_ends:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: made.get(one, self._values[one]))  # type: ignore[arg-type]
                value = node.target(*args, **kwargs)  # type: ignore[operator]
                if not _equal(value, self._values[node]):
                    made[node] = value
                    pending.update(node.users)
        return False

    def _ends_of(self, node: fx.Node) -> int:
        """The products that an op's result goes into without another in between, and the outputs: a bit each."""
        ends = 0
        for user in node.users:
            number = self._products.get(user)
            if user.op == "output":
                ends |= 1 << len(self.products)
            elif number is None:
                ends |= self._ends[user]
            elif user.args[self.products[number].inputs] is node:
                ends |= 1 << number
        return ends

    def _loosen(self, module: fx.GraphModule, tensors: list[Tensor], still: Sequence[Tensor]) -> None:
        """Hold products at other values, unless these are none that the model can go on with."""
        finite = self._finite()
        held = {
            node: loosened(self._values[node], self.products[number], still[number], self._generator)
            for node, number in self._products.items()
        }
        before, self._values = self._values, {}
        self._fill(module, tensors, None, held)
        if self._finite() != finite:
            self._values = before

    def _finite(self) -> list[bool]:
        return [
            bool(self._values[node.args[self.products[number].inputs]].isfinite().all())  # type: ignore[index]
            for node, number in self._products.items()
        ]

    def _fill(
        self,
        module: fx.GraphModule,
        tensors: list[Tensor],
        finder: ProductFinder | None,
        held: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:
        given = iter(tensors)
        held = held or {}
        storages: dict[int, int] = {}
        torch.manual_seed(0)
        with torch.no_grad():
            for node in self._nodes:
                if node.op == "placeholder":
                    value: Any = next(given)
                elif node.op == "get_attr":
                    value = getattr(module, str(node.target))
                elif node in held:
                    value = held[node]
                elif node.op == "call_function":
                    value = self._first(node, finder)
                else:
                    continue
                self._values[node] = value
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        storage = leaf.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
                if sum(storages.values()) > LARGEST_VALUES:
                    raise NotWrittenDown("its results do not fit")

    def _first(self, node: fx.Node, finder: ProductFinder | None) -> Any:
        node.target = _without_mutation(node)
        func: Callable[..., Any] = node.target  # type: ignore[assignment]
        if func is not operator.getitem and (not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable):
            # What follows from nothing is computed in the order in which code did, and never again.
            changed = self._values[node.all_input_nodes[0]] if node.all_input_nodes else None
            own = isinstance(changed, Tensor) and changed.untyped_storage().data_ptr() not in self._stored
            if not own or not isinstance(func, torch._ops.OpOverload) or self._follows[node]:
                raise NotWrittenDown(f"{func} changes what it is given")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)  # type: ignore[arg-type]
        product = None if finder is None else finder.find(func, args)
        if product is not None:
            self._products[node] = len(self.products)
            self.products.append(product)
            self._of.setdefault(product.weight, []).append(node)
        made = func(*args, **kwargs)
        if product is not None:
            self._sizes.append(size_of_noise(made))
        return made

    def _compare(self, model: nn.Module, call: Call) -> None:
        """The ops as written down have to compute what the model does, through the same products."""
        products: list[Product] = []

        def note(number: int, product: Product, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            products.append(product)
            made: Tensor = func(*args, **kwargs)
            return made

        expected = run(model, call, note)
        outputs = [self._values[node] for node in tree_leaves(self._nodes[-1].args) if isinstance(node, fx.Node)]
        # A bias may be added by an op of its own here: another argument is the input, and sums round differently.
        if [replace(product, inputs=0) for product in products] != [replace(product, inputs=0) for product in self.products]:
            raise NotWrittenDown("its products are others")
        if len(outputs) != len(expected) or not all(map(_close, outputs, expected)):
            raise NotWrittenDown("its outputs are others")


def _multiplies(node: fx.Node) -> bool:
    aten = torch.ops.aten
    return node.target in (aten.convolution.default, aten.addmm.default, aten.mm.default)


def _without_mutation(node: fx.Node) -> Any:
    """The op of a node; where it changes a new tensor that no one else sees, the one that makes another instead."""
    func = node.target
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable or not node.all_input_nodes:
        return func
    changed = node.all_input_nodes[0]
    is_new = isinstance(changed.target, torch._ops.OpOverload) and not any(
        returned.alias_info for returned in changed.target._schema.returns
    )
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
    if changed is not node.args[0] or not is_new or len(changed.users) > 1 or packet is None:
        return func
    return getattr(packet, func._overloadname, func)


def _close(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or not first.is_floating_point() or not first.numel():
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(second.abs().nan_to_num(0).max()), equal_nan=True)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


__all__ = ["NotWrittenDown", "Wanted", "WrittenDown"]
