"""The demo's second part: a net trained with whole filters left out, and the smaller net that `prune_channels` makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.passes.channels.report import PruningReport
from sparsefx.passes.onnx_report import ExportReport
from sparsefx.pruning_speed import in_turn, onnx_run


@dataclass(frozen=True)
class PrunedNet:
    """A net before and after its empty channels were removed.

    Attributes:
        accuracy, accuracy_after: share of test images recognised.
        same_predictions: test images for which both name the same digit.
        report: of the pruning.
        export: of the smaller net's ONNX file.
        torch_seconds, onnx_seconds: median time of one forward pass of all test images, before and after, one thread.
    """

    accuracy: float
    accuracy_after: float
    same_predictions: int
    report: PruningReport
    export: ExportReport
    torch_seconds: tuple[float, float]
    onnx_seconds: tuple[float, float]

    @property
    def torch_speedup(self) -> float:
        """How many times as fast the smaller net is in torch."""
        return self.torch_seconds[0] / self.torch_seconds[1]

    @property
    def onnx_speedup(self) -> float:
        """The same in onnxruntime."""
        return self.onnx_seconds[0] / self.onnx_seconds[1]


def prune_net(model: nn.Module, images: Tensor, labels: Tensor, out: Path) -> PrunedNet:
    """Remove the empty channels of a trained sparse net, export both nets to ``out``, and compare and time them."""
    model = sparsefx.finalize(copy.deepcopy(model)).eval()
    example = images[:4]
    pruned = sparsefx.prune_channels(model, example).eval()
    named, named_after = (_predictions(net, images) for net in (model, pruned))
    batch = torch.export.Dim("batch")
    whole_path, pruned_path = out / "digits-channels.onnx", out / "digits-pruned.onnx"
    sparsefx.export_onnx(model, (example,), whole_path, dynamic_shapes=({0: batch},))
    export = sparsefx.export_onnx(pruned, (example,), pruned_path, dynamic_shapes=({0: batch},))
    return PrunedNet(
        accuracy=float((named == labels).float().mean()),
        accuracy_after=float((named_after == labels).float().mean()),
        same_predictions=int((named == named_after).sum()),
        report=sparsefx.channel_plan_of(pruned).report,
        export=export,
        torch_seconds=_both(lambda: _predictions(model, images), lambda: _predictions(pruned, images)),
        onnx_seconds=_both(onnx_run(whole_path, [images]), onnx_run(pruned_path, [images])),
    )


def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        named: Tensor = model(images).argmax(1)
    return named


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    before, after = in_turn([first, second])
    return before, after
