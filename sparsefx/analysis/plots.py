"""Figures of what was analysed, with matplotlib (``pip install sparsefx[plots]``). Each function returns a Figure of its own.

Nothing here touches pyplot or its state: ``figure.savefig("name.png")`` is all that is left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from sparsefx.analysis.accuracy_fraction import Estimate
from sparsefx.analysis.decorrelation import Decorrelation
from sparsefx.analysis.mask_changes import MaskPoint
from sparsefx.analysis.specialization import Specialization
from sparsefx.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of sparsefx's HTML reports, then others that can be told from them.
COLOURS = ("#2465b5", "#c2540f", "#2e7d4f", "#7a4bb0", "#8a6d00", "#a8325e", "#4d5560", "#0f8a8a")
History = Mapping[str, Sequence[MaskPoint]]


def new_figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """One empty pair of axes.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plots need matplotlib, which is not installed; pip install 'sparsefx[plots]'") from error
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as SVG: the same text for the same figure."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "sparsefx", "svg.fonttype": "none"}):
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def plot_decorrelation(layers: Sequence[Decorrelation], *, bins: int = 20) -> Figure:
    """Median decorrelation time by final magnitude; the part of a line that pruning removes is pale (figure 1 of the paper)."""
    figure, axes = new_figure("Time until weights decorrelate", "|w| at the end", "share of training (median of a bin)")
    for colour, layer in zip(_colours(len(layers)), layers, strict=True):
        points = layer.bins(bins)
        magnitudes = [point.magnitude for point in points]
        times = [point.time for point in points]
        if layer.threshold is not None:
            stays = [index for index, value in enumerate(magnitudes) if value >= layer.threshold]
            axes.plot(magnitudes, times, color=colour, alpha=0.3)
            magnitudes, times = [magnitudes[i] for i in stays], [times[i] for i in stays]
        axes.plot(magnitudes, times, marker="o", markersize=3, color=colour, label=layer.name)
    _legend(axes, len(layers))
    return figure


def plot_flip_rate(history: History) -> Figure:
    """Share of each mask that changes from one look to the next."""
    return _over_time(history, "Mask flips", "share changed per look", lambda point: point.flip_rate)


def plot_ever_used(history: History) -> Figure:
    """Share of each layer's weights that has participated so far."""
    return _over_time(history, "Weights ever used", "share of the layer", lambda point: point.ever_used)


def plot_density(history: History) -> Figure:
    """Density of each layer."""
    return _over_time(history, "Density by layer", "share that participates", lambda point: point.density)


def plot_empty_channels(history: History) -> Figure:
    """Output channels of each layer that hold only zeros."""
    return _over_time(history, "Empty channels", "output channels", lambda point: float(point.empty_channels))


def plot_specialization(models: Mapping[str, Specialization]) -> Figure:
    """How many channels have which class specialization, one outline a model, with their means."""
    figure, axes = new_figure("Class specialization of channels", "largest class's share of |activation|", "share of channels")
    for colour, (name, found) in zip(_colours(len(models)), models.items(), strict=True):
        values = [float(value) for row in found.channels.values() for value in row if not value.isnan()]
        weights = [1 / len(values)] * len(values)
        label = f"{name}: mean {found.mean:.3f}"
        axes.hist(values, bins=30, range=(0.0, 1.0), weights=weights, histtype="step", color=colour, label=label)
    _legend(axes, len(models))
    return figure


def plot_accuracy_fraction(fractions: Mapping[float, Estimate]) -> Figure:
    """f by density, with its standard error; 1 is as good as dense, 0 no better than the dense model of that size."""
    figure, axes = new_figure("Accuracy between SMALL and DENSE", "density", "f")
    densities = sorted(fractions)
    means = [fractions[density].mean for density in densities]
    errors = [fractions[density].standard_error for density in densities]
    axes.errorbar(densities, means, yerr=errors, marker="o", capsize=3, color=COLOURS[0])
    for level in (0.0, 1.0):
        axes.axhline(level, color="#5c646e", linewidth=0.8, linestyle="--")
    return figure


def _over_time(history: History, title: str, y_label: str, value: Callable[[MaskPoint], float]) -> Figure:
    figure, axes = new_figure(title, "step", y_label)
    for colour, (name, points) in zip(_colours(len(history)), history.items(), strict=True):
        axes.plot([point.step for point in points], [value(point) for point in points], color=colour, linewidth=1, label=name)
    axes.set_ylim(bottom=0)
    _legend(axes, len(history))
    return figure


def _colours(count: int) -> list[str]:
    """A colour a line; where there are more layers than can be told apart, depth goes from the first to the second."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("depth", [COLOURS[0], "#b9bec6", COLOURS[1]])
    return [to_hex(scale(index / (count - 1))) for index in range(count)]


def _legend(axes: Axes, count: int) -> None:
    if 0 < count <= len(COLOURS):
        axes.legend(fontsize=7, frameon=False)
    elif count:
        named, _ = axes.get_legend_handles_labels()
        axes.legend(handles=[named[0], named[-1]], fontsize=7, frameon=False, title="first and last layer")
