"""Quantise an ONNX file to symmetric INT8 with the user's calibration data, zeros and 2:4 kept, and say what it cost."""

from __future__ import annotations

import fnmatch
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import onnxruntime
from torch import Tensor

from sparsefx.errors import ExportError, OptionError
from sparsefx.passes import onnx_write
from sparsefx.passes.compact_weights import densify
from sparsefx.passes.onnx_check import check_standard, first_line
from sparsefx.passes.onnx_read import load_data, read_onnx
from sparsefx.passes.onnx_weights import WeightUse, holds, weight_uses
from sparsefx.passes.onnx_write import check_destination, destination_of, temporary_prefix, tensor_bytes, write_checked
from sparsefx.passes.quantize_names import fold_betas, hide_names, name_nodes, restore_names

OLDEST_OPSET = 13  # quantisation per output channel
Method = Literal["minmax", "entropy", "percentile"]
_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight that is INT8 now.

    Attributes:
        name: of the initializer it was.
        pattern: ``2:4`` where it had that along its reduction axis, and so has it now; else empty.
        density: share of its values that were not zero.
        quantized_density: share of its INT8 values that are not zero; smaller where small values became zero.
    """

    name: str
    pattern: str
    density: float
    quantized_density: float


@dataclass(frozen=True)
class QuantizeReport:
    """An INT8 file that was checked.

    Attributes:
        path: of the file.
        bytes: its size.
        weights: those that are INT8 now.
        left: names of weights that stay as they are, with the reason.
        batches: how many calibration batches were seen.
        relative_errors: per output, the root mean square of (INT8 - float) over that of float, on the calibration data.
        agreement: per output of two axes, the share of rows whose largest entry stands at the same place.
    """

    path: str
    bytes: int
    weights: tuple[QuantizedWeight, ...]
    left: tuple[tuple[str, str], ...]
    batches: int
    relative_errors: dict[str, float]
    agreement: dict[str, float]

    def __str__(self) -> str:
        sparse = sum(bool(weight.pattern) for weight in self.weights)
        lines = [f"{self.path}: {self.bytes / 1e6:.2f} MB, {len(self.weights)} weights in INT8, {sparse} of them 2:4 as before"]
        lines += [f"  {name} stays: {reason}" for name, reason in self.left]
        for name, error in self.relative_errors.items():
            same = f", the same largest entry in {self.agreement[name]:.2%} of rows" if name in self.agreement else ""
            lines.append(f"  output {name!r}: relative error {error:.3g} on {self.batches} calibration batches{same}")
        return "\n".join(lines)


def quantize_onnx(
    path: str | os.PathLike[str],
    calibration: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    method: Method = "minmax",
    exclude: Sequence[str] = (),
) -> QuantizeReport:
    """Write the file at ``path`` with INT8 weights and activations behind QuantizeLinear and DequantizeLinear.

    onnxruntime's static quantiser does the work: weights symmetric per output channel, so that a zero stays a zero and 2:4
    stays 2:4; activations symmetric per tensor, as TensorRT wants them; biases in float. Afterwards every zero is
    counted again, and the outputs are compared with the float file's.

    Args:
        path: of a float32 file; compact weights are restored first.
        calibration: batches like those that the model will see: a tensor or array, a tuple of them in the order of the file's
            inputs (what follows, such as labels, is ignored), or a dict by input name. A few hundred samples are usual.
        out: where to write.
        method: how activation ranges are chosen: the whole range seen (``"minmax"``), or without rare large values
            (``"entropy"``, ``"percentile"``).
        exclude: names or globs of weights to leave in float, such as a first convolution.

    Raises:
        ExportError: the file cannot be read or quantised, zeros were lost, or the result cannot be written.
        OptionError: no calibration data, data that does not fit the file's inputs, or an unknown method.
    """
    check_method(method)
    target = destination_of(out)
    check_destination(target)
    model, _ = read_onnx(path)
    load_data(model)
    densify(model)
    ir.passes.common.InlinePass()(model)
    opset = model.opset_imports.get("", 0) or model.opset_imports.get("ai.onnx", 0)
    if opset < OLDEST_OPSET:
        raise ExportError(f"{path}: it has opset {opset}, and INT8 per channel needs {OLDEST_OPSET} or later; export it again")
    name_nodes(model)
    uses, left = _chosen(model, exclude)
    if not uses:
        told = "; ".join(f"{name}: {reason}" for name, reason in left[:3])
        raise ExportError(f"{path}: there is no weight to quantise ({told or 'no convolution or matrix product was found'})")
    batches = _batches(model, calibration)
    nodes = sorted({use.node for use in uses})
    fold_betas(model, nodes)
    hidden = hide_names(model)
    before = {use.value.name or "": use for use in uses}
    present = {name: now for now, name in hidden.items()}
    fed = [{present.get(name, name): array for name, array in batch.items()} for batch in batches]
    with _working_folder(target) as folder:
        plain, quantized = folder / "float.onnx", folder / "int8.onnx"
        large = tensor_bytes(model) > onnx_write.LARGEST_SINGLE_FILE
        ir.save(model, plain, format="protobuf", external_data="float.data" if large else None)
        _quantize(plain, quantized, fed, nodes, method, large)
        result, _ = read_onnx(quantized)
        load_data(result)
        _strip(result)
        weights = _check_zeros(result, before, hidden)
        _carry_metadata(result, before)
        restore_names(result, hidden)
        float_outputs = list(_outputs(plain, fed))
    measured: list[tuple[dict[str, float], dict[str, float]]] = []

    def check(file: Path) -> None:
        check_standard(file)
        measured.append(_compare(float_outputs, _outputs(file, batches), [value.name or "" for value in result.graph.outputs]))

    size = write_checked(result, target, check)
    errors, agreement = measured[0]
    return QuantizeReport(str(target), size, weights, tuple(left), len(batches), errors, agreement)


def check_method(method: str) -> Method:
    """The method of this name. Raises OptionError where there is none."""
    for known in get_args(Method):
        if method == known:
            found: Method = known
            return found
    raise OptionError(f"method={method!r} was given; expected one of {', '.join(map(repr, get_args(Method)))}")


def _chosen(model: ir.Model, exclude: Sequence[str]) -> tuple[list[WeightUse], list[tuple[str, str]]]:
    """The weights to quantise, and those left with their reasons."""
    uses: list[WeightUse] = []
    left: list[tuple[str, str]] = []
    matched: set[str] = set()
    own = {id(node) for node in model.graph}
    for use in weight_uses(model):
        name = "+".join(use.initializers)
        globs = [glob for glob in exclude if fnmatch.fnmatchcase(name, glob)]
        matched.update(globs)
        if globs:
            left.append((name, "it is excluded"))
        elif use.op not in _OPS:
            left.append((name, f"{use.op} is not quantised here"))
        elif not use.direct or use.array is None or use.axis is None:
            left.append((name, "it is no plain initializer"))
        elif use.array.dtype != np.float32:
            left.append((name, f"it is {use.array.dtype.name}; export the model in float32"))
        elif not np.isfinite(use.array).all():
            left.append((name, "it holds NaN or infinity"))
        elif use.operand != 1 or not any(id(user) in own for user, _ in use.value.uses()):
            left.append((name, "it is the left operand, or stands in a subgraph"))
        elif use.op == "MatMul" and use.array.ndim > 2:
            left.append((name, f"it is a stack of matrices of shape {use.array.shape}, for which onnxruntime has no INT8 kernel"))
        else:
            uses.append(use)
    axes: dict[str, set[int | None]] = {}
    for use in uses:
        axes.setdefault(use.initializers[0], set()).add(use.axis)
    for name, found in axes.items():
        if len(found) > 1:
            left.append((name, "several ops sum over different axes of it, and the scales run along one; store it once for each"))
    uses = [use for use in uses if len(axes[use.initializers[0]]) == 1]
    unmatched = [glob for glob in exclude if glob not in matched]
    if unmatched:
        raise OptionError(f"exclude={unmatched[0]!r} was given, and no weight has such a name; sparsefx audit lists the names")
    return uses, left


def _batches(model: ir.Model, calibration: Iterable[Any]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Every calibration batch as arrays by input name."""
    names = [value.name or "" for value in model.graph.inputs if (value.name or "") not in model.graph.initializers]
    if isinstance(calibration, (str, bytes, dict)) or not isinstance(calibration, Iterable):
        raise OptionError(
            f"calibration is a {type(calibration).__name__}; expected an iterable of batches, such as a DataLoader or [batch]"
        )
    if isinstance(calibration, (Tensor, np.ndarray)):
        raise OptionError("calibration is one tensor; expected an iterable of batches: pass [batch], or tensor.split(32)")
    batches = []
    for number, batch in enumerate(calibration):
        if isinstance(batch, dict):
            missing = [name for name in names if name not in batch]
            if missing:
                raise OptionError(f"calibration batch {number} has no {missing[0]!r}; the file's inputs are {', '.join(names)}")
            given = [batch[name] for name in names]
        else:
            given = list(batch) if isinstance(batch, (tuple, list)) else [batch]
            if len(given) < len(names):
                raise OptionError(f"calibration batch {number} has {len(given)} values; the file's inputs are {', '.join(names)}")
        arrays = [value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for value in given]
        named = dict(zip(names, arrays, strict=False))
        unusable = [name for name, array in named.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if unusable:
            raise OptionError(
                f"calibration batch {number} holds NaN or infinity in {unusable[0]!r}, which has no range; give finite data"
            )
        batches.append(named)
    if not batches:
        raise OptionError("calibration held no batch; give at least one, and better a few hundred samples")
    if all(array.size == 0 for batch in batches for array in batch.values()):
        raise OptionError("calibration held empty batches only; give at least one sample, and better a few hundred")
    return batches


class _Reader:
    """What onnxruntime's calibrators read from: it stands in for their CalibrationDataReader.

    Batches come in ranges of equal shapes, the largest range first: histograms of one range are made from all of it at once,
    which takes equal shapes, and those of further ranges are added to the bins of the first.
    """

    def __init__(self, batches: list[dict[str, np.ndarray[Any, Any]]]) -> None:
        by_shapes: dict[tuple[Any, ...], list[dict[str, np.ndarray[Any, Any]]]] = {}
        for batch in batches:
            by_shapes.setdefault(tuple(array.shape for array in batch.values()), []).append(batch)
        sizes = {shapes: sum(array.size for batch in some for array in batch.values()) for shapes, some in by_shapes.items()}
        self._ranges = [by_shapes[shapes] for shapes in sorted(sizes, key=lambda shapes: -sizes[shapes])]
        self._left = iter([batch for some in self._ranges for batch in some])

    def __len__(self) -> int:
        return len(self._ranges)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter([batch for some in self._ranges[start_index:end_index] for batch in some])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._left, None)


