"""Example inputs for an export: randomised within what was seen, and resized where shapes are dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]  # comes with torch
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsefx.errors import CaptureError, OptionError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def random_like(example: Tensor, generator: torch.Generator, shape: tuple[int, ...] | None = None) -> Tensor:
    """Random values of the example's dtype and device: normal with its mean and deviation, or integers in its range.

    Args:
        example: what was given; its values bound the integers, so that indices stay valid.
        generator: on the CPU, so that the values do not depend on the device.
        shape: another shape, or None for the example's.
    """
    size = tuple(example.shape) if shape is None else shape
    if example.numel() == 0:
        return torch.zeros(size, dtype=example.dtype, device=example.device)
    if example.dtype == torch.bool:
        drawn = torch.rand(size, generator=generator) < 0.5
        if bool(example.all()) or not bool(example.any()):
            drawn = example.flatten()[0].cpu().expand(size).clone()
        return drawn.to(example.device)
    if example.is_floating_point() or example.is_complex():
        real = torch.view_as_real(example) if example.is_complex() else example
        mean, deviation = real.double().mean().item(), real.double().std(correction=0).item()
        if not (abs(mean) < float("inf") and 0 < deviation < float("inf")):
            mean, deviation = 0.0, 1.0
        drawn = torch.randn((*size, 2) if example.is_complex() else size, generator=generator) * deviation + mean
        return (torch.view_as_complex(drawn) if example.is_complex() else drawn).to(example.device, example.dtype)
    # Bounds by numpy, since torch has no smallest and largest of unsigned numbers of more than 8 bits; and the bound that
    # randint takes lies behind the largest number.
    low, high = (min(int(bound), 2**63 - 2) for bound in (example.cpu().numpy().min(), example.cpu().numpy().max()))
    return torch.randint(low, high + 1, size, generator=generator, dtype=torch.int64).to(example.device, example.dtype)


def with_free_batch(model: nn.Module, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
    """The inputs, and dynamic shapes that leave the first axis of every tensor among them free under the name ``batch``.

    Tensors whose first axis has size 1 are doubled along it, all or none: torch.export takes a size of 1 for a constant.

    Raises:
        OptionError: no input is a tensor with an axis, or their first axes differ.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = sorted({tensor.shape[0] for tensor in tensors})
    if len(sizes) != 1:
        given = f"first axes of sizes {', '.join(map(str, sizes))}" if sizes else "no tensor with an axis"
        raise OptionError(
            f"dynamic_batch needs inputs that share the size of their first axis, and there are {given}; pass dynamic_shapes"
        )

    def doubled(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    def free(leaf: Any) -> Any:
        return {0: "batch"} if isinstance(leaf, Tensor) and leaf.dim() else None

    args, kwargs = pytree.tree_map(doubled, inputs) if sizes == [1] else inputs
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CaptureError(
            f"the model's forward does not take the example inputs: {error}; give inputs that it accepts"
        ) from error
    shapes: dict[str, Any] = {}
    for name, value in bound.items():
        kind = inspect.signature(model.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            shapes.update({key: pytree.tree_map(free, part) for key, part in value.items()})
        else:
            shapes[name] = pytree.tree_map(free, value)
    return (tuple(args), dict(kwargs)), shapes


def specs_of_leaves(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> list[Any]:
    """What ``dynamic_shapes``, as `torch.export.export` takes it, says of each leaf of the inputs; None where it says nothing.

    Args:
        model: whose forward names the arguments.
        inputs: positional and keyword arguments, which the model accepts.
        dynamic_shapes: by argument name, or one entry for each argument in the order of the signature.
    """
    args, kwargs = inputs
    signature = inspect.signature(model.forward)
    arguments = signature.bind(*args, **kwargs).arguments
    specs: dict[str, Any] = {}
    if isinstance(dynamic_shapes, dict):
        specs = dict(dynamic_shapes)
    elif dynamic_shapes is not None:
        specs = dict(zip(arguments, dynamic_shapes, strict=False))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name not in kwargs:
            specs.update(specs.pop(name, None) or {})
    given = []
    for name, value in signature.bind_partial(*args).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            given += list(specs.get(name) or [None] * len(value))
        else:
            given.append(specs.get(name))
    pairs = [*zip(args, given, strict=False), *((value, specs.get(name)) for name, value in kwargs.items())]
    return [spec for value, given in pairs for spec in _specs_within(value, given)]


def _specs_within(value: Any, spec: Any) -> list[Any]:
    """The part of ``spec`` for each leaf of one argument."""
    if isinstance(value, Tensor):
        return [spec]
    if spec is not None and isinstance(value, (list, tuple)) and isinstance(spec, (list, tuple)):
        return [one for part, given in zip(value, spec, strict=False) for one in _specs_within(part, given)]
    if isinstance(spec, dict) and isinstance(value, dict):
        return [one for key, part in value.items() for one in _specs_within(part, spec.get(key))]
    return [None] * len(pytree.tree_leaves(value))


def random_inputs(inputs: Inputs, generator: torch.Generator, resize: Callable[[int], tuple[int, ...] | None]) -> Inputs:
    """Fresh random values for every tensor among the inputs; ``resize(i)`` gives another shape for the i-th leaf or None."""
    leaves, structure = pytree.tree_flatten(inputs)
    drawn = [
        random_like(leaf, generator, resize(index)) if isinstance(leaf, Tensor) else leaf for index, leaf in enumerate(leaves)
    ]
    args, kwargs = pytree.tree_unflatten(drawn, structure)
    return tuple(args), dict(kwargs)


def resized_shapes(program: torch.export.ExportedProgram, inputs: Inputs, step: int) -> dict[int, tuple[int, ...]]:
    """Shapes with every dynamic size of the program moved by ``step``, by input leaf; empty where nothing can move.

    Sizes stay within the bounds that the program states, and derived sizes (``2 * n``) follow the ones they derive from.
    """
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    dynamic: list[tuple[int, Tensor, list[Any]]] = []
    for index, (name, leaf) in enumerate(zip(program.graph_signature.user_inputs, pytree.tree_leaves(inputs), strict=True)):
        value = placeholders[name].meta.get("val") if isinstance(name, str) and name in placeholders else None
        if isinstance(value, Tensor) and isinstance(leaf, Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape):
            dynamic.append((index, leaf, list(value.shape)))
    moved: dict[Any, int] = {}
    for _, leaf, sizes in dynamic:
        for size, actual in zip(sizes, leaf.shape, strict=True):
            if isinstance(size, torch.SymInt) and len(size.node.expr.free_symbols) == 1:
                (symbol,) = size.node.expr.free_symbols
                (now,) = sympy.solve(size.node.expr - actual, symbol) or (None,)
                bounds = program.range_constraints.get(symbol)
                if now is None or symbol in moved:
                    continue
                target = int(now) + step
                fits = target >= 1 and (bounds is None or (bool(bounds.lower <= target) and bool(target <= bounds.upper)))
                moved[symbol] = target if fits else int(now)
    resized = {
        index: tuple(int(s.node.expr.subs(moved)) if isinstance(s, torch.SymInt) else int(s) for s in sizes)
        for index, _, sizes in dynamic
        if all(s.node.expr.free_symbols <= moved.keys() for s in sizes if isinstance(s, torch.SymInt))
    }
    if len(resized) != len(dynamic) or all(tuple(leaf.shape) == resized[index] for index, leaf, _ in dynamic):
        return {}
    return resized
