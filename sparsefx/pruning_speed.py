"""How much faster a pruned model is: measured in torch and onnxruntime, beside the bounds that are estimated elsewhere."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsefx.api import export_onnx
from sparsefx.capture.arguments import copies, split_arguments
from sparsefx.capture.state import unchanged
from sparsefx.errors import ExportError
from sparsefx.passes.channels.report import PruningReport

REPEATS = 15
"""Runs that each time is the median of."""


@dataclass(frozen=True)
class PruningSpeed:
    """Median seconds of one forward pass of the example inputs in eval mode, before and after.

    Attributes:
        torch_seconds: of the modules as they are.
        onnx_seconds: of their ONNX files in onnxruntime on the CPU; None where they cannot be exported.
        refusal: why not.
        threads: of both.
        device: of torch.
    """

    torch_seconds: tuple[float, float]
    onnx_seconds: tuple[float, float] | None
    refusal: str
    threads: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_speed(model: nn.Module, pruned: nn.Module, example_inputs: Any, *, repeats: int = REPEATS) -> PruningSpeed:
    """Time a model and what `prune_channels` made of it, in turn. Both are as before afterwards.

    Args:
        model, pruned: the two, on one device.
        example_inputs: as for `prune_channels`.
        repeats: runs of each, after one that does not count.
    """
    args, kwargs = split_arguments(example_inputs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with unchanged(model), unchanged(pruned), torch.no_grad():
        runs = [_torch_run(net.eval(), args, kwargs, device) for net in (model, pruned)]
        in_torch = in_turn(runs, repeats)
    onnx_seconds, refusal = None, ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("before.onnx", "after.onnx")]
            for net, path in zip((model, pruned), paths, strict=True):
                export_onnx(net, example_inputs, path)
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            before, after = in_turn([onnx_run(path, tensors) for path in paths], repeats)
            onnx_seconds = (before, after)
    except ExportError as error:
        refusal = str(error)
    return PruningSpeed((in_torch[0], in_torch[1]), onnx_seconds, refusal, torch.get_num_threads(), str(device))


def in_turn(
    runs: Sequence[Callable[[], Any]], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of each, run in turn after a run that does not count, since other work on a machine comes and goes.

    Each round has an order of its own: a run also pays for what the one before it has driven out of the caches, so that what
    always came after the largest would look slow.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    turns = list(zip(runs, seconds, strict=True))
    order = random.Random(0)
    for _ in range(repeats):
        order.shuffle(turns)
        for run, mine in turns:
            start = clock()
            run()
            mine.append(clock() - start)
    return [statistics.median(mine) for mine in seconds]


def onnx_run(path: Path, tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """What runs an ONNX file on these inputs, in its order, with as many threads as torch has.

    Raises:
        ExportError: the file takes other inputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    if len(names) != len(tensors):
        raise ExportError(f"{path.name} takes {len(names)} inputs and {len(tensors)} were given; expected one tensor for each")
    feed = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in zip(names, tensors, strict=True)}
    return lambda: session.run(None, feed)


def speed_lines(report: PruningReport, speed: PruningSpeed | None = None) -> list[str]:
    """Bounds, and beside them what was measured, in sentences."""
    lines = [
        f"Bounds on the speed-up: {_times(report.density_bound)} if zero weights cost nothing (density), "
        f"{_times(report.empty_bound)} by the share of channels that were empty, "
        f"{_times(report.operations_bound)} by the multiply-adds that are left."
    ]
    if speed is None:
        return lines
    told = _measured("torch", speed.torch_seconds)
    if speed.onnx_seconds is not None:
        told += "; " + _measured("onnxruntime", speed.onnx_seconds)
    lines.append(f"Measured: {told} ({speed.device}, {speed.threads} threads).")
    if speed.refusal:
        lines.append(f"Not measured in onnxruntime: {speed.refusal}")
    return lines


def _torch_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    given, named = copies(args, kwargs)

    def run() -> None:
        with torch.no_grad():
            model(*given, **named)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _measured(where: str, seconds: tuple[float, float]) -> str:
    before, after = seconds
    return f"{_times(before / after)} in {where} ({1000 * before:.2f} -> {1000 * after:.2f} ms)"


def _times(factor: float) -> str:
    return f"{factor:.2f}x"