def _quantize(
    plain: Path,
    quantized: Path,
    batches: list[dict[str, np.ndarray[Any, Any]]],
    nodes: list[str],
    method: Method,
    large: bool,
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    reader = _Reader(batches)
    try:
        with _quiet():
            quantize_static(
                str(plain),
                str(quantized),
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_OPS),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=nodes,
                calibrate_method=methods[method],
                use_external_data_format=large,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    # Between a convolution and its ReLU or residual sum nothing is rounded: TensorRT fuses these, and rounds
                    # what enters the next layer.
                    "OpTypesToExcludeOutputQuantization": list(_OPS),
                    # Named after minmax, which takes all shapes as they come; what it does is to ask for range after range.
                    "CalibStridedMinMax": 1 if method != "minmax" and len(reader) > 1 else None,
                },
            )
    except Exception as error:  # onnxruntime raises whatever happens in its Python code
        raise ExportError(
            f"onnxruntime cannot quantise the file: {type(error).__name__}: {first_line(error)}; check that the calibration "
            f"batches have the shapes of the file's inputs, or exclude weights"
        ) from error


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A folder beside the file to write, since that has to hold as much anyway; gone afterwards."""
    try:
        with tempfile.TemporaryDirectory(prefix=temporary_prefix(target), dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(
            f"{target}: the files to quantise from could not be written beside it: {error.strerror or error}; free some space, "
            f"or choose another path"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice and its progress: what matters is checked afterwards."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(model: ir.Model) -> None:
    """Leave out what says how a file was made, in place."""
    model.producer_name, model.producer_version = "sparsefx", None
    model.metadata_props.clear()


def _check_zeros(model: ir.Model, before: dict[str, WeightUse], hidden: dict[str, str]) -> tuple[QuantizedWeight, ...]:
    """Every zero is still a zero, every zero point is zero, and what was 2:4 is 2:4."""
    found: dict[str, QuantizedWeight] = {}
    for use in weight_uses(model):
        name = next((name.removesuffix("_quantized") for name in use.initializers if name.endswith("_quantized")), "")
        if name not in before or name in found:
            continue
        old = before[name]
        assert old.array is not None
        assert old.axis is not None
        stored = model.graph.initializers[f"{name}_quantized"].const_value
        array = None if stored is None else stored.numpy()
        if array is None or use.problem or array.shape != old.array.shape:
            raise ExportError(f"{name}: {use.problem or 'its quantised values cannot be found'}; exclude it, or report this")
        lost = int(((array != 0) & (old.array == 0)).sum())
        sparse = holds(old.array, old.axis, 2, 4)
        if lost or (sparse and not holds(array, old.axis, 2, 4)):
            raise ExportError(f"{name}: {lost} zeros became something else in INT8; this is a fault of the quantiser: exclude it")
        densities = [float(np.count_nonzero(values != 0)) / values.size for values in (old.array, array)]
        found[name] = QuantizedWeight(hidden.get(name, name), "2:4" if sparse else "", *densities)
    missing = before.keys() - found.keys()
    if missing:
        raise ExportError(f"{min(missing)}: onnxruntime left it in float; exclude it, or report this")
    return tuple(found.values())


def _carry_metadata(model: ir.Model, before: dict[str, WeightUse]) -> None:
    """Copy what each weight's metadata said to its INT8 successor, in place."""
    for name, use in before.items():
        value = model.graph.initializers[f"{name}_quantized"]
        assert value.const_value is not None
        old = use.value.const_value
        array = value.const_value.numpy()
        value.const_value = ir.Tensor(
            array, dtype=value.dtype, name=value.name, metadata_props=dict(old.metadata_props) if old is not None else {}
        )


