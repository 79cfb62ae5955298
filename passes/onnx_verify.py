"""Hold an ONNX file against what the model promises: each sparse parameter there, its pattern along the right axis."""

from __future__ import annotations

import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparsefx.errors import ExportError
from sparsefx.passes.onnx_names import Source
from sparsefx.passes.onnx_report import ExportedWeight
from sparsefx.passes.onnx_weights import (
    Array,
    WeightUse,
    broken_groups,
    density_of,
    holds,
    measured_pattern,
    output_axis,
    tensor_core_reason,
    weight_uses,
    with_zeros,
)
from sparsefx.sparse_parameter import sparse_parameters

SOURCE_KEY, AXIS_KEY, PATTERN_KEY, DENSITY_KEY = "sparsefx.source", "sparsefx.axis", "sparsefx.pattern", "sparsefx.density"
_N_OF_M = re.compile(r"(\d+):(\d+)(-transposable|-padded)?")


@dataclass(frozen=True)
class Promise:
    """What the model says of one sparse parameter.

    Attributes:
        name: of the parameter.
        aliases: every name of the same Parameter, its own included.
        pattern: name of the pattern.
        group: N and M, or None where the pattern is not N:M.
        transposable: N:M holds along the output axis too.
        padded: the last group may be shorter, as if zeros stood behind it.
        axis: the parameter's axis along which the pattern runs.
        density: of the mask.
        used: whether the captured graph reads the parameter at all.
    """

    name: str
    aliases: tuple[str, ...]
    pattern: str
    group: tuple[int, int] | None
    transposable: bool
    padded: bool
    axis: int
    density: float
    used: bool


def promises_of(model: nn.Module, program: torch.export.ExportedProgram) -> tuple[Promise, ...]:
    """One promise per sparse parameter.

    Raises:
        ExportError: a weight that its mask excludes is not zero.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    read = {
        program.graph_signature.inputs_to_parameters[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.users and node.name in program.graph_signature.inputs_to_parameters
    }
    promises = []
    for name, parameter, record in sparse_parameters(model):
        mask = record.mask.to(parameter.device)
        stray = int(((parameter.detach() != 0) & ~mask).sum())
        if stray:
            raise ExportError(
                f"{name}: {stray} weights that its {record.pattern.name} mask excludes are not zero; the weights were changed "
                f"behind the mask: apply the masks again, then export"
            )
        match = _N_OF_M.fullmatch(record.pattern.name)
        aliases = tuple(names[id(parameter)])
        promises.append(
            Promise(
                name=name,
                aliases=aliases,
                pattern=record.pattern.name,
                group=(int(match[1]), int(match[2])) if match else None,
                transposable=bool(match and match[3] == "-transposable"),
                padded=bool(match and match[3] == "-padded"),
                axis=record.reduction_axis,
                density=float(mask.double().mean()) if mask.numel() else 0.0,
                used=not read.isdisjoint(aliases),
            )
        )
    return tuple(promises)


def annotate(model: ir.Model, sources: dict[str, Source]) -> None:
    """Record in every weight's ``metadata_props``, in place: source parameter, reduction axis, pattern and density.

    They stand on the tensors themselves, which every reader of the format keeps together with the values.
    """
    for name, value in model.graph.initializers.items():
        source = sources.get(name)
        if source is None or value.const_value is None or source.parameters == (name,):
            continue
        value.const_value.metadata_props[SOURCE_KEY] = source.text
    for use in weight_uses(model):
        tensor = use.value.const_value
        if not use.direct or tensor is None or use.array is None or AXIS_KEY in tensor.metadata_props:
            continue
        (name,) = use.initializers
        tensor.metadata_props[SOURCE_KEY] = sources[name].text if name in sources else ""
        tensor.metadata_props[AXIS_KEY] = str(use.axis)
        tensor.metadata_props[PATTERN_KEY] = measured_pattern(use)
        tensor.metadata_props[DENSITY_KEY] = f"{density_of(use.array):.6f}"


def verify_file(
    file: ir.Model, model: nn.Module, promises: tuple[Promise, ...], sources: dict[str, Source]
) -> tuple[tuple[ExportedWeight, ...], list[str]]:
    """Check every promise on a file as read back from the disk.

    A parameter that is N:M along the axis of the op that reads it has to be so in the file; a sparse parameter has to
    be there. A weight without a promise is measured: where the model's own weight is 2:4 along that axis, the file's has
    to be as well.

    Returns:
        The file's weights, and what was checked in words.

    Raises:
        ExportError: names the parameter and what is wrong with it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = list(weight_uses(file))
    weights = tuple(_row(use, sources) for use in uses)
    checks: list[str] = []
    for promise in promises:
        mine = [use for use in uses if _sources(use, sources) & set(promise.aliases)]
        if not mine:
            twins = _twins(file, parameters[promise.name])
            mine = [use for use in uses if twins & set(use.initializers)]
        if mine or not promise.used:
            checks.append(_keep(promise, mine, sources))
        else:
            checks.append(_keep_elsewhere(promise, file, parameters[promise.name], sources))
    promised = {alias for promise in promises for alias in promise.aliases}
    measured = [use for use in uses if not (_sources(use, sources) & promised)]
    kept = sum(_keep_measured(use, parameters, sources) for use in measured)
    if kept:
        checks.append(f"{kept} weights without a record are 2:4 in the model, and so in the file along the reduction axis")
    return weights, checks


