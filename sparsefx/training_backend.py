"""``sparsify(..., backend=)``: which kernels train the sparse layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sparsefx.capture.arguments import split_arguments
from sparsefx.errors import OptionError, StateError
from sparsefx.ops.semi_structured_product import ProductKernel, kernels_of_device, why_no_kernels
from sparsefx.ops.sparse_training import install
from sparsefx.ops.timing import Timer, cuda_seconds
from sparsefx.passes.choose_training_kernels import choose_training_kernels
from sparsefx.patterns import Pattern
from sparsefx.report import LayerReport

SPARSE_TENSOR_CORES = "sparse_tensor_cores"


def expect_backend(backend: object, pattern: Pattern) -> None:
    """Refuse a backend that there is none of, or that cannot train this pattern or run on this machine."""
    if backend is None:
        return
    if backend != SPARSE_TENSOR_CORES:
        raise OptionError(
            f"backend={backend!r} was given; expected {SPARSE_TENSOR_CORES!r}, or None for dense products of masked weights"
        )
    if pattern.name != "2:4-transposable":
        raise OptionError(
            f"backend={backend!r} was given with pattern {pattern.name!r}; expected '2:4-transposable', whose weights are 2:4 in "
            "both the forward and the backward product"
        )
    problem = why_no_kernels()
    if problem:
        raise StateError(f"backend={backend!r} cannot be used: {problem}; or leave backend out, which gives the same masks")


def install_backend(
    model: nn.Module,
    layers: Sequence[LayerReport],
    example_inputs: Any,
    *,
    kernels: Sequence[ProductKernel] | None = None,
    timer: Timer = cuda_seconds,
) -> tuple[LayerReport, ...]:
    """Put the sparse layers of a sparsified ``model`` onto sparse training kernels where those are faster.

    Args:
        model: sparsified with ``2:4-transposable``.
        layers: the decisions on all its layers.
        example_inputs: as for `sparsify`. Without them, or with the model on another device than the GPU, nothing can be
            measured, and shapes alone decide.
        kernels: to choose from; None stands for those of the GPU.
        timer: that compares them.

    Returns:
        The rows, each sparse one with its ``backend``. All or nothing.

    Raises:
        CaptureError: the model does not run on the inputs.
    """
    chosen_from = kernels_of_device() if kernels is None else tuple(kernels)
    on_gpu = all(parameter.device.type == "cuda" for parameter in model.parameters())
    measurable = example_inputs is not None and (kernels is not None or on_gpu)
    args, kwargs = split_arguments(example_inputs) if measurable else (None, None)
    rows = [layer for layer in layers if layer.sparse]
    choices = choose_training_kernels(model, rows, kernels=chosen_from, timer=timer, args=args, kwargs=kwargs)
    for row in rows:
        module = model.get_submodule(row.parameter.rpartition(".")[0])
        kernel = choices[row.parameter].kernel
        if kernel is not None and isinstance(module, nn.Linear):
            install(module, kernel)
    return tuple(replace(layer, backend=_told(choices, layer, measurable)) if layer.sparse else layer for layer in layers)


def _told(choices: Any, layer: LayerReport, measured: bool) -> str:
    choice = choices[layer.parameter]
    if choice.kernel is None:
        return f"dense: {choice.reason}"
    return f"{SPARSE_TENSOR_CORES} ({choice.kernel.name}{'' if measured else ', not measured'})"