def _outputs(file: Path, batches: list[dict[str, np.ndarray[Any, Any]]]) -> Iterator[list[np.ndarray[Any, Any]]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for batch in batches:
            yield session.run(None, batch)
    except Exception as error:  # onnxruntime's errors share no base class
        raise ExportError(f"onnxruntime cannot run the file: {first_line(error)}") from error


def _compare(
    wanted: list[list[np.ndarray[Any, Any]]], found: Iterator[list[np.ndarray[Any, Any]]], names: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Relative error and agreement of the largest entry, per output."""
    squares = {name: [0.0, 0.0] for name in names}
    rows: dict[str, list[int]] = {}
    for batch, other in zip(wanted, found, strict=True):
        for name, a, b in zip(names, batch, other, strict=True):
            if a.dtype.kind != "f":
                continue
            exact, close = a.astype(np.float64), b.astype(np.float64)
            squares[name][0] += float(((close - exact) ** 2).sum())
            squares[name][1] += float((exact**2).sum())
            if a.ndim == 2 and a.shape[1] > 1:
                seen = rows.setdefault(name, [0, 0])
                seen[0] += int((a.argmax(1) == b.argmax(1)).sum())
                seen[1] += len(a)
    rows = {name: seen for name, seen in rows.items() if seen[1]}
    errors = {name: (error / total) ** 0.5 if total else error**0.5 for name, (error, total) in squares.items()}
    return errors, {name: same / count for name, (same, count) in rows.items()}
