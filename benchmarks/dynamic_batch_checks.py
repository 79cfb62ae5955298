"""One model of the zoo as an ONNX file whose batch is free: the same file at several batches, held against torch."""

from __future__ import annotations

import inspect
import resource
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparsefx
from benchmarks.coverage_checks import Failed, prepared
from benchmarks.zoo import Case
from sparsefx.capture.caches import without_caches
from sparsefx.errors import EligibilityError, ExportError, OptionError
from sparsefx.passes.lower_onnx import lower_onnx

BATCHES = (1, 3, 5)
"""Run in onnxruntime; the file is made from examples of two."""
TOLERANCE = 1e-4
"""Of each output's largest magnitude, as in `sparsefx.export_onnx`."""
EXPORTED, BAKED_IN, NO_BATCH, NOT_EXPORTED, FAILED = "exported", "batch baked in", "no batch", "not exported", "failed"
OUTCOMES = (EXPORTED, BAKED_IN, NO_BATCH, NOT_EXPORTED, FAILED)


def check(case: Case) -> dict[str, Any]:
    """Export one model with a free batch and run the file at other batches; nothing is raised.

    Returns:
        ``outcome``: ``exported``; ``batch baked in`` (torch.export takes the model at a fixed batch only); ``no batch`` (its
        inputs share no first axis); ``not exported`` (nor at a fixed one); ``failed`` (anything else, which is a fault of ours).
        ``detail`` has the reason, ``errors`` the largest relative error at each batch, ``sparse`` the number of 2:4 weights.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {"library": case.library, "name": case.name, "family": case.family, "detail": ""}
    try:
        torch.manual_seed(0)
        model = prepared(case)
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        try:
            sparsefx.mask_once(model)
        except EligibilityError:
            result["detail"] = "no weight is eligible, so it is exported dense"
        with without_caches(model), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            result.update(_export(case, model, Path(folder) / "model.onnx"))
    except Exception as error:  # whatever a model and torch can raise is the finding
        detail = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        result.update(outcome=FAILED, detail=detail, trace=traceback.format_exc(limit=-6))
    result["seconds"] = round(time.perf_counter() - start, 2)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _export(case: Case, model: nn.Module, path: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = case.call()
    try:
        report = lower_onnx(model, inputs, path, dynamic_batch=True, samples=1)
    except OptionError as error:
        return {"outcome": NO_BATCH, "detail": str(error)}
    except ExportError as error:
        try:
            lower_onnx(model, inputs, path, samples=1)
        except ExportError as other:
            return {"outcome": NOT_EXPORTED, "detail": str(other)}
        kind = BAKED_IN if "torch.export refuses" in str(error) else FAILED
        return {"outcome": kind, "detail": str(error)}
    errors = {str(batch): _largest_error(model, path, rows(case, batch)) for batch in BATCHES}
    worst = max(errors.values())
    if not worst <= TOLERANCE:
        raise Failed(f"off by {worst:.2e} of the output's largest magnitude: {errors}")
    sparse = sum(weight.pattern.startswith("2:4") for weight in report.initializers)
    return {"outcome": EXPORTED, "bytes": report.bytes, "errors": errors, "sparse": sparse}


def rows(case: Case, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments like the case's own, all tensors with ``batch`` rows, each row of its own."""
    drawn: list[list[Any]] = []
    structure = None
    while not drawn or _rows_of(drawn) < batch:
        torch.manual_seed(10 + len(drawn))
        leaves, structure = pytree.tree_flatten(case.call())
        drawn.append(leaves)
    joined = [
        torch.cat(parts)[:batch] if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]
        for parts in zip(*drawn, strict=True)
    ]
    assert structure is not None
    args, kwargs = pytree.tree_unflatten(joined, structure)
    return tuple(args), dict(kwargs)


def _rows_of(drawn: list[list[Any]]) -> int:
    return sum(next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()) for leaves in drawn)


def _largest_error(model: nn.Module, path: Path, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """The file against torch, with nothing of the library's own comparison; relative to each output's largest magnitude."""
    args, kwargs = inputs
    wanted = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    named = {
        key: value
        for name, given in bound.items()
        for key, value in (given if isinstance(given, dict) else {name: given}).items()
    }
    found = session.run(None, {value.name: named[value.name].numpy() for value in session.get_inputs()})
    if len(found) != len(wanted):
        raise Failed(f"the file has {len(found)} outputs, the model {len(wanted)}")
    worst = 0.0
    for number, (exact, got) in enumerate(zip(wanted, found, strict=True)):
        if tuple(exact.shape) != got.shape:
            raise Failed(f"output {number} has shape {got.shape} in the file and {tuple(exact.shape)} in torch")
        a, b = exact.double().numpy(), np.asarray(got, np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            raise Failed(f"output {number}: NaN or infinity stands elsewhere in the file's result")
        finite = np.isfinite(a)
        if finite.any():
            difference, largest = float(np.abs(a[finite] - b[finite]).max()), float(np.abs(a[finite]).max())
            worst = max(worst, difference / largest if largest else difference)
    return worst
