"""Which Linear layers train on Sparse Tensor Cores: where a kernel takes both orientations of the weight, and is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsefx.layers import known_base, runs_own_forward
from sparsefx.ops.semi_structured_product import ProductKernel
from sparsefx.ops.sparse_training import sparse_linear, training_refusal
from sparsefx.ops.timing import Timer
from sparsefx.passes.layer_calls import observe_layer_calls
from sparsefx.report import LayerReport
from sparsefx.sparse_parameter import SparseParameter, records_of


@dataclass(frozen=True)
class TrainingKernel:
    """The choice for one layer.

    Attributes:
        kernel: that it is to train on; None for the dense layer.
        reason: why it stays dense; empty where it does not.
    """

    kernel: ProductKernel | None
    reason: str = ""


def choose_training_kernels(
    model: nn.Module,
    rows: Sequence[LayerReport],
    *,
    kernels: Sequence[ProductKernel],
    timer: Timer,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> dict[str, TrainingKernel]:
    """The choice for every row, by the name of its parameter.

    Args:
        model: sparsified with the pattern ``2:4-transposable``; is as before afterwards.
        rows: of its sparse layers.
        kernels: to choose from.
        timer: measures a dense and sparse forward and backward pass beside each other.
        args, kwargs: inputs whose shapes decide. Without them, or where a layer's weight is not on the GPU, shapes alone decide
            and the first kernel that takes the layer is chosen.

    Raises:
        CaptureError: the model does not run on the inputs.
    """
    chosen: dict[str, TrainingKernel] = {}
    fitting: dict[str, tuple[str, nn.Linear, list[ProductKernel]]] = {}
    for row in rows:
        path, _, local_name = row.parameter.rpartition(".")
        module = model.get_submodule(path)
        reason = _static_reason(module, local_name)
        if reason or not isinstance(module, nn.Linear):
            chosen[row.parameter] = TrainingKernel(None, reason)
            continue
        refusals = [
            training_refusal(kernel, module.out_features, module.in_features, _computed_in(module.weight)) for kernel in kernels
        ]
        able = [kernel for kernel, refusal in zip(kernels, refusals, strict=True) if not refusal]
        if able:
            fitting[row.parameter] = (path, module, able)
        else:
            chosen[row.parameter] = TrainingKernel(None, "; ".join(refusals))
    if args is None or not fitting:
        return {**chosen, **{name: TrainingKernel(able[0]) for name, (_, _, able) in fitting.items()}}
    _, calls = observe_layer_calls(model, [path for path, _, _ in fitting.values()], args, kwargs or {})
    measured: dict[Any, TrainingKernel] = {}
    for name, (path, module, able) in fitting.items():
        counts = tuple(data.numel() // module.in_features for data in calls[path].inputs)
        if not counts:
            chosen[name] = TrainingKernel(None, "was not called as a layer on the example inputs; pass inputs that reach it")
            continue
        key = (tuple(module.weight.shape), module.weight.dtype, module.bias is None, counts)
        if key not in measured:
            measured[key] = _fastest(module, records_of(module)["weight"], able, counts, timer)
        chosen[name] = measured[key]
    return chosen


def _static_reason(module: nn.Module, local_name: str) -> str:
    if known_base(module) is not nn.Linear or local_name != "weight":
        return f"is no nn.Linear but a {type(module).__name__}, for which there is no sparse training kernel"
    if not runs_own_forward(module):
        return f"{type(module).__name__} has a forward of its own"
    return ""


def _computed_in(weight: Tensor) -> torch.dtype:
    """The dtype of the products: that of the weight, or autocast's where that is a wider one."""
    return torch.bfloat16 if weight.dtype == torch.float32 and weight.is_cuda else weight.dtype


def _fastest(
    module: nn.Linear, record: SparseParameter, kernels: Sequence[ProductKernel], counts: Sequence[int], timer: Timer
) -> TrainingKernel:
    weight = module.weight.detach()
    dtype = _computed_in(weight)
    generator = torch.Generator().manual_seed(0)

    def random(count: int, width: int) -> Tensor:
        return torch.randn(count, width, generator=generator).to(device=weight.device, dtype=dtype)

    data = [random(count, module.in_features).requires_grad_() for count in counts]
    gradients = [random(count, module.out_features) for count in counts]
    low = weight.to(dtype).requires_grad_()
    bias = None if module.bias is None else module.bias.detach().to(dtype).requires_grad_()

    def step(linear: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                outputs = [linear(one) for one in data]
            leaves = [*data, low] if bias is None else [*data, low, bias]
            return torch.autograd.grad(outputs, leaves, gradients)

        return run

    def sparse(kernel: str) -> Callable[[], object]:
        return step(lambda one: sparse_linear(one, low, record.mask, bias, kernel))

    dense, *times = timer([step(lambda one: functional.linear(one, low, bias)), *(sparse(one.name) for one in kernels)])
    seconds, position = min((time, index) for index, time in enumerate(times))
    if seconds < dense:
        return TrainingKernel(kernels[position])
    gain = f"{dense / seconds:.2f}" if seconds else "?"
    return TrainingKernel(None, f"the dense layer is as fast: {gain} of its speed with {kernels[position].name}")
