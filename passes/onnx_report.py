"""What an ONNX export says of itself: which weights the file holds, what was checked, and the largest errors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportedWeight:
    """One weight of the file, as one op reads it.

    Attributes:
        name: of the initializer in the file.
        source: the parameter (or parameters, joined by ``+``) it was made from; empty where unknown.
        op: type of the ONNX op that reads it (``Conv``, ``Gemm``, ``MatMul``, ...).
        axis: the axis of the initializer along which that op sums, or None where the op has none that is known.
        pattern: measured along that axis: ``2:4-transposable``, ``2:4``, ``4:8``, ``8:16`` or empty.
        density: share of non-zero weights, in [0, 1].
        shape: of the tensor that the op reads.
        tensor_core_reason: why Sparse Tensor Cores would not take it; empty where they would.
    """

    name: str
    source: str
    op: str
    axis: int | None
    pattern: str
    density: float
    shape: tuple[int, ...]
    tensor_core_reason: str


@dataclass(frozen=True)
class OutputError:
    """The largest difference between the model's output and the file's, over all samples.

    Attributes:
        name: of the output in the file.
        largest_absolute: largest ``|model - file|``.
        largest_relative: the same, divided by the largest ``|model|`` of that output in that sample.
        largest_value: largest ``|model|``; 0 says that no sample gave a finite number other than zero, which proves little.
    """

    name: str
    largest_absolute: float
    largest_relative: float
    largest_value: float


@dataclass(frozen=True)
class ExportReport:
    """A verified ONNX file.

    Attributes:
        path: of the file.
        opset: version of the default ONNX operator set.
        bytes: size on disk, external data included.
        initializers: every weight of a matrix product, convolution or recurrent op.
        checks: what was checked, in words.
        outputs: the largest errors per output.
        samples: how many inputs were compared.
        tolerance: the largest relative error that was allowed.
    """

    path: str
    opset: int
    bytes: int
    initializers: tuple[ExportedWeight, ...]
    checks: tuple[str, ...]
    outputs: tuple[OutputError, ...]
    samples: int
    tolerance: float

    @property
    def largest_absolute_error(self) -> float:
        """Over all outputs and samples."""
        return max((output.largest_absolute for output in self.outputs), default=0.0)

    @property
    def largest_relative_error(self) -> float:
        """Over all outputs and samples, relative to each output's largest magnitude."""
        return max((output.largest_relative for output in self.outputs), default=0.0)

    def __str__(self) -> str:
        rows = [("weight", "op", "axis", "shape", "pattern", "density", "Sparse Tensor Cores")]
        for weight in self.initializers:
            rows.append(
                (
                    weight.name,
                    weight.op,
                    "-" if weight.axis is None else str(weight.axis),
                    "x".join(map(str, weight.shape)),
                    weight.pattern or "-",
                    f"{weight.density:.3f}",
                    weight.tensor_core_reason or "eligible",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [f"{self.path}: opset {self.opset}, {self.bytes / 1e6:.2f} MB"]
        lines += [
            "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]) for row in rows
        ]
        lines += ["checked:", *(f"  - {check}" for check in self.checks)]
        lines.append(
            f"largest error over {self.samples} samples: {self.largest_absolute_error:.3g} absolute, "
            f"{self.largest_relative_error:.3g} relative (allowed {self.tolerance:g})"
        )
        return "\n".join(lines)
