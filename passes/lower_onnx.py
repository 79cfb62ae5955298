"""Lower a model to a verified ONNX file whose N:M weights lie along the axes of the ops that read them."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import PassError
from torch import nn

from sparsefx.capture.arguments import copies, describe_arguments, split_arguments
from sparsefx.capture.caches import caches, without_caches
from sparsefx.capture.examples import run_examples
from sparsefx.capture.state import unchanged
from sparsefx.errors import ExportError, NonFiniteError, OptionError, StateError
from sparsefx.passes.compact_weights import compact, densify
from sparsefx.passes.onnx_bfloat16 import float32_inputs, float32_model, round_folded, write_float32_twin
from sparsefx.passes.onnx_check import (
    FileRunner,
    check_standard,
    compare,
    default_tolerance,
    expected_outputs,
    first_line,
    output_names,
    output_tensors,
)
from sparsefx.passes.onnx_evaluate import evaluating
from sparsefx.passes.onnx_inputs import Inputs, random_inputs, resized_shapes, specs_of_leaves, with_free_batch
from sparsefx.passes.onnx_names import (
    Source,
    adopt_constants,
    fold_transposes,
    make_plain,
    name_folded,
    name_inputs,
    name_outputs,
    name_sizes,
    strip_metadata,
    without_negative_zeros,
)
from sparsefx.passes.onnx_report import ExportedWeight, ExportReport, OutputError
from sparsefx.passes.onnx_spell_out import spell_out
from sparsefx.passes.onnx_verify import annotate, promises_of, verify_file
from sparsefx.passes.onnx_write import check_destination, destination_of, write_checked
from sparsefx.passes.pad_channels import pad_inputs

OLDEST_OPSET = 18
Encoding = Literal["plain", "compact"]
_CHATTY = ("torch", "onnxscript", "onnx_ir")
# Types that onnxruntime has no CPU kernels for, so that a file in them could not be compared with the model.
_UNCHECKABLE = (torch.float8_e4m3fn, torch.float8_e5m2)
_EXAMPLE = "the example inputs"
_BFLOAT16_OPSET = 22  # the first in which convolutions take bfloat16


def lower_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    weights: Encoding = "plain",
    pad_channels: bool = False,
    tolerance: float | None = None,
    samples: int = 3,
    generator: torch.Generator | None = None,
) -> ExportReport:
    """Write ``model`` as an ONNX file, verified, or change nothing at all.

    The model runs in eval mode and is left exactly as it was. An earlier file at ``path`` is replaced only when every
    check held.

    Args:
        model: with sparse parameters, finalized, or plain. What it promises is verified; the rest is measured.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a pair of both.
        path: of the file to write. Above 2 GB the weights go to a second file beside it.
        dynamic_shapes: as for `torch.export.export`; a text in place of a ``Dim`` names a dynamic size. The file is then
            compared on a second size too.
        dynamic_batch: leave the first axis of every input tensor free, in place of ``dynamic_shapes``. Examples of batch 1 are
            doubled, since torch.export takes a size of 1 for a constant.
        opset: version of the ONNX operator set, from 18; None means the exporter's default.
        weights: ``"plain"``: initializers, which every tool reads; ``"compact"``: weights that are 2:4 as two values and a
            4-bit code for each group of four, in standard ops, about 56 % of the bytes in float16; see `compact_weights`.
        pad_channels: pad inputs of weights that are 2:4 with zeros to multiples of 16 or 4, where that pays; see `pad_channels`.
        tolerance: largest error allowed, relative to each output's largest magnitude; None means 1e-4 for float32, 2e-2
            for float16, 2e-2 for bfloat16 (which is compared in float32), 1e-9 for float64.
        samples: how many inputs to compare: the example itself, then random ones like it.
        generator: on the CPU, draws the random inputs; None means a fresh one with a fixed seed.

    Raises:
        StateError: a parameter is on the meta device.
        NonFiniteError: a weight holds NaN or infinity.
        OptionError: ``opset``, ``samples`` or ``tolerance`` is outside its range.
        CaptureError: the model does not run on the example inputs.
        ExportError: the model cannot be exported, a promised pattern is not in the file, the file differs from the
            model, or it cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    _check_options(opset, samples, tolerance, weights)
    destination = destination_of(path)
    check_destination(destination)
    _check_weights(model)
    inputs = split_arguments(example_inputs)
    if dynamic_batch:
        if dynamic_shapes is not None:
            raise OptionError(
                "dynamic_batch and dynamic_shapes were both given; name the batch in dynamic_shapes, or leave it out"
            )
        inputs, dynamic_shapes = with_free_batch(model, inputs)
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    checks: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        outputs = _run(model, inputs)
        with unchanged(model):
            try:
                program = _capture(model, inputs, dynamic_shapes)
            except ExportError:
                if not caches(model):
                    raise
                program = None
        if program is None:
            stack.enter_context(without_caches(model))
            outputs = _run(model, inputs)
            with unchanged(model):
                program = _capture(model, inputs, dynamic_shapes)
            checks.append("the cache of keys and values (use_cache) is left out of the outputs: ONNX has no form for it")
        in_bfloat16 = _computes_in_bfloat16(program)
        if in_bfloat16 and opset is None:
            opset = _BFLOAT16_OPSET
        sizes = _size_names(program, specs_of_leaves(model, inputs, dynamic_shapes))
        exported, sources = _translate(program, opset, output_names(outputs), sizes)
        promises = promises_of(model, program)
        if pad_channels:
            checks.extend(map(str, pad_inputs(exported)))
        annotate(exported, sources)
        plain = {name: value.const_value for name, value in exported.graph.initializers.items()}
        compacted = compact(exported) if weights == "compact" else ()
        if tolerance is None:
            dtypes = {tensor.dtype for tensor in (*model.parameters(), *output_tensors(outputs))}
            tolerance = default_tolerance(dtypes | ({torch.bfloat16} if in_bfloat16 else set()))
        plan = list(_samples(program, inputs, samples, generator))
        rows: list[ExportedWeight] = []
        errors: list[list[OutputError]] = []

        def check(file: Path) -> None:
            check_standard(file)
            checks.append("onnx.checker with full shape inference")
            read = ir.load(file, format="protobuf")
            if compacted:
                checks.append(_check_restored(read, plain, compacted))
            found, texts = verify_file(read, model, promises, sources)
            rows.extend(found)
            checks.extend(texts)
            if in_bfloat16:
                twin = file.with_name("float32-twin.onnx")
                write_float32_twin(file, twin)
                checks.append("compared in float32, since onnxruntime has no bfloat16 kernels on the CPU")
                copied = [(sample, [float32_inputs(choice) for choice in choices]) for sample, choices in plan]
                errors.extend(_compare_all(float32_model(model), FileRunner(twin), program, copied, tolerance, checks))
            else:
                errors.extend(_compare_all(model, FileRunner(file), program, plan, tolerance, checks))

        size = write_checked(exported, destination, check)

    worst = tuple(
        OutputError(
            column[0].name,
            max(row.largest_absolute for row in column),
            max(row.largest_relative for row in column),
            max(row.largest_value for row in column),
        )
        for column in zip(*errors, strict=True)
    )
    silent = [row.name for row in worst if row.largest_value == 0]
    checks += [f"output {name!r} is zero or not finite on every sample, so that comparing it proves little" for name in silent]
    return ExportReport(
        path=str(destination),
        opset=exported.opset_imports[""],
        bytes=size,
        initializers=tuple(rows),
        checks=tuple(checks),
        outputs=worst,
        samples=len(errors),
        tolerance=tolerance,
    )


