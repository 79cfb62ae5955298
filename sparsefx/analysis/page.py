"""What was recorded and analysed as sections of an HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsefx.analysis import plots
from sparsefx.analysis.accuracy_fraction import Estimate
from sparsefx.analysis.recorder import Recorder
from sparsefx.analysis.specialization import Specialization
from sparsefx.html import Cell, Markup, columns, section, svg_picture, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recorded_sections(recorder: Recorder) -> list[Markup]:
    """Masks over time and decorrelation times, for ``audit.to_html(path, more=...)``."""
    parts: list[Markup] = []
    history = recorder.mask_history()
    if any(history.values()):
        figures = [
            plots.plot_flip_rate(history),
            plots.plot_ever_used(history),
            plots.plot_density(history),
            plots.plot_empty_channels(history),
        ]
        parts.append(section("Masks over time", columns(*map(_picture, figures))))
    layers = recorder.decorrelation()
    rows: list[list[str | Cell]] = []
    for layer in layers:
        small, large = layer.medians()
        rows.append([layer.name, _number(small), _number(large), _number(layer.resolution)])
    told = (
        "The share of training after which a weight no longer correlates with its past: medians over weights of like magnitude "
        "at the end. Pale: what pruning by magnitude removes."
    )
    headers = ["weight", "median, small weights", "median, weights that stay", "resolution"]
    parts.append(section("Decorrelation", told, _picture(plots.plot_decorrelation(layers)), table(headers, rows)))
    return parts


def specialization_section(models: Mapping[str, Specialization]) -> Markup:
    """Class specialization of one or several models, by name."""
    rows: list[list[str | Cell]] = [
        [name, Cell(f"{found.mean:.3f}", found.mean), Cell(str(sum(found.left_out.values())), sum(found.left_out.values()))]
        for name, found in models.items()
    ]
    return section(
        "Class specialization",
        _picture(plots.plot_specialization(models)),
        table(["model", "mean", "weak channels left out"], rows),
    )


def accuracy_fraction_section(fractions: Mapping[float, Estimate]) -> Markup:
    """f by density."""
    return section("Accuracy fraction", _picture(plots.plot_accuracy_fraction(fractions)))


def _picture(figure: Figure) -> Markup:
    return svg_picture(figure.axes[0].get_title(), plots.svg(figure))


def _number(value: float) -> Cell:
    return Cell("-", -1.0) if value != value else Cell(f"{value:.3f}", value)
