"""What the demo found, as text and as an HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sparsefx.html import Cell, Line, Markup, bullets, columns, line_chart, mask_picture, page, section, table, tiles
from sparsefx.pruning_page import width_table
from sparsefx.pruning_speed import speed_lines
from sparsefx.report_page import layer_table
from sparsefx.report_table import dense_reasons, quantity, total_lines

if TYPE_CHECKING:
    from sparsefx.demo import DemoResult, Run

_KINDS = ("dense", "2:4")
# Rows and columns of a mask that are pictured.
_ROWS, _COLUMNS = 64, 64
_MASK_NOTE = "Rows are output channels, columns input channels; of a convolution, at the centre of its filters. Seed 0."


def demo_text(result: DemoResult) -> str:
    """Accuracies, audit, channels and the checks of the ONNX file, as plain text."""
    dense, sparse = (result.accuracies(kind) for kind in _KINDS)
    lines = ["", "seed    dense     2:4   difference"]
    for seed, (one, other) in enumerate(zip(dense, sparse, strict=True)):
        lines.append(f"{seed:4}  {100 * one:6.2f} %{100 * other:6.2f} %  {100 * (other - one):+6.2f} points")
    lines.append(
        f"mean  {100 * statistics.mean(dense):6.2f} %{100 * statistics.mean(sparse):6.2f} %  {result.difference:+6.2f} points"
        f"   (test accuracy on {result.test_images} images)"
    )
    lines += ["", str(result.audit), "", "layer       channels   empty   norm of a filter: smallest   median   largest"]
    lines += [
        f"{row.layer:12}{row.channels:8}{row.empty:8}{row.smallest_norm:29.3f}{row.median_norm:9.3f}{row.largest_norm:10.3f}"
        for row in result.channels
    ]
    lines += ["", *_pruning_lines(result)]
    lines += ["", str(result.export), f"The file's predictions equal the model's on {_same(result)}."]
    lines.append(f"{result.seconds:.0f} s in all")
    return "\n".join(lines)


def demo_page(result: DemoResult) -> str:
    """The HTML report."""
    dense, sparse = (statistics.mean(result.accuracies(kind)) for kind in _KINDS)
    seeds = len(result.accuracies("dense"))
    entries = [
        ("dense test accuracy", f"{100 * dense:.2f} %", f"mean of {seeds} seeds"),
        ("2:4 test accuracy", f"{100 * sparse:.2f} %", f"{result.difference:+.2f} points"),
        ("ONNX predictions equal", f"{result.same_predictions} of {result.test_images}", "on the test images"),
        ("largest ONNX error", f"{result.export.largest_relative_error:.1e}", "relative to the largest output"),
        ("ONNX file", f"{quantity(result.export.bytes)}B", f"opset {result.export.opset}"),
    ]
    reasons = [f"{share}: {reason} {names}" for share, reason, names in dense_reasons(result.audit)]
    return page(
        "2:4 sparse training on handwritten digits",
        tiles(entries),
        section("Training", _charts(result)),
        section("Accuracy", _accuracy_table(result)),
        section("Masks", _MASK_NOTE, _masks(result)),
        section("Audit", *total_lines(result.audit), bullets(reasons), layer_table(result.audit)),
        section("Channels", _channel_table(result)),
        section("Channels removed", *_pruning_lines(result), width_table(result.pruned.report)),
        section("ONNX file", f"{result.export.path}: {_same(result)} have equal predictions.", bullets(result.export.checks)),
        subtitle="The same first weights and the same batches for both nets of a seed; 1 200 training images, "
        f"{result.test_images} test images, UCI optical digits. {result.seconds:.0f} s in all.",
    )


def _pruning_lines(result: DemoResult) -> list[str]:
    """What became of a net that was trained without half of its filters."""
    net = result.pruned
    report = net.report
    return [
        f"A net trained with half of its filters, then cut: {report.summary()}.",
        f"Test accuracy {100 * net.accuracy:.2f} % before and {100 * net.accuracy_after:.2f} % after; the same digit on "
        f"{net.same_predictions} of {result.test_images} images.",
        f"{net.torch_speedup:.2f} times as fast in torch, {net.onnx_speedup:.2f} times in onnxruntime (medians of alternating "
        "runs, one thread).",
        *speed_lines(report),
    ]


def _same(result: DemoResult) -> str:
    return f"{result.same_predictions} of {result.test_images} test images"


def _charts(result: DemoResult) -> Markup:
    loss = _lines(result.runs, lambda run: run.losses)
    accuracy = _lines(result.runs, lambda run: run.accuracies)
    flips = _lines(result.runs, lambda run: run.flips)
    parts = [
        line_chart("Training loss", loss, x_label="step", y_label="cross entropy"),
        line_chart("Test accuracy", accuracy, x_label="step", y_label="share recognised", y_percent=True, y_range=(0.8, 1.0)),
        line_chart("Mask flips", flips, x_label="step", y_label="share of mask entries changed in 5 steps", y_percent=True),
    ]
    return columns(*parts)


def _lines(runs: Sequence[Run], values: Callable[[Run], list[tuple[float, float]]]) -> list[Line]:
    """One faint line for each run, and the mean over seeds for each kind."""
    lines = []
    for colour, kind in enumerate(_KINDS):
        of_kind = [values(run) for run in runs if run.kind == kind]
        lines += [Line(kind, points, colour, faint=True) for points in of_kind]
        means = [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*of_kind, strict=True)]
        lines.append(Line(kind, means, colour))
    # Dense nets have no masks, and so no line where masks are shown.
    return [line for line in lines if line.points]


def _accuracy_table(result: DemoResult) -> Markup:
    rows: list[list[str | Cell]] = [
        [
            str(run.seed),
            run.kind,
            Cell(f"{100 * run.accuracy:.2f} %", run.accuracy),
            Cell(f"{run.losses[-1][1]:.4f}", run.losses[-1][1]),
            Cell(f"{run.seconds:.1f} s", run.seconds),
        ]
        for run in result.runs
    ]
    return table(["seed", "net", "test accuracy", "last training loss", "training time"], rows)


def _masks(result: DemoResult) -> Markup:
    pictures = [mask_picture(f"{name}, {_shape(mask)}", _flat(mask).numpy()) for name, mask in result.masks.items()]
    return Markup(f"<div class=masks>{''.join(pictures)}</div>")


def _flat(mask: Tensor) -> Tensor:
    """A convolution's mask at its filter's centre; a matrix's as it is. Only the first rows and columns."""
    for size in mask.shape[2:]:
        mask = mask[:, :, size // 2]
    return mask[:_ROWS, :_COLUMNS]


def _shape(mask: Tensor) -> str:
    return "x".join(map(str, mask.shape))


def _channel_table(result: DemoResult) -> Markup:
    headers = ["layer", "channels", "empty", "smallest filter norm", "median", "largest"]
    rows: list[list[str | Cell]] = [
        [
            row.layer,
            Cell(str(row.channels), row.channels),
            Cell(str(row.empty), row.empty),
            *(Cell(f"{norm:.3f}", norm) for norm in (row.smallest_norm, row.median_norm, row.largest_norm)),
        ]
        for row in result.channels
    ]
    return table(headers, rows)
