"""What a training run did to weights and masks, and what sparse models are like, measured. Nothing here changes a model."""

from sparsefx.analysis.accuracy_fraction import Estimate, accuracy_fraction, estimate
from sparsefx.analysis.decorrelation import Decorrelation, MagnitudeBin, correlations, decorrelation_lags, magnitude_bins
from sparsefx.analysis.mask_changes import MaskPoint
from sparsefx.analysis.page import accuracy_fraction_section, recorded_sections, specialization_section
from sparsefx.analysis.plots import (
    plot_accuracy_fraction,
    plot_decorrelation,
    plot_density,
    plot_empty_channels,
    plot_ever_used,
    plot_flip_rate,
    plot_specialization,
)
from sparsefx.analysis.recorder import Recorder
from sparsefx.analysis.specialization import Specialization, class_specialization

__all__ = [
    "Decorrelation",
    "Estimate",
    "MagnitudeBin",
    "MaskPoint",
    "Recorder",
    "Specialization",
    "accuracy_fraction",
    "accuracy_fraction_section",
    "class_specialization",
    "correlations",
    "decorrelation_lags",
    "estimate",
    "magnitude_bins",
    "plot_accuracy_fraction",
    "plot_decorrelation",
    "plot_density",
    "plot_empty_channels",
    "plot_ever_used",
    "plot_flip_rate",
    "plot_specialization",
    "recorded_sections",
    "specialization_section",
]