def _run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's outputs on the example inputs, which it may change and does not."""
    with unchanged(model):
        outputs = run_examples(model, *inputs)
    if not output_tensors(outputs):
        raise ExportError("the model returns no tensor; an ONNX file needs at least one output")
    return outputs


def _check_restored(file: ir.Model, plain: dict[str, ir.TensorProtocol | None], compacted: tuple[str, ...]) -> str:
    """Restore the plain weights of a compact file, in place, and hold each against what was encoded."""
    restored = densify(file)
    for name in compacted:
        before, after = plain[name], file.graph.initializers.get(name)
        if after is None or before is None or after.const_value is None or after.const_value.tobytes() != before.tobytes():
            raise ExportError(
                f"{name}: its compact encoding does not give the weight back; this is a fault of the lowering for this "
                f"model: export with weights='plain', and report it"
            )
    return f"{len(restored)} compact weights give back the plain ones bit for bit"


def _check_options(opset: int | None, samples: int, tolerance: float | None, weights: str) -> None:
    if weights not in get_args(Encoding):
        raise OptionError(f"weights={weights!r} was given; expected one of {', '.join(map(repr, get_args(Encoding)))}")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and (not isinstance(opset, int) or isinstance(opset, bool) or not OLDEST_OPSET <= opset <= newest):
        raise OptionError(f"opset {opset!r} was given; expected a whole number from {OLDEST_OPSET} to {newest}, or None")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise OptionError(f"samples {samples!r} was given; expected a whole number of at least 1")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < float("inf")):
        raise OptionError(f"tolerance {tolerance!r} was given; expected a finite number of at least 0, or None")


