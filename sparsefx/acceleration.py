"""Inference on Sparse Tensor Cores from torch: `accelerate`, and loading what it saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsefx.api import finalize
from sparsefx.capture.arguments import split_arguments
from sparsefx.errors import OptionError, StateError
from sparsefx.layers import known_base
from sparsefx.model_record import has_records
from sparsefx.ops.semi_structured import Compressed, decompress
from sparsefx.ops.semi_structured_layers import COMPRESSED, SCALE
from sparsefx.ops.semi_structured_product import ProductKernel, kernels_of_device, why_no_kernels
from sparsefx.ops.timing import Timer, cuda_seconds
from sparsefx.passes.acceleration_report import Acceleration
from sparsefx.passes.lower_semi_structured import compressed_layer, lower_semi_structured
from sparsefx.passes.select_layers import Selection, select
from sparsefx.sharded_records import refuse_distributed

_COMPUTED_IN = (torch.float16, torch.bfloat16)


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    include: Selection = None,
    exclude: Selection = None,
    minimum_gain: float = 1.02,
) -> Acceleration:
    """A copy of a 2:4 sparse model for inference on an NVIDIA GPU, with layers on Sparse Tensor Cores where they are faster
    there.

    Linear layers and 1 x 1 convolutions whose weight is 2:4 are measured on inputs of the shapes that they have in
    ``example_inputs``, dense and on each sparse kernel of torch that takes them, and replaced where the sparse one is faster.
    Measure with the batch that you deploy with: small batches are bound by memory and launches, and large ones by arithmetic. The
    replaced layers are plain modules around one custom op with a fixed shape rule, so that ``torch.compile`` and CUDA graphs take
    them.

    Written without a GPU at hand: everything but the kernels themselves is tested on CPU, nothing was run on a GPU yet.

    Args:
        model: sparsified, finalized, or any model whose weights are 2:4; on a CUDA device. It is left exactly as it is.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a pair of both, on the model's device.
        dtype: float16 or bfloat16, what the copy is converted to, with the floating point inputs; int8, to quantize the weights
            that are lowered (symmetric, a factor for each output) and their inputs as they come (a factor for each row) in a
            model that is float16 or bfloat16. None leaves the model's own.
        include, exclude: names, globs, module types or predicates of layers to consider or to leave dense, as for `sparsify`.
        minimum_gain: dense over sparse time from which a layer is replaced.

    Returns:
        The copy, in eval mode and, where convolutions are among the candidates, in channels_last, as ``.model``; with a row for
        every layer and the reason for each that stays dense. ``state_dict()`` of the copy holds compressed weights (9/16 of
        the bytes, 10/16 in int8); `load_accelerated` reads it.

    Raises:
        StateError: there is no GPU with Sparse Tensor Cores, or the model is not on it or sharded.
        OptionError: a dtype that the kernels do not take, or an option out of range.
        EligibilityError: no layer holds a 2:4 weight.
        CaptureError: the model does not run on the inputs.
        VerificationError: the copy gives NaN or infinity where the model does not.
    """
    refuse_distributed(model, "accelerate", "do that on one process, with a model that a checkpoint is loaded into")
    problem = why_no_kernels()
    if problem:
        raise StateError(f"accelerate cannot run here: {problem}. Elsewhere use the model as it is, or sparsefx.export_onnx")
    outside = [name for name, tensor in model.named_parameters() if tensor.device.type != "cuda"]
    if outside:
        raise StateError(f"accelerate was given a model whose {outside[0]} is not on the GPU; call model.cuda() first")
    accelerated = accelerate_with(
        model,
        example_inputs,
        kernels=kernels_of_device(),
        timer=cuda_seconds,
        dtype=dtype,
        include=include,
        exclude=exclude,
        minimum_gain=minimum_gain,
    )
    name = torch.cuda.get_device_name()
    return replace(accelerated, settings={"device": name, **accelerated.settings, "torch": torch.__version__})


def accelerate_with(
    model: nn.Module,
    example_inputs: Any,
    *,
    kernels: tuple[ProductKernel, ...],
    timer: Timer,
    dtype: torch.dtype | None = None,
    include: Selection = None,
    exclude: Selection = None,
    minimum_gain: float = 1.02,
) -> Acceleration:
    """`accelerate` with kernels and a timer of one's own, on any device that these kernels run on."""
    if dtype is not None and dtype not in (*_COMPUTED_IN, torch.int8):
        raise OptionError(f"dtype={dtype} was given; expected torch.float16, torch.bfloat16 or torch.int8")
    if not isinstance(minimum_gain, (int, float)) or not minimum_gain > 0:
        raise OptionError(f"minimum_gain={minimum_gain!r} was given; expected a positive number such as 1.02")
    own = copy.deepcopy(model)
    if has_records(own):
        finalize(own)
    own.eval().requires_grad_(False)
    args, kwargs = split_arguments(example_inputs)
    if dtype in _COMPUTED_IN:
        own.to(dtype)
        args, kwargs = tree_map(lambda leaf: _converted(leaf, dtype), (args, kwargs))
    result = lower_semi_structured(
        own,
        args,
        kwargs,
        kernels=kernels,
        timer=timer,
        names=_chosen(own, include, exclude),
        int8=dtype == torch.int8,
        minimum_gain=minimum_gain,
    )
    shown = dtype or next((tensor.dtype for tensor in own.parameters() if tensor.is_floating_point()), torch.float32)
    return replace(result, settings={"dtype": str(shown).removeprefix("torch.")})


