"""The public functions. Each is thin: it checks what it was given and calls the passes and the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sparsefx import algorithms, checkpoint, patterns
from sparsefx.algorithms import Algorithm, Exploit
from sparsefx.algorithms.options import expect_generator, expect_steps
from sparsefx.densities import Densities
from sparsefx.dormant_values import compact_of
from sparsefx.errors import EligibilityError, NonFiniteError, OptionError, StateError
from sparsefx.first_masks import first_masks, method_of
from sparsefx.inputs import with_zeros, without_values
from sparsefx.live_rows import dense_row, live_row
from sparsefx.model_record import ModelRecord, forget, has_records, model_records, set_model_record
from sparsefx.one_shot import OneShotMethod
from sparsefx.ops.split import merge
from sparsefx.passes.analyze_eligibility import Analysis, Eligibility, Selection, analyze
from sparsefx.passes.insert_masks import masked_graph
from sparsefx.passes.lower_onnx import Encoding, lower_onnx
from sparsefx.passes.lower_parts import PartsReport, lower_parts
from sparsefx.passes.onnx_report import ExportReport
from sparsefx.patterns import Pattern
from sparsefx.report import Audit
from sparsefx.runtime import MaskRuntime
from sparsefx.schedules import DensitySchedule, density_at
from sparsefx.sharded_records import refuse_distributed, share_out
from sparsefx.shards import values_of
from sparsefx.sparse_parameter import SparseParameter, add_record, expect_masked, sparse_parameters
from sparsefx.training_backend import expect_backend, install_backend

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    *,
    pattern: str | Pattern = "2:4",
    density: float | None = None,
    algorithm: str | Algorithm | OneShotMethod = "magnitude",
    densities: Densities | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
    example_inputs: Any = None,
    include: Selection = None,
    exclude: Selection = None,
    eligibility: Eligibility | None = None,
    backend: str | None = None,
) -> Model:
    """Make the eligible Linear and Conv weights of ``model`` sparse, in place, all or nothing.

    The module, its classes, Parameters and state_dict keys stay what they are; each eligible weight now holds
    participating values and zeros. `attach` makes the masks follow training, `audit` tells what became of each layer.

    Args:
        model: any module. Its code needs no change.
        pattern: which masks are allowed, see `patterns.parse`.
        density: share of weights that participate, where the pattern leaves it free (0.5 by default there).
        algorithm: how masks are chosen and move: a name (see `sparsefx.algorithms`), or an Algorithm with options of your own; or
            for pretrained weights, from calibration batches and for good: ``"wanda"`` or ``"sparsegpt"``, which also changes
            the weights that stay (or an object of `sparsefx.one_shot`).
        densities: how ``density`` is divided among layers: ``"uniform"``, ``"erk"``, ``"global"``, ``"steps"`` (numbers
            of filters end where hardware gets faster), or a dict of layer names or globs to densities; see
            `sparsefx.densities.layer_densities`. None means the algorithm's own, mostly uniform.
        calibration: batches that algorithms look at which score weights by data (``"snip"``, ``"grasp"``,
            ``"wanda"``, ``"sparsegpt"``).
        loss_fn: for these, ``loss_fn(model, batch)`` is the loss of one batch, a tensor without dimensions.
        generator: a CPU generator for masks that begin at random; None stands for a new one with seed 0.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or a pair of both. With them,
            weights used outside layer modules and the heads of language models are recognised, and FLOPs counted.
        include: names, globs, module types or predicates ``(name, module) -> bool`` of the layers to consider.
        exclude: likewise, of layers to leave dense.
        eligibility: the rule to use in place of the paper's.
        backend: ``"sparse_tensor_cores"`` trains ``2:4-transposable`` Linear layers on an NVIDIA GPU's sparse kernels, each where
            that is faster on ``example_inputs``; the audit tells which, and why not. None multiplies zeros.

    Returns:
        The same object.

    Raises:
        StateError: the model is sparsified already, or this machine has no kernels for ``backend``.
        PatternError, OptionError: unknown pattern or algorithm, or densities or an algorithm that do not fit the pattern.
        EligibilityError: no layer is eligible, or ``include``/``exclude`` match nothing.
        CaptureError: the model does not run on the example inputs.
        NonFiniteError: a weight holds NaN or infinity.
    """
    _expect_module(model, "sparsify")
    if has_records(model):
        raise StateError(
            "sparsify was given a model that is sparsified already; call sparsefx.finalize(model) first to choose again"
        )
    refuse_distributed(model, "sparsify", "call sparsify before fully_shard or parallelize_module, and attach after it")
    chosen = _pattern(pattern, "sparsify")
    expect_backend(backend, chosen)
    expect_generator(generator)
    resolved = chosen.resolve_density(density)
    method = method_of(algorithm, chosen, calibration=calibration, densities=densities)
    moves = method.algorithm
    analysis = analyze(
        model,
        example_inputs=example_inputs,
        pattern=chosen,
        density=resolved,
        eligibility=_eligibility(eligibility, "sparsify"),
        include=include,
        exclude=exclude,
    )
    rows = [layer for layer in analysis.layers if layer.sparse]
    if not rows:
        raise EligibilityError(_nothing_eligible(analysis))
    for row in rows:
        _expect_finite(row.name, model.get_parameter(row.parameter).detach())
    # Tensors made in inference mode could never be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        first = first_masks(
            model,
            rows,
            method=method,
            pattern=chosen,
            density=resolved,
            densities=densities,
            calibration=calibration,
            loss_fn=loss_fn,
            generator=generator,
            example_inputs=example_inputs,
            coupled=analysis.coupled,
        )
        weights = [model.get_parameter(row.parameter).detach() for row in rows]
        beside = [
            mask if mask.stride() == weight.stride() else torch.empty_like(weight, dtype=torch.bool).copy_(mask)
            for mask, weight in zip(first.masks, weights, strict=True)
        ]
        records = [
            SparseParameter(
                pattern=chosen,
                density=moves.first_density(share),
                target=None if moves.first_density(share) == share else share,
                reduction_axis=row.reduction_axis,
                mask=mask,
                # A one-shot method has masked the weights already, and has its own way back.
                compact=None if method.one_shot is not None else compact_of(weight, mask),
                algorithm=moves,
                coupled=analysis.coupled.get(row.parameter),
            )
            for row, weight, mask, share in zip(rows, weights, beside, first.densities, strict=True)
        ]
        remembered = ModelRecord(
            pattern=chosen.name,
            density=resolved,
            algorithm=method.name,
            layers=analysis.layers,
            unseen=analysis.unseen,
            inputs=None if example_inputs is None else without_values(example_inputs),
        )
        try:
            for row, weight, record in zip(rows, weights, records, strict=True):
                weight.masked_fill_(~record.mask, 0)
                module_name, _, local_name = row.parameter.rpartition(".")
                add_record(model.get_submodule(module_name), local_name, record)
            checkpoint.watch_loading(model)
            if backend is not None:
                remembered.layers = install_backend(model, analysis.layers, example_inputs)
            set_model_record(model, remembered)
        except BaseException:
            merge(weights, records)
            first.undo()
            forget(model)
            raise
        if not moves.keeps_dormant:
            for record in records:
                record.compact = None
    return model


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    total_steps: int,
    rewire_every: int | None = None,
    scale: float | None = None,
    exploit: Exploit | None = None,
    reset_every: int | None = None,
    fix_after: float | None = None,
    decay: float | None = None,
    steps_per_epoch: int | None = None,
    generator: torch.Generator | None = None,
    density_schedule: DensitySchedule | None = None,
    check_every: int | None = None,
    replace: bool = False,
    **options: Any,
) -> MaskRuntime:
    """Let the masks of a sparsified model follow ``optimizer.step()``; the training loop stays as it is.

    Args:
        model: what `sparsify` returned, or a module that contains it (DDP, a compiled module).
        optimizer: one optimizer or several; each masked parameter is followed by the one that holds it.
        total_steps: optimizer steps of the whole run; the defaults of other options depend on it.
        rewire_every: r, steps from one choice of masks to the next (magnitude: 1, rigl: 100).
        scale: s, factor on gradients of weights that do not participate (magnitude: 1).
        exploit: ``"reset"`` (magnitude's default), ``"fix"``, ``"regularize"`` or ``"none"``.
        reset_every: z, with ``"reset"`` (1000, in short runs a tenth of ``total_steps``).
        fix_after: v, with ``"fix"`` (0.5); of methods that drop and grow, the share of the run after which masks stay.
        decay: beta, with ``"regularize"`` (2e-4).
        steps_per_epoch: for methods that change masks once an epoch (``len(loader)``).
        generator: a CPU generator for methods that draw at random; None stands for a new one with seed 0. Its state is in the
            runtime's state_dict. Replicas need the same seed.
        density_schedule: step -> density, for patterns whose density is free; see `sparsefx.schedules`.
        check_every: steps between two looks at the device's NaN flag (100; on CPU each step looks, at no cost).
        replace: take over parameters that another runtime follows.
        options: any other option of the algorithm, such as ``drop_fraction`` or ``growth``: the fields of its class.

    Returns:
        The runtime. Its ``report()`` has the values in force; its state_dict belongs into checkpoints.

    Raises:
        StateError: the model is not sparsified, or is followed already.
        OptimizerError: an optimizer holds none of the masked parameters, or its steps cannot be hooked.
        OptionError: an option out of range, or without effect.
    """
    _expect_module(model, "attach")
    found: list[Algorithm] = []
    for _, _, record in sparse_parameters(model):
        if record.algorithm is not None and record.algorithm not in found:
            found.append(record.algorithm)
    if not found:
        raise StateError("attach was given a model that is not sparsified; call sparsefx.sparsify(model) first")
    if len(found) > 1:
        names = ", ".join(sorted(method.name for method in found))
        raise StateError(f"the parts of this model were sparsified with {names}; attach to each part on its own")
    named = {
        "rewire_every": rewire_every,
        "scale": scale,
        "exploit": exploit,
        "reset_every": reset_every,
        "fix_after": fix_after,
        "decay": decay,
    }
    method = found[0].with_options({**{name: value for name, value in named.items() if value is not None}, **options})
    expect_steps("total_steps", total_steps)
    expect_generator(generator)
    expect_steps("check_every", 100 if check_every is None else check_every)
    if steps_per_epoch is not None:
        expect_steps("steps_per_epoch", steps_per_epoch)
    if density_schedule is not None:
        _check_schedule(model, density_schedule, method, total_steps)
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers:
        raise OptionError("attach was given no optimizer; expected one, or a list of them")
    return MaskRuntime(
        model,
        optimizers,
        method,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        generator=generator,
        density_schedule=density_schedule,
        check_every=100 if check_every is None else check_every,
        replace=replace,
    )


def graph(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """The rewritten Program of a sparsified model: a graph with masked ops as nodes, over the same Parameters and masks.

    It runs, and trains on the very parameters of ``model``; outputs and gradients equal the module's bit for bit, in the
    mode (train or eval) that the model is in now. Without ``example_inputs`` the shapes given to `sparsify` are used,
    and where there were none, the model is traced without inputs. One exception to equality: in eval mode *without gradients*
    torch replaces nn.TransformerEncoderLayer and nn.MultiheadAttention by a fused kernel, which cannot be captured and rounds
    differently; the graph holds the ordinary operations.

    Raises:
        StateError: the model is not sparsified.
        CaptureError: the model as a whole cannot be captured as one graph.
    """
    _expect_module(model, "graph")
    refuse_distributed(model, "graph")
    if not has_records(model):
        raise StateError("graph was given a model that is not sparsified; call sparsefx.sparsify(model) first")
    if example_inputs is None:
        own = [record for module, record in model_records(model) if module is model]
        example_inputs = with_zeros(own[0].inputs) if own else None
    return masked_graph(model, example_inputs)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks by full parameter name: bool, in the parameter's shape, True where a weight participates (copies; of
    sharded parameters DTensors, cut alike)."""
    _expect_module(model, "masks")
    return {name: record.distributed(record.mask.clone()) for name, _, record in sparse_parameters(model)}


def finalize(model: Model) -> Model:
    """End sparse training, in place: zeros are baked in, masks and dormant values are gone, ordinary layers remain.

    Raises:
        StateError: the model is not sparsified.
        NonFiniteError: a weight holds NaN or infinity.
    """
    _expect_module(model, "finalize")
    if not has_records(model):
        raise StateError("finalize was given a model that is not sparsified; there is nothing to bake in")
    share_out(model)
    found = list(sparse_parameters(model))
    for name, parameter, record in found:
        expect_masked(name, parameter, record)
        _expect_finite(name, values_of(parameter))
    with torch.no_grad():
        for _, parameter, record in found:
            weight = values_of(parameter)
            record.settle(weight)
            record.follow(weight)
            weight.masked_fill_(~record.mask, 0)
    forget(model)
    return model


def audit(
    model: nn.Module,
    *,
    pattern: str | Pattern = "2:4",
    density: float | None = None,
    example_inputs: Any = None,
    include: Selection = None,
    exclude: Selection = None,
    eligibility: Eligibility | None = None,
) -> Audit:
    """Which layers are sparse and why others are not; of a dense model, which would be and why others would not.

    For a sparsified model the decisions are those of `sparsify`, with densities and empty channels as they are now, and
    the other arguments are not used. Nothing is changed. Raises what `sparsify` raises, but reports a model without any
    eligible layer instead of refusing it.
    """
    _expect_module(model, "audit")
    refuse_distributed(model, "audit")
    records = list(model_records(model))
    inside = {id(parameter) for parameter in records[0][0].parameters()} if len(records) == 1 else set()
    if records and records[0][0] is not model and {id(parameter) for parameter in model.parameters()} == inside:
        return audit(records[0][0])  # of a wrapper: torch.compile, DataParallel, Sequential
    own = [record for module, record in records if module is model]
    if own:
        record = own[0]
        current = {name: masked for name, _, masked in sparse_parameters(model)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        layers = tuple(
            live_row(layer, parameters[layer.parameter], current.get(layer.parameter)) if layer.parameter in parameters else layer
            for layer in record.layers
        )
        settings = {"pattern": record.pattern, "density": record.density, "algorithm": record.algorithm}
        return Audit(layers=layers, unseen=record.unseen, settings=settings, title=type(model).__name__)
    chosen = _pattern(pattern, "audit")
    resolved = chosen.resolve_density(density)
    analysis = analyze(
        model,
        example_inputs=example_inputs,
        pattern=chosen,
        density=resolved,
        eligibility=_eligibility(eligibility, "audit"),
        include=include,
        exclude=exclude,
    )
    layers = analysis.layers
    masked = {name for name, _, _ in sparse_parameters(model)}
    if masked:
        layers = tuple(layer if layer.parameter in masked else dense_row(layer) for layer in layers)
    settings = {"pattern": chosen.name, "density": resolved, "sparsified": bool(masked)}
    return Audit(layers=layers, unseen=analysis.unseen, settings=settings, title=type(model).__name__)


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | PathLike[str],
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    weights: Encoding = "plain",
    pad_channels: bool = False,
) -> ExportReport:
    """Write ``model`` as an ONNX file that was checked: patterns, the ONNX checker, and onnxruntime against the model.

    The model is left as it is; a file already at ``path`` is replaced only when every check held.

    Args:
        model: sparsified, finalized or plain.
        example_inputs: as for `sparsify`.
        path: where to write.
        dynamic_shapes: as for ``torch.export.export``; a text in place of a ``Dim`` names a dynamic size.
        dynamic_batch: leave the first axis of every input tensor free, in place of ``dynamic_shapes``.
        opset: ONNX opset version; None means the exporter's default.
        weights: ``"plain"`` initializers, or ``"compact"``: 2:4 weights as values and 4-bit codes, which standard ops
            decode when a runtime loads the file. TensorRT needs plain ones; `densify_onnx` restores them.
        pad_channels: pad the inputs of 2:4 weights with zeros to a multiple of 16, or of 4, where the padded sparse product has
            fewer terms than the dense one; outputs stay the same. The report tells which.

    Raises:
        ExportError: torch.export refuses the model, a check fails, or the file cannot be written.
        StateError: the model is on the meta device.
        NonFiniteError: a weight holds NaN or infinity.
    """
    _expect_module(model, "export_onnx")
    refuse_distributed(model, "export_onnx")
    return lower_onnx(
        model,
        example_inputs,
        path,
        dynamic_shapes=dynamic_shapes,
        dynamic_batch=dynamic_batch,
        opset=opset,
        weights=weights,
        pad_channels=pad_channels,
    )


def export_parts(model: nn.Module, example_inputs: Any, folder: str | PathLike[str], *, opset: int | None = None) -> PartsReport:
    """Of a model that cannot be exported as a whole, write the largest submodules that can: a detector's backbone and heads.

    Each file is checked as by `export_onnx`, named after its module's path, and takes what that module was given when the model
    ran on ``example_inputs``. ``report.uncovered`` lists Linear/Conv weights that are in no file.

    Raises:
        CaptureError: the model does not run on the example inputs.
        ExportError: no part can be exported, or a file cannot be written.
    """
    _expect_module(model, "export_parts")
    refuse_distributed(model, "export_parts")
    return lower_parts(model, example_inputs, folder, opset=opset)


def _expect_module(model: object, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"{caller} was given a {type(model).__name__}; expected a torch.nn.Module")


def _expect_finite(name: str, weight: Tensor) -> None:
    if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"{name}: the weight holds NaN or infinity; expected finite values. Load a good checkpoint, or exclude the layer"
        )


