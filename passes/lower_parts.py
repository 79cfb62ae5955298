"""Lower the largest parts of a model that torch.export refuses as a whole: a detector's backbone, its heads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsefx.capture.arguments import copies, split_arguments
from sparsefx.capture.examples import run_examples
from sparsefx.capture.state import unchanged
from sparsefx.errors import CaptureError, ExportError
from sparsefx.layers import known_weights
from sparsefx.passes.lower_onnx import lower_onnx
from sparsefx.passes.onnx_evaluate import evaluating
from sparsefx.passes.onnx_inputs import Inputs
from sparsefx.passes.onnx_report import ExportReport


@dataclass(frozen=True)
class PartsReport:
    """What became of each part.

    Attributes:
        parts: reports of the files by module path, in the model's order; ``""`` is the model as a whole.
        refused: reasons by module path, of modules that were looked into for smaller parts, or have none.
        uncovered: Linear/Conv weights that are in none of the files.
    """

    parts: dict[str, ExportReport]
    refused: dict[str, str]
    uncovered: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{path or 'the whole model'}: {report.path}, {report.bytes / 1e6:.1f} MB" for path, report in self.parts.items()
        ]
        lines += [f"{path or 'the whole model'} is not exported as one: {reason}" for path, reason in self.refused.items()]
        if self.uncovered:
            lines.append(f"in no file: {', '.join(self.uncovered)}")
        return "\n".join(lines)


def lower_parts(
    model: nn.Module, example_inputs: Any, folder: str | os.PathLike[str], *, opset: int | None = None
) -> PartsReport:
    """Write an ONNX file for each of the largest submodules that torch.export takes, verified as `lower_onnx` verifies.

    A module that is refused is looked into, down to single layers. Each file is named after its module's path
    (``backbone.body.onnx``), and takes what that module was given when the model ran on ``example_inputs`` in eval mode.

    Args:
        model: left exactly as it is.
        example_inputs: see `lower_onnx`.
        folder: where to write; made if it is not there.
        opset: see `lower_onnx`.

    Raises:
        CaptureError: the model does not run on the example inputs.
        ExportError: no part at all can be exported. Files written before that are not taken away.
        StateError, NonFiniteError, OptionError: as `lower_onnx`.
    """
    calls = recorded_calls(model, split_arguments(example_inputs))
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out} was given as folder, and cannot be made: {error}; give one that can be written") from error
    parts: dict[str, ExportReport] = {}
    refused: dict[str, str] = {}
    uncovered: list[str] = []
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        weights = list(_layer_weights(path, module))
        if not weights:
            continue
        if path in calls:
            try:
                parts[path] = lower_onnx(module, calls[path], out / f"{path or type(model).__name__}.onnx", opset=opset)
                continue
            except (ExportError, CaptureError) as error:
                refused[path] = str(error)
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        # A layer's own weights are in no child; so is what a leaf that was never called holds.
        inside = {weight for child_path, child in children for weight in _layer_weights(child_path, child)}
        uncovered += [weight for weight in weights if weight not in inside]
        pending += reversed(children)
    if not parts:
        raise ExportError(f"no part of {type(model).__name__} can be exported: {next(iter(refused.values()), 'it has no layer')}")
    return PartsReport(parts, refused, tuple(uncovered))


def _layer_weights(path: str, module: nn.Module) -> Iterator[str]:
    """Full names of the Linear/Conv weights of this module and those below it."""
    for local_path, child in module.named_modules(prefix=path):
        for weight in known_weights(child):
            yield f"{local_path}.{weight.local_name}" if local_path else weight.local_name


def recorded_calls(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """The arguments of the first call of every submodule, by path, in one run in eval mode."""
    calls: dict[str, Inputs] = {"": inputs}
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths.setdefault(id(module), path)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = paths[id(module)]
        if path not in calls:
            calls[path] = copies(args, kwargs)  # layers that work in place would change what was noted

    with evaluating(model), unchanged(model):
        handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules() if module is not model]
        try:
            with torch.no_grad():
                run_examples(model, *inputs)
        finally:
            for handle in handles:
                handle.remove()
    return calls
