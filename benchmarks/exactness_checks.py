"""Empties filters of a model at random, prunes its channels, and compares with the model as it was."""

from __future__ import annotations

import copy
import math
import time
import traceback
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.pytorch_utils import Conv1D

import sparsefx
from benchmarks.coverage_checks import prepared
from benchmarks.oracle import Oracle, TooLarge
from benchmarks.zoo import Case
from sparsefx.errors import CaptureError
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.precision import Widening
from sparsefx.passes.lower_parts import recorded_calls

BARS = {"float32": 1e-5, "float64": 1e-10}
"""Largest difference of an output, relative to that output's largest value."""
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, Conv1D)
_NORMS = nn.modules.batchnorm._BatchNorm


def examine(case: Case, oracle_seconds: float) -> dict[str, Any]:
    """Prune one model, or its largest parts that torch.export takes. What fails is in the result; nothing is raised.

    Args:
        case: the model.
        oracle_seconds: of the processor's time, after which a part is given up by the oracle.

    Returns:
        ``parts``, each with ``errors`` by dtype, the ``rounding`` of the unpruned model in float32, parameters before and after,
        what the ``oracle`` says, why channels had to stay; ``ok`` where every error is within its bar.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {"library": case.library, "name": case.name, "family": case.family, "parts": [], "ok": True}
    try:
        seed = zlib.crc32(case.full_name.encode())
        torch.manual_seed(seed)
        model = prepared(case)
        generator = torch.Generator().manual_seed(seed)
        damage(model, generator)
        call = case.call()
        for path, module, inputs, plan in _plans(model, call):
            result["parts"].append({"path": path, **_examine_part(module, inputs, plan, generator, oracle_seconds)})
    except Exception as error:  # whatever a model and torch can raise is the finding
        result.update(ok=False, problem=f"{type(error).__name__}: {error}", trace=traceback.format_exc(limit=-6))
    within = [part["errors"][name] <= bar for part in result["parts"] for name, bar in BARS.items()]
    result["ok"] = result["ok"] and bool(within) and all(within)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def damage(model: nn.Module, generator: torch.Generator) -> None:
    """In place: random biases and batch norms; in a random half of the layers, a random half of the filters is zero."""

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _NORMS):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                ):
                    uniform(tensor, low, high)
            elif isinstance(module, _LAYERS) and type(module.weight) is nn.Parameter:
                uniform(module.bias, -0.2, 0.2)
                axis = 1 if isinstance(module, (nn.modules.conv._ConvTransposeNd, Conv1D)) else 0
                outputs = module.weight.shape[axis]
                empty = torch.randperm(outputs, generator=generator)[: outputs // 2]
                if torch.rand((), generator=generator) < 0.5:
                    module.weight.index_fill_(axis, empty, 0)
        for parameter in model.parameters():
            # Scales of residual branches start at 1e-6 or so, which would hide whatever goes wrong behind them.
            single = 1 < parameter.numel() == max(parameter.shape) and bool((parameter == parameter.flatten()[0]).all())
            if single and 0 < abs(float(parameter.flatten()[0])) < 0.1:
                uniform(parameter, 0.5, 1.5)


def _plans(model: nn.Module, call: Any) -> Iterator[tuple[str, nn.Module, Any, ChannelPlan]]:
    """The whole model, or the largest submodules that torch.export takes, with what they are given and their plans."""
    calls = None
    pending = [("", model, call)]
    while pending:
        path, module, inputs = pending.pop()
        try:
            yield path, module, inputs, sparsefx.channel_plan(module, inputs, multiple=1)
        except CaptureError:
            calls = recorded_calls(model, call) if calls is None else calls
            for name, child in reversed(list(module.named_children())):
                full = f"{path}.{name}" if path else name
                if full in calls and any(isinstance(inner, _LAYERS) for inner in child.modules()):
                    pending.append((full, child, calls[full]))


def _examine_part(
    model: nn.Module, inputs: Any, plan: ChannelPlan, generator: torch.Generator, oracle_seconds: float
) -> dict[str, Any]:
    others = _like(inputs, generator)
    errors, expected = {}, {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        whole = copy.deepcopy(model).to(dtype)
        pruned = sparsefx.apply_channel_plan(whole, plan)
        expected[name] = _outputs(whole, others, dtype)
        errors[name] = _difference(_outputs(pruned, others, dtype), expected[name])
        del whole, pruned
    report = plan.report
    return {
        "errors": errors,
        "rounding": _difference(expected["float32"], expected["float64"]),
        "parameters": report.parameters,
        "removed": report.parameters - report.parameters_after,
        "operations": report.operations,
        "operations_after": report.operations_after,
        "pinned": sorted({row.why for row in report.layers if row.why})[:20],
        "refused": list(report.refused),
        "oracle": _compared(model, inputs, others, plan, oracle_seconds),
    }


def _compared(model: nn.Module, inputs: Any, others: Any, plan: ChannelPlan, seconds: float) -> dict[str, Any]:
    """What the oracle says of the weights that it saw, and how much of that the plan removes; ``told`` where it gave up."""
    start = time.process_time()
    try:
        verdict = Oracle(model.eval(), (inputs, others), seconds).verdict()
    except TooLarge as error:
        return {"told": str(error)}
    except Exception as error:  # the oracle's own failure says nothing about pruning
        return {"told": f"the oracle failed: {type(error).__name__}: {error}"}
    removed, missed = 0, []
    for name, removable in verdict.removable.items():
        weight, kept = model.get_parameter(name), plan.kept.get(name, {})
        left = math.prod(kept[axis].shape[-1] if axis in kept else size for axis, size in enumerate(weight.shape))
        removed += weight.numel() - left
        if weight.numel() - left < removable:
            missed.append((removable - weight.numel() + left, name))
    return {
        "removable": sum(verdict.removable.values()),
        "removed": removed,
        "weights": sum(model.get_parameter(name).numel() for name in verdict.removable),
        "missed": [f"{name}: {count}" for count, name in sorted(missed, reverse=True)[:8]],
        "difference": verdict.difference,
        "confirmed": verdict.confirmed,
        "runs": verdict.runs,
        "seconds": round(time.process_time() - start, 1),
    }


def _like(inputs: Any, generator: torch.Generator) -> Any:
    """Random floating-point inputs like the given ones; integers, whose range is not known, as they are."""

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return leaf

    return tree_map(draw, inputs)


def _outputs(model: nn.Module, inputs: Any, dtype: torch.dtype) -> list[Tensor]:
    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(dtype) if leaf.is_floating_point() else leaf.clone()
        return leaf

    def run(mode: AbstractContextManager[Any]) -> list[Tensor]:
        args, kwargs = tree_map(cast, inputs)
        torch.manual_seed(0)
        with torch.no_grad(), mode:
            return [leaf for leaf in tree_leaves(model.eval()(*args, **kwargs)) if isinstance(leaf, Tensor)]

    try:
        return run(nullcontext())
    except RuntimeError:
        # Code that asks for float32 by name does not run beside float64; it computes the same function where it gets float64.
        if dtype != torch.float64:
            raise
        return run(Widening())


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Over all outputs, relative to each output's largest value; infinite for other shapes or numbers of outputs."""
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return math.inf
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.is_floating_point() and a.numel():
            if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
                return math.inf
            known = torch.isfinite(b)
            if known.any():
                worst = max(worst, float((a - b)[known].abs().max() / b[known].abs().max().clamp_min(1e-30)))
        elif not torch.equal(a, b):
            return math.inf
    return worst


__all__ = ["BARS", "damage", "examine"]
