"""What acceleration says of itself: each layer, whether it runs on a sparse kernel, and why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AcceleratedLayer:
    """One Linear or convolution.

    Attributes:
        name: path of the module.
        kind: ``Linear``, ``Conv2d``, ``Conv1D``.
        shape: of its weight.
        accelerated: whether it runs on a sparse kernel now.
        reason: why it does not, in words; empty where it does.
        kernel: the fastest sparse kernel that was measured, or empty.
        rows: of the matrix products of all its calls on the example inputs; 0 where it was not looked at.
        dense_seconds, sparse_seconds: that its calls on the example inputs take; None where they were not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    accelerated: bool = False
    reason: str = ""
    kernel: str = ""
    rows: int = 0
    dense_seconds: float | None = None
    sparse_seconds: float | None = None


@dataclass(frozen=True)
class Acceleration:
    """An accelerated model and the report on it. ``str()`` gives a table.

    Attributes:
        model: a copy, of the same class, with the accelerated layers replaced.
        layers: one row for every Linear and Conv2d, in the model's order.
        largest_difference: between the outputs of the two models on the example inputs, relative to the largest output; NaN
            where they hold no tensor that could be compared, 0 where nothing was replaced.
        settings: device, dtype and versions.
    """

    model: nn.Module
    layers: tuple[AcceleratedLayer, ...]
    largest_difference: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accelerated(self) -> tuple[str, ...]:
        """Names of the layers that run on sparse kernels."""
        return tuple(layer.name for layer in self.layers if layer.accelerated)

    def to_json(self) -> str:
        """All fields but the model."""
        content = {
            "settings": dict(self.settings),
            "largest_difference": self.largest_difference,
            "layers": [asdict(layer) for layer in self.layers],
        }
        return json.dumps(content, indent=2, default=str, ensure_ascii=False)

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [
            f"{len(self.accelerated)} of {len(self.layers)} Linear/Conv2d layers run on Sparse Tensor Cores"
            + (f" ({settings})" if settings else "")
            + f"; outputs differ by at most {self.largest_difference:.2g} of the largest."
        ]
        for layer in self.layers:
            size = "x".join(map(str, layer.shape))
            times = ""
            if layer.dense_seconds is not None and layer.sparse_seconds is not None:
                gain = f"{layer.dense_seconds / layer.sparse_seconds:.2f}x" if layer.sparse_seconds else "?"
                times = f"{1e6 * layer.dense_seconds:.1f} -> {1e6 * layer.sparse_seconds:.1f} us, {gain}; "
            verdict = f"{times}{layer.kernel}" if layer.accelerated else f"dense: {layer.reason}"
            lines.append(f"  {layer.name or '(the model)'}  {layer.kind} {size}  {verdict}")
        return "\n".join(lines)