def _check_weights(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if isinstance(tensor, nn.UninitializedParameter):
            raise StateError(f"{name} is uninitialised (a lazy layer), so it has no values to export; run the model once first")
        if tensor.is_meta:
            raise StateError(f"{name} is on the meta device, so it has no values to export; load the weights first")
    for name, parameter in model.named_parameters():
        if parameter.dtype in _UNCHECKABLE:
            raise ExportError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, for which onnxruntime has no CPU kernels, so "
                f"the file could not be checked; export model.float(), model.half() or model.bfloat16()"
            )
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; an export needs finite weights: load a sound checkpoint")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and printed graphs to ourselves: what matters is checked, or raised."""
    known = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.split(".")[0] in _CHATTY]
    levels = [(logger, logger.level) for logger in known]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _capture(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    args, kwargs = copies(*inputs)  # torch.export marks dynamic sizes on the tensors, and where it fails the marks stay
    try:
        with _quiet():
            shapes = _without_names(dynamic_shapes)
            program = torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        text = first_line(error)
        if "pytree" in str(error):
            remedy = "return and take only tensors, tuples, lists and dicts (in transformers: model.config.use_cache = False)"
        elif dynamic_shapes is not None and "specialized it to be a constant" in str(error):
            remedy = "the model's own code fixes that size, as x.view(2, ...) does: take it from x.shape there, or leave it fixed"
        elif dynamic_shapes is not None and "ata-dependent" not in str(error):
            remedy = "bound the sizes with torch.export.Dim(name, min=..., max=...), and give examples of at least 2 along them"
        else:
            remedy = "make the forward free of branches on tensor values, or export the submodule that is"
        raise ExportError(f"torch.export refuses the model: {text}; {remedy}") from error
    # With examples torch writes a check of the inputs' sizes, which a file has no form for, whenever the program is taken apart;
    # of a forward with **kwargs it names what is not there, and fails.
    program.example_inputs = None
    return program


def _computes_in_bfloat16(program: torch.export.ExportedProgram) -> bool:
    """Whether any value is in bfloat16: a weight, an input, or what is cast to it in between."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)


def _without_names(spec: Any) -> Any:
    """``dynamic_shapes`` with each text replaced by a size that torch.export bounds by itself."""
    if isinstance(spec, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(spec, dict):
        return {key: _without_names(value) for key, value in spec.items()}
    if type(spec) in (tuple, list):
        return type(spec)(_without_names(value) for value in spec)
    return spec


def _size_names(program: torch.export.ExportedProgram, specs: list[Any]) -> dict[str, str]:
    """The exporter's symbol of each dynamic size that was given a text or a named ``Dim``, and that name.

    Args:
        program: what was captured.
        specs: for each of its inputs; see `specs_of_leaves`.
    """
    inputs = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    for name, spec in zip(program.graph_signature.user_inputs, specs, strict=True):
        value = inputs.get(name) if isinstance(name, str) else None
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in spec.items() if isinstance(spec, dict) else enumerate(spec or ()):
            text = size if isinstance(size, str) else getattr(size, "__name__", "")
            if not isinstance(axis, int) or not -value.ndim <= axis < value.ndim:
                raise ExportError(f"dynamic_shapes has axis {axis!r} for {name}, which has {value.ndim} axes; give one of these")
            if text and isinstance(value.shape[axis], torch.SymInt):
                names.setdefault(str(value.shape[axis]), text)
    return names


def _translate(
    program: torch.export.ExportedProgram, opset: int | None, names: list[str], sizes: dict[str, str]
) -> tuple[ir.Model, dict[str, Source]]:
    """The ONNX graph, optimised, its weights under their own names; and what each initializer was made from."""
    if any(isinstance(value, (bool, int, float, str)) for value in _constant_outputs(program)):
        raise ExportError("the model returns a Python number or text, and ONNX outputs are tensors; return tensors only")
    try:
        with _quiet():
            program = spell_out(program)
            translated = torch.onnx.export(program, opset_version=opset, optimize=False, verbose=False)
            assert translated is not None
            sources = fold_transposes(translated.model)
            given_names = [value.name or "" for value in translated.model.graph.inputs]
            translated.optimize()
            name_inputs(translated.model, given_names)
            adopt_constants(translated.model)
            translated.model.graph.sort()  # the exporter puts some casts behind what reads them
    except Exception as error:
        raise ExportError(
            f"the model has no ONNX form: {first_line(_cause(error))}; replace that op in the model, or try a newer opset"
        ) from error
    model = translated.model
    round_folded(model)
    sources = name_folded(model, sources)
    make_plain(model, sources)
    without_negative_zeros(model)
    strip_metadata(model)
    name_sizes(model, sizes)
    name_outputs(model, names)
    given = model.opset_imports.get("")
    if given is None or (opset is not None and given != opset):
        raise ExportError(f"opset {opset} was asked for, and the exporter could only write opset {given}; ask for that one")
    return model, sources


def _cause(error: BaseException) -> BaseException:
    """What the exporter says of its failure: one error deeper, but for those that only tell which pass it was in."""
    cause = error.__cause__ or error
    while isinstance(cause, PassError) and cause.__cause__ is not None:
        cause = cause.__cause__
    return cause


def _constant_outputs(program: torch.export.ExportedProgram) -> list[Any]:
    return [
        spec.arg.value
        for spec in program.graph_signature.output_specs
        if isinstance(spec.arg, torch.export.graph_signature.ConstantArgument)
    ]


def _samples(
    program: torch.export.ExportedProgram, inputs: Inputs, samples: int, generator: torch.Generator
) -> Iterator[tuple[str, list[Inputs]]]:
    """What to compare: a name and the inputs, with a second choice where the first may not suit the model."""
    yield _EXAMPLE, [inputs]
    for number in range(1, samples):
        yield f"random sample {number}", [random_inputs(inputs, generator, lambda index: None)]
    larger, smaller = resized_shapes(program, inputs, 1), resized_shapes(program, inputs, -1)
    if larger or smaller:
        yield "another dynamic size", [random_inputs(inputs, generator, shapes.get) for shapes in (larger, smaller) if shapes]


def _compare_all(
    model: nn.Module,
    runner: FileRunner,
    program: torch.export.ExportedProgram,
    plan: list[tuple[str, list[Inputs]]],
    tolerance: float,
    checks: list[str],
) -> Iterator[list[OutputError]]:
    """Compare every sample. The model itself may refuse random inputs; the example it has to take."""
    names = program.graph_signature.user_inputs
    for sample, choices in plan:
        refusal: Exception | None = None
        for choice in choices:
            try:
                expected = expected_outputs(model, choice)
            except Exception as error:  # whatever the user's own code raises
                refusal = error
                continue
            rows = compare(expected, runner, choice, names, tolerance, sample)
            checks.append(f"onnxruntime equals the model on {sample} {describe_arguments(*choice)}")
            yield rows
            break
        else:
            assert refusal is not None
            if sample == _EXAMPLE:
                # The model itself has run on it before: this is its float32 copy.
                raise ExportError(
                    f"the bfloat16 file is checked by a float32 copy of the model, which does not run on the example inputs: "
                    f"{first_line(refusal)}; take types from the weights in the model's code (x.to(self.weight.dtype)), or "
                    f"export a model in float32 or float16"
                ) from refusal
            if sample == "another dynamic size":
                raise ExportError(
                    f"the shapes are declared dynamic, and the model itself refuses another size: {first_line(refusal)}; "
                    f"bound the sizes with torch.export.Dim(name, min=..., max=...)"
                ) from refusal
            checks.append(f"{sample} left out: the model itself refuses it ({first_line(refusal)})")
