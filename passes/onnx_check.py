"""Check a written ONNX file: the standard's own checker, then onnxruntime against the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsefx.capture.arguments import copies
from sparsefx.capture.state import unchanged
from sparsefx.errors import ExportError
from sparsefx.passes.onnx_inputs import Inputs
from sparsefx.passes.onnx_report import OutputError

# Of the output's largest magnitude. onnxruntime sums in another order than torch, which costs a few units in the last place
# per layer: 1e-4 is about a thousand units of float32. In half precision each op rounds its result to 11 (bfloat16: 8)
# bits where the other side may keep float32, so a few dozen units add up over a deep model. bfloat16 is compared in float32,
# where only constants of the graph (an epsilon, a scale) are rounded.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def default_tolerance(dtypes: Collection[torch.dtype]) -> float:
    """The largest relative error to allow: that of the least precise floating point type among ``dtypes``."""
    return max((_TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0) or 1e-4


def check_standard(path: Path) -> None:
    """``onnx.checker`` with shape inference and type checks; an ExportError where the file breaks the standard."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            f"the exported file does not pass onnx.checker: {first_line(error)}; this is a fault of the exporter for "
            f"this model: try another opset"
        ) from error


class FileRunner:
    """An onnxruntime session on the CPU that takes and gives torch tensors.

    Raises ExportError where onnxruntime cannot load or run the file.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime cannot load the exported file: {_without_type(error)}; {_REMEDY}") from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, named: dict[str, Tensor]) -> list[np.ndarray]:
        """The outputs in order, for inputs by name; inputs that the file does not have are left out."""
        try:
            feed = {name: named[name].detach().cpu().contiguous().numpy() for name in self.inputs}
            outputs: list[np.ndarray] = self._session.run(None, feed)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the exported file: {_without_type(error)}; {_REMEDY}") from error
        return outputs


_REMEDY = "its CPU kernels do not cover every type and opset: convert the model to float32 or float16, or try another opset"


def expected_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The model's output tensors on these inputs, whatever it raises included; model and inputs stay as they are."""
    args, kwargs = copies(*inputs)
    with unchanged(model):
        return output_tensors(model(*args, **kwargs))


def compare(
    expected: Sequence[Tensor],
    runner: FileRunner,
    inputs: Inputs,
    input_names: Sequence[Any],
    tolerance: float,
    sample: str,
) -> list[OutputError]:
    """Errors of one sample, one per output.

    Args:
        expected: the model's own outputs.
        runner: the file.
        inputs: positional and keyword arguments.
        input_names: the file's name of each input leaf; what is not text is a constant, which the file does not take.
        tolerance: of the output's largest magnitude.
        sample: what to call it in an error.

    Raises:
        ExportError: the file does not take or give these values, another number or shape of outputs, or an error above
            ``tolerance``.
    """
    leaves = pytree.tree_leaves(inputs)
    named = {
        name: leaf for name, leaf in zip(input_names, leaves, strict=True) if isinstance(name, str) and isinstance(leaf, Tensor)
    }
    missing = [name for name in runner.inputs if name not in named]
    if missing:
        raise ExportError(f"the file expects the input {missing[0]!r}, which the example inputs do not have")
    actual = runner(named)
    if len(actual) != len(expected):
        raise ExportError(f"the file has {len(actual)} outputs and the model {len(expected)}; the exporter lost some")
    return [
        _difference(name, wanted.detach().cpu(), got, tolerance, sample)
        for name, wanted, got in zip(runner.outputs, expected, actual, strict=True)
    ]


def _difference(name: str, wanted: Tensor, got: np.ndarray, tolerance: float, sample: str) -> OutputError:
    if tuple(wanted.shape) != got.shape:
        raise ExportError(f"output {name!r} on {sample}: the file gives shape {got.shape}, the model {tuple(wanted.shape)}")
    if not (wanted.is_floating_point() or wanted.is_complex()):
        # In numpy, since torch has few operations on unsigned numbers of more than 8 bits.
        exact_numbers = wanted.numpy()
        differing = int(np.count_nonzero(exact_numbers != got))
        if differing:
            raise ExportError(
                f"output {name!r} on {sample}: {differing} of {wanted.numel()} whole numbers differ from the model's"
            )
        measured = wanted.dtype != torch.bool and wanted.numel()
        return OutputError(name, 0.0, 0.0, float(np.abs(exact_numbers.astype(np.float64)).max()) if measured else 1.0)
    if wanted.is_complex():
        wanted = torch.view_as_real(wanted)
    exact, found = wanted.double(), torch.from_numpy(np.array(got)).double()
    finite = exact.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(exact[~finite].nan_to_num(0), found[~finite].nan_to_num(0)):
        raise ExportError(
            f"output {name!r} on {sample}: NaN or infinity stands elsewhere in the file's result than in the model's"
        )
    if not bool(finite.any()):
        return OutputError(name, 0.0, 0.0, 0.0)
    absolute = float((exact[finite] - found[finite]).abs().max())
    largest = float(exact[finite].abs().max())
    relative = absolute / largest if largest else absolute
    if relative > tolerance:
        raise ExportError(
            f"output {name!r} on {sample}: the file is off by {absolute:.3g}, {relative:.3g} of the output's largest "
            f"magnitude, more than the {tolerance:g} allowed; nothing was written (a model that draws random numbers in "
            f"eval mode cannot be checked)"
        )
    return OutputError(name, absolute, relative, largest)


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs in the order in which they are exported."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def output_names(outputs: Any) -> list[str]:
    """Readable names for the same tensors: keys joined by dots, or ``output``, ``output.1``."""
    paths, _ = pytree.tree_flatten_with_path(outputs)
    names = []
    for path, leaf in paths:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
            text = ".".join(keys)
            names.append(("output" if not text else f"output.{text}") if not keys or keys[0].isdigit() else text)
    return names


_EMPTY_WORDS = ("traceback", "file ", "==", "--", "the following call raised", "constraints violated", "<class ")


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, at most 300 characters."""
    for line in str(error).splitlines():
        text = line.strip().lstrip("*- ").rstrip("* ")
        if text and not text.lower().startswith(_EMPTY_WORDS):
            return text[:300].rstrip(".;: ")
    return type(error).__name__


def _without_type(error: BaseException) -> str:
    """onnxruntime's texts without their leading ``[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED :``."""
    return first_line(error).rpartition(" : ")[2]