def _nothing_eligible(analysis: Analysis) -> str:
    reasons: dict[str, list[str]] = {}
    for layer in analysis.layers:
        reasons.setdefault(layer.reason, []).append(layer.name)
    told = "; ".join(f"{names[0]}: {reason}" for reason, names in list(reasons.items())[:3])
    return (
        f"no layer of this model can be sparse: {told or 'it has no Linear or Conv layer'}. "
        "sparsefx.audit(model) lists all reasons; widen include, or pass another pattern or eligibility"
    )


def _check_schedule(model: nn.Module, schedule: DensitySchedule, method: algorithms.Algorithm, total_steps: int) -> None:
    if not callable(schedule):
        raise OptionError(f"density_schedule={schedule!r} was given; expected a function of the step, see sparsefx.schedules")
    if not method.follows_schedule:
        never = "never move" if not method.moves else "move by a rule of their own"
        raise OptionError(f"density_schedule was given, but the masks of algorithm {method.name!r} {never}")
    if len({record.density for _, _, record in sparse_parameters(model)}) > 1:
        raise OptionError(
            "density_schedule was given, which is one density for all layers, but they were given densities of their own; "
            "leave one of the two out"
        )
    for name, _, record in sparse_parameters(model):
        if record.pattern.fixed_density is not None:
            raise OptionError(
                f"density_schedule was given, but {name} has pattern {record.pattern.name!r}, whose density is always "
                f"{record.pattern.fixed_density:g}; use a pattern with a free density such as 'unstructured'"
            )
        for step in (1, total_steps):
            record.pattern.resolve_density(density_at(schedule, step))


def _pattern(pattern: object, caller: str) -> Pattern:
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        return patterns.parse(pattern)
    raise OptionError(f"{caller} was given pattern={pattern!r}; expected a text such as '2:4', or a Pattern")


def _eligibility(rule: object, caller: str) -> Eligibility:
    if rule is None:
        return Eligibility()
    if isinstance(rule, Eligibility):
        return rule
    raise OptionError(f"{caller} was given eligibility={rule!r}; expected a sparsefx.Eligibility, or None for the paper's rule")
