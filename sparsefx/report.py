"""What sparsefx says of a model: one LayerReport for every Linear/Conv weight, and the Audit of them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerReport:
    """One Linear/Conv weight: whether it is sparse, and if not, why.

    Attributes:
        name: module path (``layer1.0.conv1``), or the parameter's name where no layer module owns it.
        parameter: full name of the weight; the key in ``masks(model)``.
        kind: ``Linear``, ``Conv2d``, ``ConvTranspose2d``, ``Conv1D``, ``MultiheadAttention.in_proj_weight``, ...
        shape: shape of the weight.
        sparse: True where a mask holds (or, before sparsify, would hold).
        reason: why the layer stays dense, in words with the remedy; empty where sparse.
        pattern: name of the pattern; empty where dense.
        density: share of weights that participate, measured on the mask; 1.0 where dense.
        empty_channels: output channels all of whose weights are zero.
        flops: floating point operations of all calls in one forward pass of the example inputs, computed
            dense; None where the shapes are unknown.
        rung: of the capture ladder, 1 (torch.export) to 4 (the module alone).
        call_sites: where the weight is used, in order.
        reduction_axis: 0 or 1, the axis along which the layer sums; 2 for a stack of matrices ``[n, out, in]``.
        tensor_core_reason: why Sparse Tensor Cores would not take it; empty where they would.
        backend: what trains it, where `sparsify` was given a backend: the kernel, or ``dense: `` and the reason.
    """

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    sparse: bool
    reason: str
    pattern: str
    density: float
    empty_channels: int
    flops: int | None
    rung: int
    call_sites: tuple[str, ...]
    reduction_axis: int
    tensor_core_reason: str
    backend: str = ""

    @property
    def effective_flops(self) -> int | None:
        """Operations on participating weights only: ``flops * density``."""
        return None if self.flops is None else round(self.flops * self.density)


@dataclass(frozen=True)
class Totals:
    """Sums over the layers of an audit. A weight under two names counts once.

    Attributes:
        layers: Linear/Conv weights.
        sparse_layers: those that are sparse.
        weights: values in all of them.
        sparse_weights: values of the sparse ones, zeros included.
        participating: values that participate in any of them.
        flops: of one forward pass of the example inputs, dense; None where no shapes are known.
        sparse_flops: the part of ``flops`` that sparse layers do, computed dense.
        effective_flops: ``flops`` on participating weights only.
        empty_channels: output channels all of whose weights are zero.
        fit_for_tensor_cores: sparse layers that Sparse Tensor Cores would take.
    """

    layers: int
    sparse_layers: int
    weights: int
    sparse_weights: int
    participating: int
    flops: int | None
    sparse_flops: int | None
    effective_flops: int | None
    empty_channels: int
    fit_for_tensor_cores: int


@dataclass(frozen=True)
class Audit:
    """Which layers of a model are sparse, and why the others are not. ``str()`` gives a table.

    Attributes:
        layers: one row for every Linear/Conv weight, in the model's order.
        unseen: parameters that look like weights and were used by no call that was seen.
        settings: the values in force, such as pattern and density; ``sparsified`` is False where the audit tells
            what `sparsify` would do.
        title: the model's name.
    """

    layers: tuple[LayerReport, ...]
    unseen: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def totals(self) -> Totals:
        """Sums over all layers."""
        return sum_up(self.layers)

    def to_json(self) -> str:
        """Everything as JSON: ``title``, ``settings``, ``totals``, ``layers``, ``unseen``."""
        rows = [{**asdict(layer), "effective_flops": layer.effective_flops} for layer in self.layers]
        content = {
            "title": self.title,
            "settings": dict(self.settings),
            "totals": asdict(self.totals),
            "layers": rows,
            "unseen": list(self.unseen),
        }
        return json.dumps(content, indent=2, default=str, ensure_ascii=False)

    def to_html(self, path: str | PathLike[str], *, more: Iterable[str] = ()) -> None:
        """Write one self-contained HTML page; a file at ``path`` is replaced only when all of it is written.

        ``more`` are sections to follow, such as those of `sparsefx.analysis.recorded_sections`.

        Raises:
            ExportError: the file cannot be written.
        """
        from sparsefx.html import write_text
        from sparsefx.report_page import audit_page

        write_text(path, audit_page(self, more))

    def __str__(self) -> str:
        from sparsefx.report_table import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from sparsefx.report_table import renderables

        yield from renderables(self)


def sum_up(layers: Iterable[LayerReport]) -> Totals:
    """Totals of some layers."""
    rows = list({layer.parameter: layer for layer in layers}.values())
    sparse = [layer for layer in rows if layer.sparse]
    counted = [layer for layer in rows if layer.flops is not None]
    sizes = {layer.parameter: math.prod(layer.shape) for layer in rows}
    return Totals(
        layers=len(rows),
        sparse_layers=len(sparse),
        weights=sum(sizes.values()),
        sparse_weights=sum(sizes[layer.parameter] for layer in sparse),
        participating=sum(round(sizes[layer.parameter] * layer.density) for layer in rows),
        flops=sum(layer.flops or 0 for layer in counted) if counted else None,
        sparse_flops=sum(layer.flops or 0 for layer in counted if layer.sparse) if counted else None,
        effective_flops=sum(layer.effective_flops or 0 for layer in counted) if counted else None,
        empty_channels=sum(layer.empty_channels for layer in rows),
        fit_for_tensor_cores=sum(not layer.tensor_core_reason for layer in sparse),
    )
