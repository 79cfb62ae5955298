"""Rung 2: one run of the model itself, with every op that reads a parameter noted."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefx.capture.arguments import copies, describe_arguments
from sparsefx.capture.graph_uses import as_site
from sparsefx.capture.state import unchanged
from sparsefx.capture.uses import (
    METADATA,
    ONE_HOT,
    SAME_ELEMENTS,
    SCALINGS,
    VIEWS,
    View,
    as_lookup,
    is_known_product,
    op_name,
    read_uses,
)
from sparsefx.errors import CaptureError
from sparsefx.program import CallSite, Rung


def observe_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Mapping[int, str]) -> list[CallSite]:
    """Run the model once on these inputs, in the mode that it is in, and give every use of a parameter, in order.

    The model and the random generators are as before afterwards.

    Raises:
        CaptureError: the model's own forward raises on the inputs.
    """
    observer = _Observer(model, names)
    with unchanged(model, parameters=True):
        try:
            own_args, own_kwargs = copies(args, kwargs)
            with observer:
                model(*own_args, **own_kwargs)
        except Exception as error:
            mode = "train" if model.training else "eval"
            given = describe_arguments(args, kwargs)
            raise CaptureError(
                f"{type(model).__name__} was given example inputs {given} and raised in {mode} mode: "
                f"{type(error).__name__}: {error}. Expected inputs that the model accepts in this mode; pass a tensor, a "
                f"tuple of arguments, a dict of keyword arguments or a pair (args, kwargs), or no example_inputs at all"
            ) from error
    return observer.sites


class _Observer(TorchFunctionMode):
    """Notes what reads a parameter: the parameter itself, a view of its storage, or a cast of it."""

    def __init__(self, model: nn.Module, names: Mapping[int, str]) -> None:
        super().__init__()
        self.sites: list[CallSite] = []
        self.owners = {name: name.rpartition(".")[0] for name in names.values()}
        self.parameters = {id(p): View.of(names[id(p)], p) for p in model.parameters()}
        # Results that hold a parameter's elements in storage of their own; the tensor is kept so that its id stays its own.
        self.derived: dict[int, tuple[Tensor, View]] = {}
        self.one_hot: dict[int, Tensor] = {}
        self.storages: dict[int, list[tuple[int, int, View]]] = {}
        for parameter in model.parameters():
            address = _address(parameter)
            if address:
                start = int(parameter.storage_offset())
                entry = (start, start + _extent(parameter), self.parameters[id(parameter)])
                self.storages.setdefault(address, []).append(entry)
        for entries in self.storages.values():
            entries.sort(key=lambda entry: entry[0])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = op_name(func)
        if name not in METADATA and name != "__set__":
            self.note(name, args, kwargs, result)
        return result

    def note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        view = self.view_of(args[0]) if args else None
        passes_on = name in VIEWS or name in SAME_ELEMENTS
        if isinstance(result, Tensor) and (name == ONE_HOT or (passes_on and bool(args) and id(args[0]) in self.one_hot)):
            self.one_hot[id(result)] = result
            return
        if name in VIEWS and view is not None:
            copied = isinstance(result, Tensor) and self.view_of(result) is None
            if not copied:
                return  # the results are found by their storage
            # A copy of a rearranged parameter (`reshape` of a transposed one): which axis is which is lost.
        elif name in SAME_ELEMENTS and view is not None:
            if isinstance(result, Tensor) and self.view_of(result) is None:
                self.derived[id(result)] = (result, view)
            return
        elif name in SCALINGS and isinstance(result, Tensor):
            found = [v for v in (self.view_of(a) for a in args) if v is not None]
            divided = name not in ("mul", "__mul__", "__rmul__", "multiply", "imul") and view is None
            if len(found) == 1 and not divided and tuple(result.shape) == found[0].view_shape:
                self.derived[id(result)] = (result, found[0])
                return
        shape = _shape(result)
        looks_up = is_known_product(name) and any(id(argument) in self.one_hot for argument in args)
        for use in read_uses(name, args, kwargs, self.view_of, _shape, shape):
            use = as_lookup(use) if looks_up else use
            self.sites.append(as_site(use, self.owners[use.view.parameter], Rung.OBSERVED))

    def view_of(self, value: Any) -> View | None:
        if not isinstance(value, Tensor):
            return None
        own = self.parameters.get(id(value))
        if own is not None:
            return own
        if id(value) in self.derived:
            return self.derived[id(value)][1]
        entries = self.storages.get(_address(value))
        if entries is None:
            return None
        index = bisect.bisect_right(entries, value.storage_offset(), key=lambda entry: entry[0]) - 1
        if index < 0 or value.storage_offset() >= entries[index][1]:
            return None
        return entries[index][2].like(value)


def _address(tensor: Tensor) -> int:
    """Where the storage lies; 0 where there is none (meta tensors, and layouts without storage)."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return 0
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().data_ptr()
        except RuntimeError:
            return 0


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def _shape(value: Any) -> tuple[int, ...] | None:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else None
