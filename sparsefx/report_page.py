"""An Audit as one HTML page, and as a section of a larger one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sparsefx.html import Cell, Markup, breakable, bullets, escape, page, section, table, tiles
from sparsefx.report import LayerReport
from sparsefx.report_table import NOT_FOR_HARDWARE, dense_reasons, hardware_reasons, headline, percent, quantity, total_lines

if TYPE_CHECKING:
    from sparsefx.report import Audit


def audit_page(audit: Audit, more: Iterable[str] = ()) -> str:
    """The whole document; ``more`` are sections to follow."""
    told = headline(audit)
    return page(f"Sparsity of {audit.title or 'a model'}", *audit_parts(audit), *map(escape, more), subtitle=told)


def audit_parts(audit: Audit) -> Iterator[Markup]:
    """Tiles, reasons and the table of all layers."""
    totals = audit.totals
    would = "would be sparse" if audit.settings.get("sparsified") is False else "sparse"
    entries = [
        (f"layers {would}", f"{totals.sparse_layers} of {totals.layers}", "Linear and Conv weights"),
        (f"values in layers {would}", percent(totals.sparse_weights, totals.weights), f"of {quantity(totals.weights)}"),
        ("values that participate", percent(totals.participating, totals.weights), quantity(totals.participating)),
        (
            "FLOPs left",
            percent(totals.effective_flops or 0, totals.flops or 0),
            f"of {quantity(totals.flops)}" if totals.flops else "pass example_inputs to count them",
        ),
        ("fit for Sparse Tensor Cores", f"{totals.fit_for_tensor_cores} of {totals.sparse_layers}", "by shape and pattern"),
    ]
    yield tiles(entries)
    yield section("In words", *total_lines(audit))
    for heading, reasons in (("Dense, and why", dense_reasons(audit)), (NOT_FOR_HARDWARE, hardware_reasons(audit))):
        if reasons:
            yield section(heading, bullets([f"{share}: {reason} {names}" for share, reason, names in reasons]))
    if audit.unseen:
        yield section("Weights that no call was seen to use", bullets(audit.unseen))
    if audit.layers:
        yield section("Layers", layer_table(audit))


def layer_table(audit: Audit) -> Markup:
    """One row for every layer, sortable and filterable."""
    headers = ["weight", "kind", "shape", "state", "density", "empty", "FLOPs", "effective", "calls", "rung", "note"]
    return table(headers, [_row(layer) for layer in audit.layers], filterable=True)


def _row(layer: LayerReport) -> list[str | Cell]:
    effective = layer.effective_flops
    note = layer.reason or (f"not for Sparse Tensor Cores: {layer.tensor_core_reason}" if layer.tensor_core_reason else "")
    return [
        breakable(layer.name),
        layer.kind,
        "x".join(map(str, layer.shape)),
        layer.pattern if layer.sparse else "dense",
        Cell(f"{layer.density:.3g}", layer.density),
        Cell(str(layer.empty_channels), layer.empty_channels),
        Cell("-", -1) if layer.flops is None else Cell(quantity(layer.flops), layer.flops),
        Cell("-", -1) if effective is None else Cell(quantity(effective), effective),
        Cell(str(len(layer.call_sites)), len(layer.call_sites)),
        Cell(str(layer.rung), layer.rung),
        note,
    ]