def _keep(promise: Promise, uses: list[WeightUse], sources: dict[str, Source]) -> str:
    """Check one promise on the ops that read the parameter; the text of what was checked."""
    if not uses:
        return f"{promise.name}: not read in eval mode, so it is not in the file"
    held, other_way = [], []
    for use in uses:
        if use.array is None or use.axis is None:
            problem = use.problem or f"{use.op} has no axis that is known"
            raise ExportError(
                f"{promise.name}: its {promise.pattern} weights cannot be found in the file: {problem} (at {use.op} "
                f"{use.node!r}); use the parameter directly in the layer"
            )
        if promise.group is None:
            _keep_density(promise, use, sources)
            held.append(use)
            continue
        keep, size = promise.group
        source = sources.get(use.initializers[0]) if use.direct else None
        axis = source.permutation[use.axis] if source is not None and source.permutation is not None else None
        whole = -(-use.array.shape[use.axis] // size) * size if promise.padded else use.array.shape[use.axis]
        if holds(with_zeros(use.array, use.axis, whole), use.axis, keep, size):
            other = output_axis(use.op, use.axis, use.array.ndim)
            if promise.transposable and axis is not None and not holds(use.array, other, keep, size):
                raise ExportError(_broken(promise, use, use.array, other))
            held.append(use)
        elif axis is not None and axis != promise.axis:
            other_way.append(use)
        else:
            raise ExportError(_broken(promise, use, use.array, use.axis))
    if not held:
        use = other_way[0]
        raise ExportError(
            f"{promise.name}: its mask is {promise.pattern} along axis {promise.axis} of the parameter, and {use.op} "
            f"{use.node!r} sums over its other axis; sparsify it along the axis that is summed over, or use a transposable one"
        )
    text = ", ".join(f"{use.op} axis {use.axis}" for use in held)
    note = f"; {len(other_way)} further use sums over the other axis, where it is not {promise.pattern}" if other_way else ""
    return f"{promise.name}: {promise.pattern} in the file ({text}){note}"


def _broken(promise: Promise, use: WeightUse, array: Array, axis: int) -> str:
    assert promise.group is not None
    keep, size = promise.group
    length = array.shape[axis]
    if length % size:
        what = f"{length} values there are not a multiple of {size}"
    else:
        broken, total = broken_groups(array, axis, keep, size)
        what = f"{broken} of {total} groups have more than {keep} non-zeros"
    return (
        f"{promise.name}: {promise.pattern} in the model, but not in the file along axis {axis} of {use.op} {use.node!r}: "
        f"{what}; this is a fault of the lowering for this model: exclude the parameter, or report it"
    )


def _keep_density(promise: Promise, use: WeightUse, sources: dict[str, Source]) -> None:
    assert use.array is not None
    source = sources.get(use.initializers[0]) if len(use.initializers) == 1 else None
    whole = use.direct and source is not None and source.permutation is not None
    if whole and density_of(use.array) > promise.density + 1e-9:
        raise ExportError(
            f"{promise.name}: its {promise.pattern} mask has density {promise.density:.4f}, and the file's weight "
            f"{density_of(use.array):.4f} in {use.op} {use.node!r}; this is a fault of the lowering for this model: report it"
        )


def _keep_elsewhere(promise: Promise, file: ir.Model, parameter: Tensor, sources: dict[str, Source]) -> str:
    """A sparse parameter that no matrix product, convolution or recurrent op of the file reads."""
    readers: list[str] = []
    for name, value in file.graph.initializers.items():
        source = sources.get(name)
        if source is not None and set(source.parameters) & set(promise.aliases) and value.const_value is not None:
            readers += [node.op_type for node, _ in value.uses()]
            density = density_of(value.const_value.numpy())
            if source.permutation is not None and density > promise.density + 1e-9:
                raise ExportError(f"{promise.name}: density {promise.density:.4f} in the model and {density:.4f} in the file")
    if not readers:
        raise ExportError(
            f"{promise.name}: the model promises {promise.pattern}, and no initializer of the file comes from it; exclude "
            f"the parameter, or use it directly in the layer"
        )
    if promise.group is not None:
        raise ExportError(
            f"{promise.name}: the file reads it by {', '.join(dict.fromkeys(readers))} only, where no reduction axis is "
            f"known, so {promise.pattern} cannot be checked; exclude the parameter"
        )
    return f"{promise.name}: density {promise.density:.3f} kept in the file (read by {', '.join(dict.fromkeys(readers))})"


def _keep_measured(use: WeightUse, parameters: dict[str, nn.Parameter], sources: dict[str, Source]) -> bool:
    """True where the model's weight is 2:4 along the axis of this op, which the file then has to be; False elsewhere."""
    source = sources.get(use.initializers[0]) if use.direct else None
    if source is None or source.permutation is None or use.axis is None or use.array is None:
        return False
    parameter = parameters.get(source.parameters[0])
    if parameter is None:
        return False
    own_axis = source.permutation[use.axis]
    if not holds(_to_numpy(parameter), own_axis, 2, 4):
        return False
    if not holds(use.array, use.axis, 2, 4):
        broken, total = broken_groups(use.array, use.axis, 2, 4)
        raise ExportError(
            f"{source.parameters[0]}: 2:4 along axis {own_axis} in the model, but not in the file along axis {use.axis} of "
            f"{use.op} {use.node!r}: {broken} of {total} groups have more than two non-zeros; this is a fault of the "
            f"lowering for this model: report it"
        )
    return True


def _row(use: WeightUse, sources: dict[str, Source]) -> ExportedWeight:
    array = use.array
    return ExportedWeight(
        name="+".join(use.initializers),
        source="+".join(dict.fromkeys(sources[name].text for name in use.initializers if name in sources)),
        op=use.op,
        axis=use.axis,
        pattern=measured_pattern(use),
        density=1.0 if array is None else density_of(array),
        shape=() if array is None else tuple(int(size) for size in array.shape),
        tensor_core_reason=tensor_core_reason(use),
    )


def _sources(use: WeightUse, sources: dict[str, Source]) -> set[str]:
    return {parameter for name in use.initializers if name in sources for parameter in sources[name].parameters}


def _twins(file: ir.Model, parameter: Tensor) -> set[str]:
    """Initializers that hold the parameter's values, as they are or transposed: equal small tensors are stored once."""
    values = _to_numpy(parameter)
    views = [values] + ([np.swapaxes(values, -1, -2)] if values.ndim > 1 else [])
    found = set()
    for name, value in file.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.size == values.size:
            array = tensor.numpy()
            if any(array.shape == view.shape and np.array_equal(array, view) for view in views):
                found.add(name)
    return found


def _to_numpy(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