def load_accelerated(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """A copy of ``model`` with the weights of a state_dict that `accelerate` left compressed.

    On a GPU with Sparse Tensor Cores the layers that were compressed are so again, with that GPU's kernel; elsewhere they become
    dense layers with the same weights (int8 ones multiplied out), so that the file can be used anywhere.

    Args:
        model: of the class that was accelerated, dense, on the device and in the dtype that are meant; left as it is.
        state_dict: of ``Acceleration.model``, say from ``torch.load(path, weights_only=True)``.

    Raises:
        StateError: names, shapes or dtypes do not fit the model.
    """
    own = copy.deepcopy(model)
    if has_records(own):
        finalize(own)
    own.eval().requires_grad_(False)
    rest = dict(state_dict)
    names = [
        key.removesuffix("values").removesuffix(".")
        for key in rest
        if key.removesuffix("values").endswith(".") or key == "values"
    ]
    names = [name for name in names if f"{name}.codes".removeprefix(".") in rest]
    kernels = kernels_of_device()
    try:
        for name in names:
            own = _take_in(own, name, rest, kernels)
        own.load_state_dict(rest)
    except StateError:
        raise
    except (RuntimeError, AttributeError, KeyError) as error:
        raise StateError(
            f"the state_dict does not fit {type(model).__name__}: {str(error).splitlines()[0]}; give a model of the class and "
            "configuration that was accelerated"
        ) from error
    return own


def _take_in(own: nn.Module, name: str, rest: dict[str, Any], kernels: tuple[ProductKernel, ...]) -> nn.Module:
    """Put one compressed weight in its place; where that is a dense layer, ``rest`` gets its dense weight instead."""
    prefix = f"{name}." if name else ""
    module = own.get_submodule(name)
    compressed = Compressed(*(rest[prefix + part] for part in COMPRESSED))
    scale, given = rest.get(prefix + SCALE), compressed.values.dtype
    if scale is None and given != module.get_parameter("weight").dtype:
        raise StateError(
            f"the state_dict holds {prefix}values in {given}, and {prefix}weight of the model is "
            f"{module.get_parameter('weight').dtype}; convert the model with .to({given}) first"
        )
    weight = module.get_parameter("weight")
    device = weight.device
    compressed = Compressed(*(part.to(device) for part in compressed))
    scale = None if scale is None else scale.to(device)
    matrix = decompress(compressed)
    transposed = getattr(known_base(module), "__name__", "") == "Conv1D"
    shape = (*(reversed(matrix.shape) if transposed else matrix.shape), *(1 for _ in weight.shape[2:]))
    if shape != tuple(weight.shape):
        raise StateError(
            f"the state_dict holds {prefix}values of a weight {shape}, and {prefix}weight of the model is {tuple(weight.shape)}; "
            "give a model of the configuration that was accelerated"
        )
    fitting = [
        one for one in kernels if device.type == "cuda" and not one.refusal(matrix.shape[0], matrix.shape[1], matrix.dtype)
    ]
    if fitting:
        layer = compressed_layer(module, compressed, scale, fitting[0])
        if not name:
            return layer
        owner, _, local_name = name.rpartition(".")
        setattr(own.get_submodule(owner), local_name, layer)
        return own
    for part in (*COMPRESSED, SCALE):
        rest.pop(prefix + part, None)
    if scale is not None:
        matrix = (matrix * scale[:, None]).to(weight.dtype)
    rest[f"{prefix}weight"] = (matrix.t() if transposed else matrix).reshape(weight.shape)
    return own


def _converted(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _chosen(model: nn.Module, include: Selection, exclude: Selection) -> frozenset[str] | None:
    if include is None and exclude is None:
        return None
    modules = dict(model.named_modules())
    layers = {name: [f"{name}.weight"] for name, module in modules.items() if known_base(module) is not None}
    wanted = select(include, layers, modules, "include")
    unwanted = select(exclude, layers, modules, "exclude") or frozenset()
    return (frozenset(layers) if wanted is None else wanted) - unwanted
