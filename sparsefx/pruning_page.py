"""What pruning did to a model, as one HTML page, and as parts of a larger one."""

from __future__ import annotations

from collections.abc import Iterator

from sparsefx.html import Cell, Markup, bullets, page, section, table, tiles
from sparsefx.passes.channels.report import PruningReport
from sparsefx.pruning_speed import PruningSpeed, speed_lines


def pruning_page(report: PruningReport, title: str, speed: PruningSpeed | None = None) -> str:
    """The whole document."""
    return page(f"Channels removed from {title}", *pruning_parts(report, speed), subtitle=report.summary())


def pruning_parts(report: PruningReport, speed: PruningSpeed | None = None) -> Iterator[Markup]:
    """Tiles, times, widths, and what had to stay."""
    outputs, left = (sum(getattr(row, name) for row in report.layers) for name in ("outputs", "outputs_after"))
    yield tiles(
        [
            ("channels left", _share(outputs, left), f"{outputs:,} -> {left:,}"),
            ("parameters left", _share(report.parameters, report.parameters_after), f"of {report.parameters:,}"),
            ("multiply-adds left", _share(report.operations, report.operations_after), f"of {report.operations:,}"),
        ]
    )
    yield section("Speed", *speed_lines(report, speed))
    if notes := report.notes():
        yield section("Added, kept whole, and not run", bullets(notes))
    yield section("Widths", width_table(report))


def width_table(report: PruningReport) -> Markup:
    """One row for every weight of a layer, sortable and filterable."""
    headers = ["weight", "inputs", "after", "outputs", "after", "needed", "empty", "multiply-adds", "after", "why channels stay"]
    rows: list[list[str | Cell]] = []
    for row in report.layers:
        numbers = (
            *(row.inputs, row.inputs_after, row.outputs, row.outputs_after, row.outputs_needed, row.empty),
            *(row.operations, row.operations_after),
        )
        rows.append([row.weight, *(Cell(f"{number:,}", number) for number in numbers), row.why])
    return table(headers, rows, filterable=True)


def _share(before: int, after: int) -> str:
    return f"{100 * after / before:.1f} %" if before else "-"
