"""Lower 2:4 Linear layers and 1 x 1 convolutions to torch's kernels for Sparse Tensor Cores, each where that is faster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsefx.capture.arguments import copies
from sparsefx.errors import EligibilityError, VerificationError
from sparsefx.layers import is_computed, known_base, known_weights, runs_own_forward
from sparsefx.ops.semi_structured import GROUP, Compressed, compress, decompress
from sparsefx.ops.semi_structured_layers import (
    SemiStructuredLayer,
    SemiStructuredLinear,
    SemiStructuredPointwise,
    quantize_rows,
)
from sparsefx.ops.semi_structured_product import ProductKernel
from sparsefx.ops.timing import Timer
from sparsefx.passes.acceleration_report import AcceleratedLayer, Acceleration
from sparsefx.passes.layer_calls import LayerCalls, observe_layer_calls

Candidates = Mapping[str, nn.Module]


def lower_semi_structured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    kernels: Sequence[ProductKernel],
    timer: Timer,
    names: frozenset[str] | None = None,
    int8: bool = False,
    minimum_gain: float = 1.02,
) -> Acceleration:
    """Replace, in place, the layers of ``model`` that a sparse kernel is faster for.

    A layer is replaced where all of this holds, and the report has the reason where it does not: it is an ``nn.Linear``,
    transformers' ``Conv1D`` or an ``nn.Conv2d`` with 1 x 1 filters; its weight is 2:4 along the reduction axis, and nothing but
    the layer reads it; a kernel takes its shape and dtype; the packed weight unpacks to the same values; its product is within
    the rounding of the dense one; and on inputs of the shapes seen, all its calls together take less time.

    Args:
        model: in eval mode, on the kernels' device; the caller's own to change. Left half done where an error is raised.
        args, kwargs: what it is called with: their shapes decide.
        kernels: to choose from.
        timer: measures dense and sparse operations beside each other.
        names: of the layers to consider; None stands for all.
        int8: quantize weights (symmetric, a factor for each output) and, as they come, inputs (a factor for each row).
        minimum_gain: dense over sparse time from which a layer is replaced.

    Raises:
        EligibilityError: no Linear or 1 x 1 convolution holds a 2:4 weight.
        CaptureError: the model does not run on the inputs.
        VerificationError: the accelerated model gives NaN or infinity where the given one does not, or another structure.
    """
    found = {name: module for name, module in model.named_modules() if _is_layer(module)}
    problems = {name: _static_problem(name, module, names, int8) for name, module in found.items()}
    candidates = {name: module for name, module in found.items() if not problems[name]}
    if not candidates:
        raise EligibilityError(_none_eligible(problems))
    if any(isinstance(module, nn.Conv2d) for module in candidates.values()):
        _to_channels_last(model)
    expected, calls = observe_layer_calls(model, list(candidates), args, kwargs)
    measured: dict[Any, tuple[Trial, ...]] = {}
    rows: list[AcceleratedLayer] = []
    replacements: dict[int, nn.Module] = {}
    for name, module in found.items():
        if name not in candidates:
            rows.append(_row(name, module, reason=problems[name]))
            continue
        row, replacement = _choose(name, module, calls[name], kernels, timer, int8, minimum_gain, measured)
        rows.append(row)
        if replacement is not None:
            replacements[id(module)] = replacement
    # Under every name, where a layer stands at several places.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in replacements:
            continue
        owner, _, local_name = name.rpartition(".")
        if not name:
            model = replacements[id(module)]
        else:
            setattr(model.get_submodule(owner), local_name, replacements[id(module)])
    difference = _difference(model, expected, args, kwargs) if replacements else 0.0
    return Acceleration(model=model, layers=tuple(rows), largest_difference=difference)


def _to_channels_last(model: nn.Module) -> None:
    """Filters of two dimensions alone: ``model.to(memory_format=...)`` raises where there are others, and would turn tables with
    four axes too, which the model may look at with ``view``."""
    for module in model.modules():
        filters = module._parameters.get("weight")
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and filters is not None:
            filters.data = filters.data.to(memory_format=torch.channels_last)


Trial = tuple[ProductKernel, int, float, float]
"""A kernel, its algorithm, and the seconds of the dense and the sparse layer."""


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight ``[outputs, inputs]`` of a layer that `lower_semi_structured` takes."""
    weight = module.get_parameter("weight").detach()
    known = next(iter(known_weights(module)))
    matrix = weight.flatten(1) if known.reduction_axis == 1 else weight.t()
    return matrix.contiguous()


