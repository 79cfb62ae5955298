"""How much of the way from a smaller dense model to the dense one a sparse model goes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sparsefx.errors import OptionError


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, which is NaN where one seed is all there is."""

    mean: float
    standard_error: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the values of several seeds. Raises OptionError where there is none."""
    if not values:
        raise OptionError("no value was given; expected one for each seed")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(statistics.fmean(values), error, len(values))


def accuracy_fraction(dense: Sequence[float], sparse: Sequence[float], small: Sequence[float]) -> Estimate:
    """``f = (SPARSE - SMALL) / (DENSE - SMALL)``: 1 where the sparse model is as good as the dense one, 0 where it is no better
    than the dense model of its size.

    ("Advances in Sparse Neural Model Training", appendix C. It is printed there as (DENSE - SPARSE) / (DENSE - SMALL), which is
    1 - f and contradicts the sentence that explains it.) Accuracies and errors give the same f.

    Args:
        dense, sparse, small: a figure for each seed; the means are compared.

    Returns:
        f, with the standard error that those of the three means give it to first order.

    Raises:
        OptionError: no figures, or dense and small models are equally good, so that there is no way to divide.
    """
    means = [estimate(values) for values in (dense, sparse, small)]
    high, middle, low = (one.mean for one in means)
    way = high - low
    if way == 0:
        raise OptionError(f"dense and small models both have {high:g} on average, so that no fraction of the way is defined")
    fraction = (middle - low) / way
    # df/d(sparse) = 1/way, df/d(dense) = -f/way, df/d(small) = (f - 1)/way
    slopes = (-fraction / way, 1 / way, (fraction - 1) / way)
    error = math.sqrt(sum((slope * one.standard_error) ** 2 for slope, one in zip(slopes, means, strict=True)))
    return Estimate(fraction, error, min(one.count for one in means))