def compressed_layer(
    module: nn.Module, compressed: Compressed, scale: Tensor | None, kernel: ProductKernel
) -> SemiStructuredLayer:
    """A layer that computes what ``module`` does with the given weight; see `SemiStructuredLayer`."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    kind = SemiStructuredPointwise if isinstance(module, nn.Conv2d) else SemiStructuredLinear
    layer: SemiStructuredLayer = kind(compressed, scale, bias, kernel)
    if isinstance(layer, SemiStructuredPointwise) and isinstance(module, nn.Conv2d):
        layer.stride = (int(module.stride[0]), int(module.stride[1]))
    return layer.eval()


def _is_layer(module: nn.Module) -> bool:
    base = known_base(module)
    return base in (nn.Linear, nn.Conv2d) or (base is not None and base.__name__ == "Conv1D")


def _static_problem(name: str, module: nn.Module, names: frozenset[str] | None, int8: bool) -> str:
    """What the layer itself tells against it."""
    if names is not None and name not in names:
        return "is left out by include or exclude"
    if is_computed(module, "weight"):
        return "its weight is computed (a parametrization); finalize that first"
    if not runs_own_forward(module):
        return f"{type(module).__name__} has a forward of its own, which a compressed layer would not run"
    if module._forward_pre_hooks or module._forward_hooks:
        return "has forward hooks, which a compressed layer would not run; remove them, or exclude it to silence this"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return f"is a convolution with {module.groups} groups; sparse kernels take one group"
        if tuple(module.kernel_size) != (1, 1):
            size = "x".join(map(str, module.kernel_size))
            return f"has {size} filters; only 1x1 convolutions are matrix products without a copy"
        if any(module.padding) if not isinstance(module.padding, str) else module.padding != "valid":
            return "is a 1x1 convolution with padding, which adds places that no product computes"
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        return "its weight has no values; load a checkpoint first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; only floating point weights are lowered"
    matrix = weight_matrix(module)
    if not matrix.numel():
        return "its weight is empty"
    if matrix.shape[1] % (2 * GROUP):
        return f"{matrix.shape[1]} inputs is not a multiple of {2 * GROUP}"
    crowded = ((matrix != 0).view(matrix.shape[0], -1, GROUP).sum(-1) > 2).sum()
    if crowded:
        share = float(crowded) / (matrix.numel() / GROUP)
        return f"its weight is not 2:4 along its inputs: {share:.1%} of the groups of four hold more than two values; sparsify it"
    return "" if not int8 or bool(torch.isfinite(matrix).all()) else "its weight holds NaN or infinity, which int8 cannot"


def _none_eligible(problems: Mapping[str, str]) -> str:
    told = "; ".join(f"{name or 'the model'}: {problem}" for name, problem in list(problems.items())[:3])
    return (
        f"no layer of this model can run on Sparse Tensor Cores: {told or 'it has no Linear and no Conv2d layer'}. "
        "Give a model that sparsefx.sparsify(model, pattern='2:4') has made sparse"
    )


def _row(name: str, module: nn.Module, **fields: Any) -> AcceleratedLayer:
    weight = module._parameters.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    base = known_base(module)
    return AcceleratedLayer(name=name, kind="" if base is None else base.__name__, shape=shape, **fields)


def _choose(
    name: str,
    module: nn.Module,
    calls: LayerCalls,
    kernels: Sequence[ProductKernel],
    timer: Timer,
    int8: bool,
    minimum_gain: float,
    measured: dict[Any, tuple[Trial, ...]],
) -> tuple[AcceleratedLayer, nn.Module | None]:
    """The report on one layer, and its replacement where it is to be replaced. Equal layers are measured once."""
    if calls.problem or not calls.inputs:
        return _row(name, module, reason=calls.problem or "was not called on the example inputs; pass inputs that reach it"), None
    matrix = weight_matrix(module)
    problem = _problem_of_calls(module, calls.inputs, matrix.dtype)
    if problem:
        return _row(name, module, reason=problem), None
    dtype = torch.int8 if int8 else matrix.dtype
    refusals = [kernel.refusal(matrix.shape[0], matrix.shape[1], dtype) for kernel in kernels]
    fitting = [kernel for kernel, refusal in zip(kernels, refusals, strict=True) if not refusal]
    if not fitting:
        return _row(name, module, reason="; ".join(refusals)), None
    seen = tuple((tuple(data.shape), data.stride(), data.dtype) for data in calls.inputs)
    rows = sum(math.prod(data.shape) for data in calls.inputs) // matrix.shape[1]
    wrong, scale = "", None
    values = matrix
    if int8:
        values, factors = quantize_rows(matrix)
        scale = factors[:, 0].contiguous()
    layers: dict[str, SemiStructuredLayer] = {}
    for kernel in fitting:
        layer = compressed_layer(module, compress(values), scale, kernel)
        wrong = _wrong(layer, module, matrix, calls.inputs[0])
        if not wrong:
            layers[kernel.name] = layer
    if not layers:
        return _row(name, module, rows=rows, reason=wrong), None
    key = (
        tuple(module.get_parameter("weight").shape),
        getattr(module, "stride", None),
        module.bias is None,
        matrix.dtype,
        seen,
        tuple(layers),
    )
    if key not in measured:
        measured[key] = _measure(module, layers, calls.inputs, timer)
    kernel, algorithm, dense, sparse = min(measured[key], key=lambda trial: trial[3])
    times = {"rows": rows, "kernel": kernel.name, "dense_seconds": dense, "sparse_seconds": sparse}
    if not sparse * minimum_gain < dense:
        gain = f"{dense / sparse:.2f}" if sparse else "?"
        return _row(name, module, reason=f"the dense layer is as fast: {gain} of its speed with {kernel.name}", **times), None
    chosen = layers[kernel.name]
    chosen.algorithm = algorithm
    return _row(name, module, accelerated=True, **times), chosen


def _problem_of_calls(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> str:
    """What the calls that were seen tell against a layer; empty where it can be measured on inputs like theirs."""
    if not any(data.numel() for data in inputs):
        return "was called with empty inputs alone; pass inputs that reach it"
    other = next((data.dtype for data in inputs if data.dtype != dtype), dtype)
    if other != dtype:
        return f"its weight is {dtype} and its input {other}, by autocast inside of the model; convert the model to one dtype"
    if isinstance(module, nn.Conv2d) and any(data.ndim != 4 for data in inputs):
        return "is called without a batch axis; pass inputs [N, C, H, W]"
    return ""


def _like(data: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    # What an expanded axis repeats is one value.
    shape = [min(size, 1) if step == 0 else size for size, step in zip(data.shape, data.stride(), strict=True)]
    values = torch.randn(shape, generator=generator).to(device=device, dtype=data.dtype)
    return torch.empty_strided(shape, data.stride(), dtype=data.dtype, device=device).copy_(values).expand(data.shape)


@torch.no_grad()
def _wrong(layer: SemiStructuredLayer, module: nn.Module, matrix: Tensor, example: Tensor) -> str:
    """What is wrong with a packed layer, told on random inputs; empty where it computes what the dense layer does.

    Of sums of k products that are rounded to a unit u, each kernel may be off by k u' |x| |w| while it sums (u' of float32), and
    by u of the result at the end, and of the sum before the bias comes.
    """
    restored = layer.kernel.unpack(layer.operands(), layer.in_features)
    if not torch.equal(restored, decompress(layer.compressed())) or (layer.scale is None and not torch.equal(restored, matrix)):
        return f"{layer.kernel.name} did not give the packed weight back as it was; report the GPU and the versions of torch"
    if layer.scale is not None:
        matrix = restored.to(torch.float32) * layer.scale[:, None]
    rows = _like(torch.empty(16, layer.in_features, dtype=example.dtype), matrix.device, torch.Generator().manual_seed(0))
    result, bias = layer.product(rows).double(), layer.bias
    exact_rows = rows.double()
    if layer.scale is not None:
        values, factors = quantize_rows(rows)
        exact_rows = values.double() * factors
    shift = torch.zeros((), dtype=torch.float64, device=matrix.device) if bias is None else bias.double()
    exact = exact_rows @ matrix.double().t() + shift
    magnitude = exact_rows.abs() @ matrix.double().abs().t() + shift.abs()
    unit = torch.finfo(rows.dtype).eps
    summing = 2 * layer.in_features * torch.finfo(torch.float32).eps * magnitude
    allowed = 2 * unit * (exact.abs() + shift.abs()) + summing + unit * unit
    off = (result - exact).abs()
    if bool((off <= allowed).all()):
        return ""
    return (
        f"the product of {layer.kernel.name} is off by {float(off.max()):.3g}, more than rounding; report it with the GPU's name"
    )


@torch.no_grad()
def _measure(
    module: nn.Module, layers: Mapping[str, SemiStructuredLayer], inputs: Sequence[Tensor], timer: Timer
) -> tuple[Trial, ...]:
    generator = torch.Generator().manual_seed(0)
    device = module.get_parameter("weight").device
    data = [_like(one, device, generator) for one in inputs]
    operations = [lambda: [module(one) for one in data]]
    algorithms = []
    for layer in layers.values():
        if isinstance(layer, SemiStructuredLinear) and layer.scale is None:
            rows = max(data, key=Tensor.numel).reshape(-1, layer.in_features)
            layer.algorithm = layer.kernel.fastest_algorithm(rows, layer.operands(), layer.bias)
        algorithms.append(layer.algorithm)
        operations.append(lambda layer=layer: [layer(one) for one in data])  # type: ignore[misc]
    dense, *sparse = timer(operations)
    return tuple(
        (layer.kernel, algorithm, dense, seconds)
        for layer, algorithm, seconds in zip(layers.values(), algorithms, sparse, strict=True)
    )


@torch.no_grad()
def _difference(model: nn.Module, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest difference between the outputs, relative to the largest output of each tensor; NaN where no tensor is found."""
    own_args, own_kwargs = copies(args, kwargs)
    before, after = tree_leaves(expected), tree_leaves(model(*own_args, **own_kwargs))
    if len(before) != len(after):
        raise VerificationError(
            f"the accelerated model gave {len(after)} outputs, the given one {len(before)}; report this model"
        )
    worst = math.nan
    for one, other in zip(before, after, strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point() or not one.numel():
            continue
        if bool(torch.isfinite(one).all()) and not bool(torch.isfinite(other).all()):
            raise VerificationError("the accelerated model gave NaN or infinity where the given one does not; try bfloat16")
        largest = float(one.abs().max())
        if math.isfinite(largest) and largest > 0:
            difference = float((one.double() - other.double()).abs().max()) / largest
            worst = difference if math.isnan(worst) else max(worst, difference)
    return worst
